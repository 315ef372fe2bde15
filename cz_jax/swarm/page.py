"""The relay's page over HTTP: one HTML file, its state as JSON, and the same as server-sent events. Read-only.

uvicorn speaks HTTP. A connection carries one request, has to send it and to take what it is sent within `PageLimits`,
and is cut otherwise. The page may hold hostile text: it travels as JSON and is shown as text by a script that the
content security policy knows by its hash; the policy allows nothing else.

What this does not protect: who may look. Whoever reaches the port sees what any reader of the log sees.
"""

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

FILE = "page.html"
STATE = b'<script type="application/json" id="state">{}</script>'  # in the file: the place of the first state
STOP_SECONDS = 2.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class PageLimits:
    """What the page grants, in counts, bytes and seconds."""

    connections: int = 64
    viewers: int = 32  # of them, with an open event stream
    header_bytes: int = 8 << 10  # request line and headers
    request_seconds: float = 10.0  # from the connection to the end of the headers
    take_seconds: float = 10.0  # that a client may let what was sent to it wait
    stream_seconds: float = 3600.0  # of one event stream; a browser opens the next by itself
    quiet_seconds: float = 15.0  # without news, after which a comment keeps a stream open


class PageServer:
    """The page on a bound socket, in the running event loop. `names`: the hosts by which a browser may call it; None:
    any. `failed(text)` is told of a defect while a request was served."""

    def __init__(
        self,
        names: frozenset[str] | None,
        failed: Callable[[str], None],
        limits: PageLimits | None = None,
    ):
        self._names, self._failed, self._limits = names, failed, limits or PageLimits()
        html = importlib.resources.files("cz_jax.swarm").joinpath(FILE).read_bytes()
        self._headers = _headers(html.decode("utf-8"))
        self._before, self._after = html.split(STATE)
        self._loop = asyncio.get_running_loop()
        self._state = b"{}"
        self._news = self._loop.create_future()
        self._closing = False
        self.viewers = 0

    def tell(self, state: bytes) -> None:
        """New state for every viewer; may be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._told, state)

    async def start(self, listening: socket.socket) -> None:
        limits = self._limits

        class Guarded(_Guard):
            granted = limits

        config = uvicorn.Config(
            self._serve, http=Guarded, ws="none", lifespan="off", interface="asgi3", log_config=None,
            log_level="critical", access_log=False, proxy_headers=False, server_header=False, backlog=64,
            h11_max_incomplete_event_size=limits.header_bytes, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = _Server(config)
        self._task = asyncio.ensure_future(self._server.serve([listening]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Ends every stream and closes the port, within STOP_SECONDS."""
        self._closing = True
        self._told(self._state)
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=STOP_SECONDS)

    def _told(self, state: bytes) -> None:
        self._state = state
        if not self._news.done():
            self._news.set_result(None)
        self._news = self._loop.create_future()

    async def _serve(self, scope, receive, send) -> None:
        try:
            await self._answer(scope, receive, send)
        except Exception as e:  # whatever it was, it is told in the relay's own words and ends one connection alone
            self._failed(repr(e))
            raise

    async def _answer(self, scope, receive, send) -> None:
        html = self._before + STATE.replace(b"{}", self._state) + self._after
        paths = {"/": ("text/html; charset=utf-8", html), "/state.json": ("application/json", self._state)}
        host = next((v for k, v in scope["headers"] if k == b"host"), b"").decode("latin-1")
        size = len(scope["raw_path"] + scope["query_string"]) + sum(len(k + v) + 4 for k, v in scope["headers"])
        if size > self._limits.header_bytes:  # h11 bounds what is incomplete alone
            await self._plain(send, 431, f"a request of at most {self._limits.header_bytes} bytes\n")
        elif self._names is not None and re.sub(r":\d*$", "", host).lower() not in self._names:
            await self._plain(send, 421, "this page answers to its own address only\n")  # no site borrows the browser
        elif scope["path"] not in (*paths, "/events"):
            await self._plain(send, 404, "there is /, /state.json and /events\n")
        elif scope["method"] not in ("GET", "HEAD"):
            await self._plain(send, 405, "GET or HEAD\n", (b"allow", b"GET, HEAD"))
        elif scope["path"] in paths:
            await self._whole(send, 200, *paths[scope["path"]])
        elif self.viewers >= self._limits.viewers:
            await self._plain(send, 503, "enough viewers for now\n", (b"retry-after", b"30"))
        else:
            await self._stream(scope["method"] == "HEAD", receive, send)

    async def _plain(self, send, status: int, text: str, *more: tuple[bytes, bytes]) -> None:
        await self._whole(send, status, "text/plain; charset=utf-8", text.encode("ascii"), *more)

    async def _whole(self, send, status: int, kind: str, body: bytes, *more: tuple[bytes, bytes]) -> None:
        told = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": [*self._headers, *told]})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, head: bool, receive, send) -> None:
        """Each state that is new, until the viewer is gone. One who is slow misses what came between."""
        headers = [*self._headers, (b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(_disconnected(receive))
        self.viewers += 1
        try:
            until, sent = self._loop.time() + self._limits.stream_seconds, None
            while not (head or gone.done() or self._closing) and self._loop.time() < until:
                news = self._news
                body = b"retry: 3000\n\n" if sent is None else b": still here\n\n"
                if sent != self._state:
                    sent = self._state
                    body += b"data: " + sent + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.wait(
                    [gone, news], timeout=self._limits.quiet_seconds, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            self.viewers -= 1
            gone.cancel()
        await send({"type": "http.response.body", "body": b""})


class _Server(uvicorn.Server):
    """Leaves the process's signals to the relay."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class _Guard(H11Protocol):
    """One connection, with the deadlines that uvicorn does not have."""

    granted: PageLimits
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        full = len(self.connections) >= self.granted.connections
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that whatever was not taken counts as waiting
        if full:
            transport.abort()
        else:
            self._cut_after(self.granted.request_seconds)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.ProtocolError:  # rubbish behind a request that is being answered
            self.transport.abort()
        if self.cycle is not None and not self.flow.write_paused:
            self._cut_after(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_after(self.granted.take_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cut_after(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cut_after(None)
        super().connection_lost(exc)

    def _cut_after(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


async def _disconnected(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _headers(html: str) -> list[tuple[bytes, bytes]]:
    """Of every answer. The page's own style and script are allowed by their hashes."""
    hashes = {tag: _hash(re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)[0]) for tag in ("style", "script")}
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        (b"content-security-policy", policy.encode("ascii")),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
    ]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
