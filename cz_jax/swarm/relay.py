"""The relay as a gRPC service: limits, TLS, health, metrics, a structured log, and a shutdown that loses nothing.

Each method logs, calls `Log`, and maps its refusal to a status; the reason is in the trailing metadata `cz-reason`,
and `cz-floor` and `cz-head` tell a reader whose cursor is outside of the log where it is.

What this does not protect: who may read. A list of peers says who may publish; what is published is for all who can
reach the port.
"""

import asyncio
import contextlib
import ipaddress
import json
import pathlib
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import prometheus_client
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cz_jax.errors import UserError, one_line
from cz_jax.files import local_folder
from cz_jax.swarm.log import Limits, Log, Refusal
from cz_jax.swarm.relay_pb2 import FetchRequest, PublishRequest
from cz_jax.swarm.store import MemoryStore, SqliteStore, StoreFailed

SERVICE = "cz.relay.v1.Relay"
CALLS_GRACE, WRITE_GRACE = 4.0, 4.0  # seconds that a shutdown gives to calls under way, then to what they handed in
START_SECONDS = 30.0
MAX_FILES = 1 << 16  # connections take a descriptor each
LOG_EVERY = 1.0  # seconds between two lines about refusals of one reason
MAX_ALLOW_BYTES = 1 << 20


class RelayError(UserError):
    """A relay that cannot be started as asked for."""


@dataclass(frozen=True)
class RelayOptions:
    """`listen` and `metrics` are HOST:PORT (port 0: any free one). `data`: the folder of the log; None keeps it in
    memory. `allow`: a file with a peer id a line."""

    listen: str
    data: pathlib.Path | None = None
    tls_cert: pathlib.Path | None = None
    tls_key: pathlib.Path | None = None
    allow: pathlib.Path | None = None
    insecure: bool = False
    metrics: str | None = None
    limits: Limits = field(default_factory=Limits)


class JsonLines:
    """`say(event, **fields)`: one JSON object a line on `stream`, with the time."""

    def __init__(self, stream=None):
        self._stream, self._lock = stream or sys.stderr, threading.Lock()

    def __call__(self, event: str, **fields) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event} | fields, default=str)
        with self._lock, contextlib.suppress(OSError, ValueError):  # a log that nobody reads stops no relay
            print(line, file=self._stream, flush=True)


class Metrics:
    """Counters of one relay in a registry of its own. No peer is named: there may be any number of them."""

    def __init__(self, log: Log):
        self.registry = registry = prometheus_client.CollectorRegistry()
        labels = {"registry": registry, "namespace": "cz_relay"}
        self.published = prometheus_client.Counter("published", "Envelopes appended.", ["kind"], **labels)
        self.duplicates = prometheus_client.Counter("duplicates", "Envelopes that were there before.", **labels)
        self.fetched = prometheus_client.Counter("fetched", "Entries sent to readers.", **labels)
        self.refused = prometheus_client.Counter("refused", "Calls refused.", ["method", "reason"], **labels)
        self.seconds = prometheus_client.Histogram(
            "publish_seconds",
            "From a publish call to its answer.",
            buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 1, 5),
            **labels,
        )
        gauges = {
            "waiting_readers": ("Long polls under way.", lambda: log.waiting),
            "queue": ("Envelopes that wait to be written.", lambda: log.writer.waiting),
            "damaged": ("Stored entries found damaged.", lambda: log.store.damaged),
            "runs": ("Runs that have a log.", lambda: _size(log)[0]),
            "entries": ("Entries kept.", lambda: _size(log)[1]),
            "bytes": ("Bytes of the envelopes kept.", lambda: _size(log)[2]),
        }
        for name, (about, value) in gauges.items():
            prometheus_client.Gauge(name, about, **labels).set_function(value)


