"""What a relay does, without the wire: check and append a batch, read beyond a cursor, wait for what is new."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cz_jax.swarm.envelope import KINDS, RUN, Opened, Rejected, open_envelope
from cz_jax.swarm.quota import Quota
from cz_jax.swarm.relay_pb2 import Entry, Envelope, FetchReply, FetchRequest, PublishReply, PublishRequest
from cz_jax.swarm.store import Bounds, Conflict, Item, Store, StoreFailed
from cz_jax.swarm.writer import Busy, Writer

READERS = 2  # threads that verify and read


@dataclass(frozen=True)
class Limits:
    """What one relay grants. Bytes, seconds and counts; the defaults serve some dozens of peers on a small machine."""

    message_bytes: int = 4 << 20  # of one call
    batch: int = 64  # envelopes in one publish
    fetch: int = 256  # entries in one reply
    reply_bytes: int = 1 << 20  # of envelopes in one reply
    sample_window: int = 4096  # newest entries that a sample is drawn from
    wait_ms: int = 30_000
    metadata_bytes: int = 8 << 10
    connections: int = 4096
    streams: int = 64  # calls at once on one connection
    calls: int = 4096
    peer_rate: float = 500.0  # envelopes a second of one peer
    peer_bytes_rate: float = 4 << 20
    queue: int = 8192  # envelopes that wait to be written
    queue_bytes: int = 64 << 20
    retain_seconds: float = 86_400.0
    retain_bytes: int = 8 << 30
    skew_seconds: float = 600.0  # by which a peer's clock may be ahead


class Refusal(Exception):
    """A call that is not served. `code`: the name of a gRPC status; `reason`: a short stable code; `bounds`: the log's,
    where a cursor is outside of them."""

    def __init__(self, code: str, reason: str, detail: str, bounds: Bounds | None = None):
        self.code, self.reason, self.detail, self.bounds = code, reason, detail, bounds
        super().__init__(f"{reason}: {detail}")


class Log:
    """The relay's calls. Made and used in one event loop; `store` is read from threads and written to by `writer`.

    `allow`: peer ids that may publish; None: any. `appended()` is called after a commit, in another
    thread.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits,
        allow: frozenset[str] | None = None,
        failed: Callable[[str], None] = lambda text: None,
        wall: Callable[[], float] = time.time,
        appended: Callable[[], None] = lambda: None,
    ):
        self.store, self.limits = store, limits
        self._allow, self._wall, self._appended = allow, wall, appended
        self._loop = asyncio.get_running_loop()
        self._quota = Quota(limits.peer_rate, limits.peer_bytes_rate)
        self._threads = ThreadPoolExecutor(READERS, "relay reader")
        self._versions: Counter[tuple[str, str]] = Counter()  # commits seen by (run, kind)
        self._waiting: dict[tuple[str, str], set[asyncio.Future]] = {}
        self._reading: dict[tuple, asyncio.Future] = {}
        self.draining = False
        self.writer = Writer(
            store, self._committed, failed, limits.queue, limits.queue_bytes,
            int(limits.retain_seconds * 1000), limits.retain_bytes,
        )  # fmt: skip
        self.writer.start()
        store.follow(self._committed)

    @property
    def waiting(self) -> int:
        """Readers that wait for something new."""
        return sum(map(len, list(self._waiting.values())))  # a copy: other threads ask too

    def drain(self) -> None:
        """From here on nothing is taken, and nobody waits: long polls answer with what there is."""
        self.draining = True
        self._wake(list(self._waiting))

    def close(self, timeout: float) -> bool:
        """Writes what was taken; whether that was done within `timeout` seconds."""
        whole = self.writer.stop(timeout)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        return whole

    async def publish(self, request: PublishRequest) -> PublishReply:
        """Refusal with nothing kept, or the sequences of a batch that is on disk. Being cancelled changes neither."""
        if self.draining:
            raise Refusal("UNAVAILABLE", "draining", "this relay is shutting down; try again later")
        if not 1 <= len(request.envelopes) <= self.limits.batch:
            raise _bad("batch_size", f"{len(request.envelopes)} envelopes, from 1 to {self.limits.batch} are allowed")
        for key in {bytes(e.public_key) for e in request.envelopes}:
            if not self._quota.left(key):  # before any signature is checked
                raise self._over_quota()
        items = await self._loop.run_in_executor(self._threads, self._open, request)
        self._charge(request.envelopes)
        try:
            future = asyncio.wrap_future(self.writer.submit(request.run, items))
            results = await asyncio.shield(future)
        except Busy:
            raise Refusal("RESOURCE_EXHAUSTED", "busy", "too much waits to be written; try again later") from None
        except Conflict as e:
            code = "RESOURCE_EXHAUSTED" if e.reason == "too_many_runs" else "FAILED_PRECONDITION"
            raise Refusal(code, e.reason, e.detail) from None
        except StoreFailed as e:
            raise Refusal("UNAVAILABLE", "store", f"nothing is acknowledged: {e}") from None
        return PublishReply(sequences=[r.sequence for r in results], duplicates=[r.duplicate for r in results])

    async def fetch(self, request: FetchRequest) -> FetchReply:
        """What is beyond the reader's cursor, waited for up to `wait_ms`. Refusal where the cursor is outside."""
        self._check_fetch(request)
        key, deadline = (request.run, request.kind), self._loop.time() + request.wait_ms / 1000
        after = request.after
        while True:
            version = self._versions[key] if key in self._versions else 0
            reply = await self._read(request, after, version)
            left = deadline - self._loop.time()
            if reply.entries or left <= 0 or self.draining:
                return reply
            if reply.next == after and version == self._versions.get(key, 0):
                await self._next_commit(key, left)
            after = reply.next

    def _open(self, request: PublishRequest) -> list[Item]:
        """The batch, every envelope of it checked."""
        items = []
        now = self._wall()
        for i, envelope in enumerate(request.envelopes):
            envelope.DiscardUnknownFields()
            try:
                opened = open_envelope(envelope, request.run)
            except Rejected as e:
                code = "UNAUTHENTICATED" if e.reason in ("public_key", "signature") else "INVALID_ARGUMENT"
                raise Refusal(code, e.reason, f"envelopes[{i}]: {e.detail}") from None
            self._check_peer(opened, i, now)
            items.append(Item(opened.kind, opened.peer, opened.number, opened.hash, envelope.SerializeToString()))
        return items

    def _check_peer(self, opened: Opened, i: int, now: float) -> None:
        if self._allow is not None and opened.peer not in self._allow:
            raise Refusal("PERMISSION_DENIED", "not_allowed", f"envelopes[{i}]: peer {opened.peer} is not on the list")
        skew = self.limits.skew_seconds
        if not now - self.limits.retain_seconds + skew < opened.time_ms / 1000 < now + skew:
            raise _bad("time", f"envelopes[{i}].time_ms is {opened.time_ms / 1000 - now:+.0f} s off this relay's clock")

    def _charge(self, envelopes: Sequence[Envelope]) -> None:
        costs: dict[bytes, list[int]] = {}
        for e in envelopes:
            costs.setdefault(bytes(e.public_key), []).append(e.ByteSize())
        for key, sizes in costs.items():
            if not self._quota.take(key, len(sizes), sum(sizes)):
                raise self._over_quota()

    def _over_quota(self) -> Refusal:
        rate, size = self.limits.peer_rate, self.limits.peer_bytes_rate
        return Refusal("RESOURCE_EXHAUSTED", "quota", f"a peer may publish {rate:g} messages, {size:g} bytes a second")

    def _check_fetch(self, r: FetchRequest) -> None:
        if not RUN.fullmatch(r.run):
            raise _bad("run_name", "run is 1 to 64 letters, digits, dots, dashes or underscores")
        if r.kind not in KINDS:
            raise _bad("kind", f"kind is one of {', '.join(KINDS)}")
        if r.after < 0:
            raise _bad("after", "after is the last sequence seen, 0 for none")
        if not 1 <= r.limit <= self.limits.fetch:
            raise _bad("limit", f"limit is from 1 to {self.limits.fetch}")
        if not 0 <= r.wait_ms <= self.limits.wait_ms:
            raise _bad("wait_ms", f"wait_ms is from 0 to {self.limits.wait_ms}")
        if r.HasField("sample") and not 1 <= r.sample.per_peer <= self.limits.fetch:
            raise _bad("per_peer", f"sample.per_peer is from 1 to {self.limits.fetch}")

    async def _read(self, request: FetchRequest, after: int, version: int) -> FetchReply:
        """One look. Readers that ask for the same at the same time share it."""
        r = request
        sample = (r.sample.seed, r.sample.per_peer, r.sample.except_peer) if r.HasField("sample") else None
        key = (r.run, r.kind, after, r.limit, sample, version)
        reading = self._reading.get(key)
        if reading is None:
            reading = self._loop.run_in_executor(self._threads, self._look, *key[:-1])
            self._reading[key] = reading
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        try:
            return await asyncio.shield(reading)
        except StoreFailed as e:
            raise Refusal("DATA_LOSS", "store", f"the log cannot be read: {e}") from None

    def _look(self, run: str, kind: str, after: int, limit: int, sample: tuple | None) -> FetchReply:
        bounds = self.store.bounds(run)
        if after + 1 < bounds.floor:
            raise Refusal("OUT_OF_RANGE", "below_floor", f"the log begins at {bounds.floor}, after is {after}", bounds)
        if after > bounds.head:
            raise Refusal("OUT_OF_RANGE", "beyond_head", f"the log ends at {bounds.head}, after is {after}", bounds)
        reply = FetchReply(floor=bounds.floor, head=bounds.head)
        if sample is None:
            found, last = self.store.page(run, kind, after, limit, self.limits.reply_bytes)
            reply.next = last if last > after else bounds.head
        else:
            found = self._draw(run, kind, after, limit, sample, reply)
            reply.next = max(bounds.head, reply.sampled_to)
        reply.entries.extend(Entry(sequence=s.sequence, received_ms=s.received_ms, envelope=s.envelope) for s in found)
        reply.head = max(reply.head, reply.next)
        return reply

    def _draw(self, run: str, kind: str, after: int, limit: int, sample: tuple, reply: FetchReply):
        seed, per_peer, except_peer = sample
        rows = self.store.scan(run, kind, after, self.limits.sample_window)
        if rows:
            reply.seed, reply.sampled_from, reply.sampled_to = seed, rows[0][0], rows[-1][0]
        chosen = draw([row for row in rows if row[1] != except_peer], limit, per_peer, seed)
        found, total = [], 0
        for stored in self.store.read(run, chosen):
            total += len(stored.envelope)
            if found and total > self.limits.message_bytes // 2:
                break
            found.append(stored)
        return found

    def _committed(self, keys: Iterable[tuple[str, str]]) -> None:
        """Called by the writer's thread, and by that of a store which other relays append to."""
        self._appended()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake, keys)

    def _wake(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in keys:
            self._versions[key] += 1
            for future in self._waiting.pop(key, ()):
                if not future.done():
                    future.set_result(None)

    async def _next_commit(self, key: tuple[str, str], seconds: float) -> None:
        future = self._loop.create_future()
        self._waiting.setdefault(key, set()).add(future)
        try:
            await asyncio.wait_for(future, seconds)
        except TimeoutError:
            pass
        finally:
            waiting = self._waiting.get(key, set())
            waiting.discard(future)
            if not waiting:
                self._waiting.pop(key, None)


def draw(rows: Sequence[tuple[int, str]], count: int, per_peer: int, seed: int) -> list[int]:
    """At most `count` sequences of `rows` (sequence, peer), at random by `seed`: one of each peer before a second of
    any, and at most `per_peer` of one. A peer that publishes more is not chosen more often."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    turns: Counter[str] = Counter()
    ranked = []
    for sequence, peer in shuffled:
        if turns[peer] < per_peer:
            ranked.append((turns[peer], len(ranked), sequence))
            turns[peer] += 1
    return sorted(sequence for _, _, sequence in sorted(ranked)[:count])


def _bad(reason: str, detail: str) -> Refusal:
    return Refusal("INVALID_ARGUMENT", reason, detail)
