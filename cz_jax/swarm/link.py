"""A node's line to a relay: a thread with an event loop of its own that sends, fetches, fails and comes back.

Nothing here raises on account of the relay or the network. A relay that is down, slow or refuses is noted in words
(`take_notes`), tried again after a pause that grows, and meanwhile a bounded number of own messages is kept for it.
"""

import asyncio
import contextlib
import random
import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from cz_jax.errors import one_line
from cz_jax.swarm.envelope import MAX_PAYLOAD, Opened, Rejected, open_envelope, seal
from cz_jax.swarm.identity import Identity
from cz_jax.swarm.relay_pb2 import Envelope, FetchReply, FetchRequest, PublishRequest, Sample
from cz_jax.swarm.relay_pb2_grpc import RelayStub

BATCH, BATCH_BYTES = 32, 2 << 20
PUBLISH_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE, BUSY_SECONDS = 0.5, 30.0, 1.0
MARGIN_SECONDS = 1.0  # beyond a call's own deadline, for the thread to answer
START_SECONDS, CLOSE_SECONDS = 30.0, 3.0
MAX_NOTES = 50
FLOOR = re.compile("[1-9][0-9]{0,17}")
PASSING = frozenset(  # statuses that say nothing about the message: it is sent again
    grpc.StatusCode[name]
    for name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL", "ABORTED", "DATA_LOSS",
                 "UNIMPLEMENTED")
)  # fmt: skip


@dataclass(frozen=True)
class LinkOptions:
    """`address`: HOST:PORT. `tls_roots`: PEM of the authority that signed the relay's certificate; empty: the system's.
    `buffer`: own messages kept while the relay is away."""

    address: str
    run: str
    tls: bool = False
    tls_roots: bytes = b""
    buffer: int = 256


@dataclass(frozen=True, slots=True)
class Look:
    """What a fetch brought: messages whose signature, run and kind hold, by the relay's sequence; the cursor to go on
    with; and why others were refused."""

    messages: tuple[Opened, ...]
    next: int
    refused: dict[str, int]