class Servicer:
    """The thin side: parse, count, log, map."""

    def __init__(self, log: Log, metrics: Metrics, say: Callable):
        self._log, self._metrics, self._say = log, metrics, say
        self._quiet_until: dict[tuple[str, str], float] = {}
        self._unsaid: Counter[tuple[str, str]] = Counter()

    def handler(self) -> grpc.GenericRpcHandler:
        """Requests come as bytes, so that those that are no message are refused like any other."""
        methods = {"Publish": self.publish, "Fetch": self.fetch}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method, response_serializer=lambda reply: reply.SerializeToString()
            )
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def publish(self, data: bytes, context):
        begun = time.perf_counter()
        try:
            request = _parsed(PublishRequest, data)
            reply = await self._log.publish(request)
        except Refusal as e:
            await self._refuse(context, "publish", e)
        self._metrics.seconds.observe(time.perf_counter() - begun)
        for envelope, duplicate in zip(request.envelopes, reply.duplicates, strict=True):
            counter = self._metrics.duplicates if duplicate else self._metrics.published.labels(envelope.kind)
            counter.inc()
        return reply

    async def fetch(self, data: bytes, context):
        try:
            reply = await self._log.fetch(_parsed(FetchRequest, data))
        except Refusal as e:
            await self._refuse(context, "fetch", e)
        self._metrics.fetched.inc(len(reply.entries))
        return reply

    async def _refuse(self, context, method: str, refusal: Refusal) -> None:
        self._metrics.refused.labels(method, refusal.reason).inc()
        key, now = (method, refusal.reason), time.monotonic()
        self._unsaid[key] += 1
        if now >= self._quiet_until.get(key, 0.0):
            self._say(
                "refused", method=method, reason=refusal.reason, detail=one_line(refusal.detail, 200),
                peer=context.peer(), count=self._unsaid.pop(key),
            )  # fmt: skip
            self._quiet_until[key] = now + LOG_EVERY
        told = [("cz-reason", refusal.reason)]
        if refusal.bounds is not None:
            told += [("cz-floor", str(refusal.bounds.floor)), ("cz-head", str(refusal.bounds.head))]
        detail = f"{refusal.reason}: {one_line(refusal.detail, 300)}"
        await context.abort(grpc.StatusCode[refusal.code], detail, tuple(told))


class Relay:
    """A relay in the running event loop. RelayError or StoreError where it cannot start."""

    def __init__(self, options: RelayOptions, say: Callable):
        self._options, self._say = options, say
        self._metrics_server = None
        self.address = self.metrics_address = ""

    async def start(self) -> None:
        o = self._options
        host, port = split_address(o.listen, "--listen")
        credentials = _credentials(o)
        allow = None if o.allow is None else read_allow_list(o.allow)
        _check_plaintext(host, credentials is not None, o.insecure, "--listen")
        store = MemoryStore() if o.data is None else SqliteStore(local_folder(o.data))
        self.log = Log(store, o.limits, allow, lambda text: self._say("store_failed", detail=one_line(text, 200)))
        try:
            self.metrics = Metrics(self.log)
            self._server = grpc.aio.server(options=server_options(o.limits), maximum_concurrent_rpcs=o.limits.calls)
            self._server.add_generic_rpc_handlers((Servicer(self.log, self.metrics, self._say).handler(),))
            self._health = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
            self.address = f"{_bracketed(host)}:{self._bind(host, port, credentials)}"
            self._start_metrics()
            for service in ("", SERVICE):
                await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
            await self._server.start()
        except BaseException:
            self.log.close(WRITE_GRACE)
            raise
        self._say(
            "serving", address=self.address, tls=credentials is not None, data=o.data, metrics=self.metrics_address
        )

    async def stop(self) -> bool:
        """Takes nothing more, answers who waits, finishes calls under way, writes what they handed in; within 10 s.
        Whether nothing was left over."""
        self._say("draining", waiting=self.log.waiting, queue=self.log.writer.waiting)
        self.log.drain()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(CALLS_GRACE)
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        whole = await asyncio.get_running_loop().run_in_executor(None, self.log.close, WRITE_GRACE)
        self._say("stopped", whole=whole)
        return whole

    def _bind(self, host: str, port: int, credentials) -> int:
        target = f"{_bracketed(host)}:{port}"
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(target)
            else:
                bound = self._server.add_secure_port(target, credentials)
        except RuntimeError:
            bound = 0
        if not bound:
            raise RelayError(f"{target} cannot be listened on", "the port is in use, or not of this machine",
                             f"--listen {_bracketed(host)}:0 takes a free port")  # fmt: skip
        return bound

    def _start_metrics(self) -> None:
        if self._options.metrics is None:
            return
        host, port = split_address(self._options.metrics, "--metrics")
        _check_plaintext(host, False, self._options.insecure, "--metrics")
        try:
            self._metrics_server, _ = prometheus_client.start_http_server(port, host, self.metrics.registry)
        except OSError as e:
            what = f"{self._options.metrics} cannot be listened on: {e.strerror or e}"
            raise RelayError(what, "", "--metrics HOST:0") from None
        self.metrics_address = f"{_bracketed(host)}:{self._metrics_server.server_port}"


def serve(options: RelayOptions, say: Callable) -> dict:
    """A relay in this thread until SIGTERM or SIGINT; how it ended. RelayError or StoreError where it cannot start."""

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MAX_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES if hard < 0 else min(hard, MAX_FILES), hard))

    async def run() -> dict:
        relay, stop, loop = Relay(options, say), asyncio.Event(), asyncio.get_running_loop()
        await relay.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        whole = await relay.stop()
        return {"address": relay.address, "whole": whole}

    return asyncio.run(run())


class RelayThread:
    """A relay in a thread of its own, as a context manager: for a demo and for tests."""

    def __init__(self, options: RelayOptions, say: Callable = lambda event, **fields: None):
        self._options, self._say = options, say
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="relay", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "RelayThread":
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise RelayError(f"the relay did not start within {START_SECONDS:g} s")
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *exc) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CALLS_GRACE + WRITE_GRACE + 2)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.relay = Relay(self._options, self._say)
        try:
            await self.relay.start()
        except BaseException as e:
            self._error = e
            return
        finally:
            self.address = self.relay.address
            self._ready.set()
        await self._stop.wait()
        await self.relay.stop()


def server_options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent half of the calls
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # identity alone: what arrives is as large as it looks
        ("grpc.keepalive_time_ms", 30_000),  # who does not answer a ping within 10 s, or never reads, is dropped
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_idle_ms", 600_000),
    ]


def split_address(text: str, name: str) -> tuple[str, int]:
    """("127.0.0.1", 7000) of "127.0.0.1:7000"; brackets around IPv6. RelayError for anything else."""
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16) or not host.isprintable():
        raise RelayError(f"{name} {text!r} is not HOST:PORT", "", f"{name} 127.0.0.1:7443")
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_allow_list(path: pathlib.Path) -> frozenset[str]:
    """The peer ids in a file, one a line; # begins a comment. RelayError where it cannot be read or names none."""
    try:
        with open(path, "rb") as file:
            lines = file.read(MAX_ALLOW_BYTES).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RelayError(f"--allow {path} cannot be read: {e}", "one peer id a line is wanted") from None
    peers = frozenset(name for line in lines if (name := line.partition("#")[0].strip()))
    wrong = [p for p in peers if not (p.isalnum() and 40 <= len(p) <= 60)]
    if wrong or not peers:
        raise RelayError(
            f"--allow {path} " + (f"holds {wrong[0]!r}, which is no peer id" if wrong else "names no peer"), "",
            "cz-jax identity show FILE prints a peer id",
        )  # fmt: skip
    return peers


def _credentials(options: RelayOptions):
    if (options.tls_cert is None) != (options.tls_key is None):
        raise RelayError("--tls-cert and --tls-key belong together", "one of them is missing")
    if options.tls_cert is None:
        return None
    try:
        cert, key = options.tls_cert.read_bytes(), options.tls_key.read_bytes()
    except OSError as e:
        raise RelayError(
            f"{e.filename} cannot be read: {e.strerror}", "--tls-cert and --tls-key name PEM files"
        ) from None
    if b"-----BEGIN CERTIFICATE" not in cert or b"PRIVATE KEY-----" not in key:
        raise RelayError("--tls-cert or --tls-key is not PEM", "the two were swapped, or another format")
    return grpc.ssl_server_credentials([(key, cert)])


def _check_plaintext(host: str, tls: bool, insecure: bool, name: str) -> None:
    if not (tls or insecure or is_loopback(host)):
        raise RelayError(
            f"{name} {host} is not loopback, and without TLS everybody on the way can read along", "",
            "--tls-cert FILE --tls-key FILE, or --insecure to do without",
        )  # fmt: skip


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parsed(cls, data: bytes):
    try:
        return cls.FromString(data)
    except DecodeError:
        raise Refusal("INVALID_ARGUMENT", "not_protobuf", f"the body is no {cls.DESCRIPTOR.name}") from None


def _size(log: Log) -> tuple[int, int, int]:
    try:
        return log.store.size()
    except StoreFailed:
        return (0, 0, 0)