class Link:
    """Made by a node once; `close` ends its thread. Every method may be called from any one thread."""

    def __init__(self, options: LinkOptions, identity: Identity):
        self.options, self.identity, self.peer = options, identity, identity.peer_id
        self._lock = threading.Lock()
        self._kept: deque[Envelope] = deque()
        self._number = self._overflow = self._failures = self._refused = 0
        self._retry_at, self._down, self._closed = 0.0, False, False
        self._single = 0  # of how many messages each goes alone, after a batch was refused
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)
        self._loop = asyncio.new_event_loop()
        self._more: asyncio.Event | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="swarm", daemon=True)
        self._thread.start()
        if not started.wait(START_SECONDS):
            raise RuntimeError(f"the swarm's thread did not start within {START_SECONDS:g} s")

    @property
    def down(self) -> bool:
        """Whether the last call to the relay failed."""
        return self._down

    @property
    def kept(self) -> int:
        """Own messages that the relay has not yet acknowledged."""
        return len(self._kept)

    def take_notes(self) -> list[str]:
        """What a person should know, each said once."""
        notes = []
        while self._notes:
            notes.append(self._notes.popleft())
        return notes

    def send(self, kind: str, payload: bytes) -> None:
        """Signs and queues a message. The oldest of too many that wait is given up, and noted."""
        if self._closed:
            return
        if len(payload) > MAX_PAYLOAD:
            self._notes.append(
                f"a {kind} of {len(payload)} bytes was not shared: a message holds at most {MAX_PAYLOAD}"
            )
            return
        with self._lock:
            self._number = max(self._number + 1, time.time_ns() // 1000)
            now_ms = time.time_ns() // 1_000_000
            self._kept.append(seal(self.identity, self.options.run, kind, self._number, now_ms, payload))
            if len(self._kept) > self.options.buffer:
                self._kept.popleft()
                self._overflow += 1
        with contextlib.suppress(RuntimeError):  # closed just now
            self._loop.call_soon_threadsafe(self._more.set)

    def fetch(
        self, kind: str, after: int, limit: int, sample: Sample | None, seconds: float, wait: float
    ) -> Look | None:
        """What the relay has beyond the cursor `after`, waiting up to `wait` seconds for a first message; None where it
        does not answer within `seconds` beside that, or did not lately. A cursor outside of the log begins anew at its
        floor."""
        if self._closed or time.monotonic() < self._retry_at:
            return None
        request = FetchRequest(
            run=self.options.run, kind=kind, after=after, limit=limit, wait_ms=int(wait * 1000), sample=sample
        )
        call = self._fetch(request, seconds + wait)
        try:
            future: Future = asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError:  # closed just now
            call.close()
            return None
        try:
            reply = future.result(2 * (seconds + wait) + MARGIN_SECONDS)
        except Late:
            future.cancel()
            return None
        return None if reply is None else self._opened(request, reply)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Sends what is kept, for at most `seconds` and only to a relay that answers; then ends the thread."""
        until = time.monotonic() + seconds
        while self._kept and not self._down and time.monotonic() < until:
            time.sleep(0.02)
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(MARGIN_SECONDS + 1)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main(started))
        finally:
            self._loop.close()

    async def _main(self, started: threading.Event) -> None:
        self._more, self._ended = asyncio.Event(), asyncio.Event()
        async with self._channel() as channel:
            self._stub = RelayStub(channel)
            sender = asyncio.ensure_future(self._send_kept())
            started.set()
            await self._ended.wait()
            sender.cancel()
            await asyncio.wait([sender], timeout=MARGIN_SECONDS)

    def _channel(self) -> grpc.aio.Channel:
        options = [
            ("grpc.max_receive_message_length", 8 << 20),
            ("grpc.initial_reconnect_backoff_ms", 500),
            ("grpc.min_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ]
        if not self.options.tls:
            return grpc.aio.insecure_channel(self.options.address, options)
        credentials = grpc.ssl_channel_credentials(self.options.tls_roots or None)
        return grpc.aio.secure_channel(self.options.address, credentials, options)

    async def _fetch(self, request: FetchRequest, seconds: float) -> FetchReply | None:
        for _ in range(2):
            try:
                reply = await self._stub.Fetch(request, timeout=seconds)
            except grpc.aio.AioRpcError as e:
                floor = str(dict(e.trailing_metadata() or ()).get("cz-floor", ""))
                if e.code() is not grpc.StatusCode.OUT_OF_RANGE or not FLOOR.fullmatch(floor):
                    self._failed(e, seconds)
                    return None
                self._answered()
                told = f"the relay's log of {request.run} does not hold what follows {request.after}"
                self._notes.append(f"{told}: going on at {floor}, where it begins")
                request.after = int(floor) - 1
            else:
                self._answered()
                return reply
        return None

    def _opened(self, request: FetchRequest, reply: FetchReply) -> Look:
        found, refused = [], Counter()
        for entry in reply.entries[: request.limit]:
            try:
                found.append(open_envelope(Envelope.FromString(entry.envelope), request.run, request.kind))
            except Rejected as e:
                refused[e.reason] += 1
            except DecodeError:
                refused["not_an_envelope"] += 1
        return Look(tuple(found), max(request.after, min(reply.next, (1 << 62) - 1)), dict(refused))

    async def _send_kept(self) -> None:
        while True:
            await self._more.wait()
            pause = self._retry_at - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            batch = self._next_batch()
            if not batch:
                self._more.clear()
                if self._kept:  # came between the two lines above
                    self._more.set()
                continue
            try:
                await self._stub.Publish(PublishRequest(run=self.options.run, envelopes=batch), timeout=PUBLISH_SECONDS)
            except grpc.aio.AioRpcError as e:
                if e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # over our quota, or the relay has much to write
                    await asyncio.sleep(BUSY_SECONDS * random.uniform(0.5, 1.5))
                elif e.code() in PASSING:
                    self._failed(e, PUBLISH_SECONDS)
                else:
                    self._answered()
                    self._refusal(batch, e)
            else:
                self._answered()
                self._forget(batch)

    def _next_batch(self) -> list[Envelope]:
        with self._lock:
            most, batch, size = 1 if self._single else BATCH, [], 0
            for envelope in self._kept:
                size += envelope.ByteSize()
                if len(batch) >= most or (batch and size > BATCH_BYTES):
                    break
                batch.append(envelope)
            return batch

    def _forget(self, batch: list[Envelope]) -> None:
        """Drops acknowledged messages; some may have been given up meanwhile."""
        with self._lock:
            done = {e.number for e in batch}
            while self._kept and self._kept[0].number in done:
                self._kept.popleft()
            self._single = max(0, self._single - len(batch))

    def _refusal(self, batch: list[Envelope], error: grpc.aio.AioRpcError) -> None:
        """A batch that the relay will never take is sent one by one; a message that it will never take is dropped."""
        if len(batch) > 1:
            self._single = len(batch)
            return
        self._forget(batch)
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            reason = one_line(error.details() or str(error.code()), 200)
            self._notes.append(f"the relay refused {self._refused} of our messages: {reason}")

    def _failed(self, error: grpc.aio.AioRpcError, seconds: float) -> None:
        self._failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1.0)
        self._retry_at = time.monotonic() + pause
        if not self._down:
            self._down = True
            why = f"it did not answer within {seconds:g} s" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else (
                one_line(error.details() or str(error.code()), 200)
            )  # fmt: skip
            self._notes.append(
                f"relay {self.options.address} does not serve: {why}. Going on alone; up to {self.options.buffer} own "
                "messages are kept for it"
            )

    def _answered(self) -> None:
        self._failures, self._retry_at = 0, 0.0
        if self._down:
            self._down = False
            lost, self._overflow = self._overflow, 0
            given_up = f", the {lost} oldest were given up" if lost else ""
            self._notes.append(
                f"relay {self.options.address} answers again: {len(self._kept)} kept messages go out{given_up}"
            )
