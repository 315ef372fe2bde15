"""The relay over real gRPC on loopback: what it keeps, what hostile or careless input gets, how it ends."""

import asyncio
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cz_jax.swarm import relay as room
from cz_jax.swarm.envelope import MAX_PAYLOAD, content_hash, seal
from cz_jax.swarm.identity import ED25519_PUBLIC_PREFIX, new_identity
from cz_jax.swarm.log import Limits, draw
from cz_jax.swarm.quota import BURST_SECONDS, MAX_KEYS, Quota
from cz_jax.swarm.relay import Relay, RelayError, RelayOptions, RelayThread
from cz_jax.swarm.relay_pb2 import Envelope, FetchRequest, PublishRequest, Sample
from cz_jax.swarm.relay_pb2_grpc import RelayStub
from cz_jax.swarm.store import FILE, StoreError
from cz_jax.swarm.writer import Busy, SteadyClock, Writer

ROOT = Path(__file__).resolve().parents[1]
ME, OTHER = new_identity(), new_identity()
CODE = grpc.StatusCode


class Numbers:
    """Rising sequences for everybody."""

    def __init__(self):
        self._last, self._lock = time.time_ns() // 1000, threading.Lock()

    def __call__(self):
        with self._lock:
            self._last += 1
            return self._last


NUMBER = Numbers()


def now_ms():
    return int(time.time() * 1000)


def sealed(payload=None, who=ME, run="a", kind="group", number=None, at=None):
    number = NUMBER() if number is None else number
    payload = f"payload {number}".encode() if payload is None else payload
    return seal(who, run, kind, number, now_ms() if at is None else at, payload)


class Client:
    def __init__(self, address, options=(), credentials=None):
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, list(options))
        )
        self.stub = RelayStub(self.channel)

    def publish(self, *envelopes, run="a", **more):
        return self.stub.Publish(PublishRequest(run=run, envelopes=envelopes), timeout=30, **more)

    def fetch(self, after=0, run="a", kind="group", limit=100, wait=0, sample=None):
        request = FetchRequest(run=run, kind=kind, after=after, limit=limit, wait_ms=wait, sample=sample)
        return self.stub.Fetch(request, timeout=30)

    def payloads(self, **more):
        return [Envelope.FromString(e.envelope).payload for e in self.fetch(**more).entries]

    def health(self):
        stub = health_pb2_grpc.HealthStub(self.channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=room.SERVICE), timeout=10).status


class Running:
    """A relay in a thread, with a client and what it said."""

    def __init__(self, data=None, options=(), **settings):
        self.said = []
        limits = settings.pop("limits", Limits())
        chosen = RelayOptions("127.0.0.1:0", data, limits=limits, **settings)
        self._thread = RelayThread(chosen, lambda event, **fields: self.said.append((event, fields)))

    def __enter__(self):
        self._thread.__enter__()
        self.address, self.relay = self._thread.address, self._thread.relay
        self.client = Client(self.address)
        return self

    def __exit__(self, *exc):
        self.client.channel.close()
        self._thread.__exit__(*exc)


@pytest.fixture(scope="module")
def shared_relay(tmp_path_factory):
    with Running(tmp_path_factory.mktemp("relay") / "data") as running:
        yield running


@pytest.fixture
def client(shared_relay):
    return shared_relay.client


@pytest.fixture
def run(request):
    """A run of the test's own."""
    return re.sub("[^a-z0-9]", "", request.node.name.lower())[-50:]


def refused(code, reason):
    """The call ends with this status, and says this reason."""

    class Check:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            assert isinstance(error, grpc.RpcError), f"{reason}: not refused"
            assert error.code() is code, (error.code(), error.details())
            self.metadata = dict(error.trailing_metadata() or ())
            assert self.metadata.get("cz-reason") == reason, (self.metadata, error.details())
            assert "\n" not in error.details()
            return True

    return Check()


# ---- the ordinary case


def test_publish_and_fetch(client, run):
    envelopes = [sealed(b"one", run=run), sealed(b"task", run=run, kind="proposal"), sealed(b"two", run=run)]
    reply = client.publish(*envelopes, run=run)
    assert list(reply.sequences) == [1, 2, 3] and not any(reply.duplicates)
    got = client.fetch(run=run)
    assert [e.sequence for e in got.entries] == [1, 3] and (got.next, got.floor, got.head) == (3, 1, 3)
    assert Envelope.FromString(got.entries[0].envelope) == envelopes[0]
    assert abs(got.entries[0].received_ms - now_ms()) < 60_000
    assert client.payloads(run=run, kind="proposal") == [b"task"]
    assert client.fetch(run=run, after=3).entries == [] and client.fetch(run=run, after=1, limit=1).next == 3


def test_a_reader_owns_its_cursor(client, run):
    client.publish(*(sealed(run=run) for _ in range(10)), run=run)
    at, seen = 0, []
    while at < 10:
        page = client.fetch(run=run, after=at, limit=3)
        seen += [e.sequence for e in page.entries]
        at = page.next
    assert seen == list(range(1, 11)) and client.fetch(run=run, limit=100).next == 10


def test_long_poll_answers_when_something_comes(client, run):
    with ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        waiting = pool.submit(client.fetch, run=run, wait=20_000)
        time.sleep(0.2)
        client.publish(sealed(run=run, kind="proposal"), run=run)  # of the other kind
        time.sleep(0.2)
        assert not waiting.done()
        client.publish(sealed(b"x", run=run), run=run)
        assert [e.sequence for e in waiting.result(10).entries] == [2] and time.monotonic() - begun < 10


def test_long_poll_ends_at_its_deadline(client, run):
    begun = time.monotonic()
    reply = client.fetch(run=run, wait=300)
    assert reply.entries == [] and 0.25 < time.monotonic() - begun < 5


def test_a_sample_is_even_over_peers_and_repeatable(client, run):
    loud, quiet = new_identity(), new_identity()
    client.publish(*(sealed(who=loud, run=run) for _ in range(60)), run=run)
    client.publish(*(sealed(who=quiet, run=run) for _ in range(3)), *(sealed(run=run) for _ in range(3)), run=run)

    def peers(seed, limit=4, per_peer=2, leave_out=""):
        sample = Sample(seed=seed, per_peer=per_peer, except_peer=leave_out)
        reply = client.fetch(run=run, limit=limit, sample=sample)
        assert (reply.seed, reply.sampled_from, reply.sampled_to, reply.next) == (seed, 1, 66, 66)
        rows = [(e.sequence, Envelope.FromString(e.envelope).public_key) for e in reply.entries]
        return rows, Counter(key for _, key in rows)

    first, _ = peers(1)
    assert first == peers(1)[0] and first == sorted(first) and any(peers(s)[0] != first for s in range(2, 6))
    _, counts = peers(7, limit=6)
    assert set(counts.values()) == {2} and len(counts) == 3
    _, counts = peers(7, limit=256, per_peer=1, leave_out=ME.peer_id)
    assert counts == {loud.public_bytes: 1, quiet.public_bytes: 1}


def test_draw_is_uniform_within_a_peer_and_capped():
    rows = [(i, "a") for i in range(20)] + [(i, "b") for i in range(20, 24)]
    counts = Counter(s for seed in range(2000) for s in draw(rows, 2, 1, seed))
    assert all(60 < counts[i] < 145 for i in range(20)) and all(410 < counts[i] < 590 for i in range(20, 24))
    assert len(draw(rows, 100, 3, 1)) == 6 and draw([], 5, 5, 0) == [] and len(draw(rows, 1, 9, 0)) == 1


def test_health_and_no_reflection(shared_relay, client):
    assert client.health() == health_pb2.HealthCheckResponse.SERVING
    call = client.channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=10)
    assert caught.value.code() is CODE.UNIMPLEMENTED


# ---- BAD_INPUTS, relay: a line each


def test_empty_body(client, run):
    with refused(CODE.INVALID_ARGUMENT, "batch_size"):
        client.stub.Publish(PublishRequest(), timeout=10)
    with refused(CODE.INVALID_ARGUMENT, "run_name"):
        client.stub.Fetch(FetchRequest(), timeout=10)
    with refused(CODE.INVALID_ARGUMENT, "version"):
        client.publish(Envelope(), run=run)
    with refused(CODE.INVALID_ARGUMENT, "payload_size"):
        client.publish(sealed(b"", run=run), run=run)


def test_limit_and_limit_plus_one(client, run):
    client.publish(sealed(b"x" * MAX_PAYLOAD, run=run), run=run)
    with refused(CODE.INVALID_ARGUMENT, "payload_size"):
        client.publish(sealed(b"x" * (MAX_PAYLOAD + 1), run=run), run=run)
    most = Limits().batch
    client.publish(*(sealed(run=run) for _ in range(most)), run=run)
    with refused(CODE.INVALID_ARGUMENT, "batch_size"):
        client.publish(*(sealed(run=run) for _ in range(most + 1)), run=run)
    assert client.fetch(run=run, limit=1).head == 1 + most
    assert len(client.fetch(run=run, limit=256).entries) == 1 + most
    with refused(CODE.INVALID_ARGUMENT, "limit"):
        client.fetch(run=run, limit=257)


def test_a_call_larger_than_the_limit(client, run):
    size = Limits().message_bytes
    fitting = [sealed(b"x" * (MAX_PAYLOAD - 200) + bytes([i]), run=run) for i in range(15)]
    client.publish(*fitting, run=run)
    with pytest.raises(grpc.RpcError) as caught:
        client.publish(*(sealed(b"x" * MAX_PAYLOAD, run=run) for _ in range(size // MAX_PAYLOAD + 1)), run=run)
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert client.fetch(run=run, limit=1).head == 15
    at, count = 0, 0
    while at < 15:  # replies stay below their limit
        page = client.fetch(run=run, after=at, limit=256)
        assert page.ByteSize() <= Limits().reply_bytes + 10_000
        at, count = page.next, count + len(page.entries)
    assert count == 15


def test_the_same_message_a_thousand_times_in_parallel(tmp_path, run):
    with Running(tmp_path, limits=Limits(peer_rate=1e5, peer_bytes_rate=1e9)) as r:
        message = sealed(b"once", run=run)
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda _: r.client.publish(message, run=run), range(1000)))
        assert {tuple(reply.sequences) for reply in replies} == {(1,)}
        assert sum(not reply.duplicates[0] for reply in replies) == 1
        assert r.client.payloads(run=run) == [b"once"] and r.client.fetch(run=run).head == 1


def test_another_signer_has_its_own_entry(client, run):
    reply = client.publish(sealed(b"same", run=run), sealed(b"same", who=OTHER, run=run), run=run)
    assert list(reply.sequences) == [1, 2]
    again = client.publish(sealed(b"same", run=run), run=run)  # signed anew
    assert list(again.sequences) == [1] and list(again.duplicates) == [True]


def forged(change, **more):
    envelope = sealed(**more)
    change(envelope)
    return envelope


def flip(envelope):
    envelope.signature = bytes([envelope.signature[0] ^ 1]) + envelope.signature[1:]


@pytest.mark.parametrize(
    "change",
    [
        flip,
        lambda e: e.ClearField("signature"),
        lambda e: setattr(e, "signature", e.signature[:-1]),
        lambda e: setattr(e, "signature", e.signature + b"\0"),
        lambda e: setattr(e, "payload", e.payload + b" "),
        lambda e: setattr(e, "number", e.number + 1),
        lambda e: setattr(e, "time_ms", e.time_ms + 1),
        lambda e: setattr(e, "public_key", OTHER.public_bytes),
        lambda e: setattr(e, "kind", "proposal"),
    ],
    ids=["bad", "missing", "truncated", "longer", "payload", "number", "time", "other key", "other kind"],
)
def test_signatures(client, run, change):
    with refused(CODE.UNAUTHENTICATED, "signature"):
        client.publish(sealed(run=run), forged(change, run=run), run=run)
    assert client.fetch(run=run).head == 0


def test_keys(client, run):
    small = ED25519_PUBLIC_PREFIX + (1).to_bytes(32, "little")
    for key in (small, b"", b"x" * 36, ME.public_bytes[:-1], ME.public_bytes * 100):
        envelope = forged(lambda e, key=key: setattr(e, "public_key", key), run=run)
        envelope.signature = (1).to_bytes(32, "little") + bytes(32)
        with refused(CODE.UNAUTHENTICATED, "public_key"):
            client.publish(envelope, run=run)
    rsa = new_identity("rsa")
    assert list(client.publish(sealed(who=rsa, run=run), run=run).sequences) == [1]


def test_right_signature_for_another_run(client, run):
    with refused(CODE.INVALID_ARGUMENT, "other_run"):
        client.publish(sealed(run="other"), run=run)
    with refused(CODE.UNAUTHENTICATED, "signature"):
        client.publish(forged(lambda e: setattr(e, "run", run), run="other"), run=run)


def test_replays(client, run):
    first = sealed(b"first", run=run)
    client.publish(first, run=run)
    assert list(client.publish(first, run=run).duplicates) == [True]
    with refused(CODE.FAILED_PRECONDITION, "replay"):
        client.publish(sealed(b"other words", run=run, number=first.number), run=run)
    assert client.payloads(run=run) == [b"first"]


@pytest.mark.parametrize(
    "at, reason",
    [
        (1, "time"),
        (0, "time"),
        (-1, "time"),
        (-(1 << 63), "time"),
        (253_402_300_799_000, "time"),
        ((1 << 63) - 1, "time"),
    ],
)
def test_timestamps(client, run, at, reason):
    with refused(CODE.INVALID_ARGUMENT, reason):
        client.publish(sealed(run=run, at=at), run=run)


def test_clocks_that_are_a_little_off_are_taken(client, run):
    client.publish(sealed(run=run, at=now_ms() + 300_000), sealed(run=run, at=now_ms() - 3_600_000), run=run)
    with refused(CODE.INVALID_ARGUMENT, "time"):
        client.publish(sealed(run=run, at=now_ms() + 1_200_000), run=run)


def test_unknown_fields_are_ignored_and_not_kept(client, run):
    known = sealed(b"x", run=run)
    raw = known.SerializeToString() + b"\xfa\x06\x05extra"  # field 111
    assert client.publish(Envelope.FromString(raw), run=run).sequences == [1]
    assert client.fetch(run=run).entries[0].envelope == known.SerializeToString()


def test_a_newer_major_version(client, run):
    with refused(CODE.INVALID_ARGUMENT, "version"):
        client.publish(forged(lambda e: setattr(e, "version", 2), run=run), run=run)


def test_numbers(client, run):
    for number in (0, 1 << 63, (1 << 64) - 1):
        with refused(CODE.INVALID_ARGUMENT, "number"):
            client.publish(sealed(run=run, number=number), run=run)


def test_random_bytes_and_deep_nesting(client, run):
    raw = client.channel.unary_unary("/cz.relay.v1.Relay/Publish")
    rng = random.Random(5)
    good = PublishRequest(run=run, envelopes=[sealed(run=run)]).SerializeToString()
    for i in range(200):
        data = bytearray(good) if i % 2 else bytearray(rng.randbytes(rng.randrange(1, 300)))
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)  # another byte in any case
        with pytest.raises(grpc.RpcError) as caught:
            raw(bytes(data), timeout=10)
        assert caught.value.code() in (CODE.INVALID_ARGUMENT, CODE.UNAUTHENTICATED)
    deep = b""
    for _ in range(2000):  # groups within groups, as an unknown field
        deep = b"\xfb\x06" + deep + b"\xfc\x06"
    with refused(CODE.INVALID_ARGUMENT, "not_protobuf"):
        raw(deep, timeout=10)
    assert client.fetch(run=run).head == 0 and client.health() == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("name", ["", "a\0b", "../up", "a/b", ".", "x" * 65, "ünï", "a b", "a\n"])
def test_names(client, name):
    with refused(CODE.INVALID_ARGUMENT, "run_name"):
        client.publish(sealed(run=name), run=name)
    with refused(CODE.INVALID_ARGUMENT, "run_name"):
        client.fetch(run=name)


def test_kinds(client, run):
    for kind in ("", "verdict", "group\0", "../group"):
        with refused(CODE.INVALID_ARGUMENT, "kind"):
            client.publish(sealed(run=run, kind=kind), run=run)
        with refused(CODE.INVALID_ARGUMENT, "kind"):
            client.fetch(run=run, kind=kind)


def test_cursors(client, run):
    client.publish(*(sealed(run=run) for _ in range(3)), run=run)
    with refused(CODE.INVALID_ARGUMENT, "after"):
        client.fetch(run=run, after=-1)
    assert len(client.fetch(run=run, after=0).entries) == 3 and client.fetch(run=run, after=3).next == 3
    for beyond in (4, 1 << 31, (1 << 63) - 1):
        with refused(CODE.OUT_OF_RANGE, "beyond_head") as told:
            client.fetch(run=run, after=beyond)
        assert (told.metadata["cz-floor"], told.metadata["cz-head"]) == ("1", "3")
    for name, value in (("limit", 0), ("limit", -1), ("limit", 1 << 31), ("wait_ms", -1), ("wait_ms", 1 << 31)):
        request = FetchRequest(run=run, kind="group", after=0, limit=1)
        setattr(request, name, value)
        with refused(CODE.INVALID_ARGUMENT, name):
            client.stub.Fetch(request, timeout=10)
    with refused(CODE.INVALID_ARGUMENT, "per_peer"):
        client.fetch(run=run, sample=Sample(seed=1, per_peer=0))


def test_retention_and_a_cursor_below_the_floor(tmp_path, run, monkeypatch):
    monkeypatch.setattr("cz_jax.swarm.writer.PRUNE_SECONDS", 0.1)
    with Running(tmp_path, limits=Limits(retain_bytes=2000)) as r:
        for _ in range(10):
            r.client.publish(sealed(os.urandom(500), run=run), run=run)
        until = time.monotonic() + 20
        while r.relay.log.store.size()[2] > 2000 and time.monotonic() < until:
            time.sleep(0.05)
        floor = r.client.fetch(run=run, after=10).floor
        assert 1 < floor <= 10 and r.relay.log.store.size()[2] <= 2000
        for sample in (None, Sample(seed=1, per_peer=1)):
            with refused(CODE.OUT_OF_RANGE, "below_floor") as told:
                r.client.fetch(run=run, after=0, sample=sample)
            assert (told.metadata["cz-floor"], told.metadata["cz-head"]) == (str(floor), "10")
        assert [e.sequence for e in r.client.fetch(run=run, after=floor - 1).entries] == list(range(floor, 11))


def test_a_thousand_idle_connections(client, shared_relay, run):
    host, port = shared_relay.address.split(":")
    idle, files = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, files[1]) if files[1] > 0 else 8192, files[1]))
    try:
        for _ in range(1000):
            idle.append(socket.create_connection((host, int(port)), timeout=10))
        assert client.publish(sealed(run=run), run=run).sequences == [1]
        fresh = Client(shared_relay.address, [("grpc.use_local_subchannel_pool", 1)])
        assert len(fresh.fetch(run=run).entries) == 1
        fresh.channel.close()
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


def test_idle_readers_cost_little_and_all_wake(client, shared_relay, run):
    async def readers():
        async with grpc.aio.insecure_channel(shared_relay.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = RelayStub(channel)
            request = FetchRequest(run=run, kind="group", after=0, limit=5, wait_ms=25_000)
            calls = [asyncio.ensure_future(stub.Fetch(request, timeout=30)) for _ in range(60)]
            while shared_relay.relay.log.waiting < 60:
                await asyncio.sleep(0.02)
            await asyncio.to_thread(client.publish, sealed(b"x", run=run), run=run)
            return await asyncio.gather(*calls)

    assert {len(reply.entries) for reply in asyncio.run(asyncio.wait_for(readers(), 60))} == {1}
    assert shared_relay.relay.log.waiting == 0


def test_connections_are_limited(tmp_path, run):
    with Running(tmp_path, limits=Limits(connections=3)) as r:
        host, port = r.address.split(":")
        assert r.client.publish(sealed(run=run), run=run).sequences == [1]
        idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(3)]
        late = Client(r.address, [("grpc.use_local_subchannel_pool", 1)])
        with pytest.raises(grpc.RpcError):
            late.stub.Fetch(FetchRequest(run=run, kind="group", limit=1), timeout=1)
        assert len(r.client.fetch(run=run).entries) == 1  # who is there is served
        for connection in idle:
            connection.close()
        grpc.channel_ready_future(late.channel).result(20)
        assert len(late.fetch(run=run).entries) == 1
        late.channel.close()


NEVER_READS = """
import grpc, os, signal, sys
from cz_jax.swarm.relay_pb2 import FetchRequest
from cz_jax.swarm.relay_pb2_grpc import RelayStub
stub = RelayStub(grpc.insecure_channel(sys.argv[1]))
calls = [stub.Fetch.future(FetchRequest(run=sys.argv[2], kind="group", limit=256), timeout=30) for _ in range(40)]
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_client_that_never_reads(client, shared_relay, run):
    client.publish(*(sealed(os.urandom(100_000), run=run) for _ in range(10)), run=run)
    process = subprocess.Popen(
        [sys.executable, "-c", NEVER_READS, shared_relay.address, run], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "asked\n"
        for _ in range(5):
            begun = time.monotonic()
            assert len(client.fetch(run=run, limit=3).entries) == 3
            client.publish(sealed(run=run), run=run)
            assert time.monotonic() - begun < 5
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_cancelled_in_mid_commit_is_whole_or_absent(tmp_path, run):
    with Running(tmp_path) as r:
        store, entered, go = r.relay.log.store, threading.Event(), threading.Event()
        append = store.append

        def slow(batches, now):
            entered.set()
            go.wait(20)
            return append(batches, now)

        store.append = slow
        call = r.client.stub.Publish.future(
            PublishRequest(run=run, envelopes=[sealed(f"{i}".encode(), run=run) for i in range(5)]), timeout=20
        )
        assert entered.wait(20)
        call.cancel()
        go.set()
        store.append = append
        assert r.client.publish(sealed(b"after", run=run), run=run).sequences == [6]
        assert r.client.payloads(run=run) == [b"0", b"1", b"2", b"3", b"4", b"after"]


def test_two_relays_on_one_folder(tmp_path):
    with Running(tmp_path) as r:
        with pytest.raises(StoreError, match="in use by another relay"):
            Running(tmp_path).__enter__()
        assert r.client.health() == health_pb2.HealthCheckResponse.SERVING


def test_port_in_use(tmp_path):
    with Running() as r:
        with pytest.raises(RelayError, match="cannot be listened on"):
            RelayThread(RelayOptions(r.address, tmp_path)).__enter__()
    with Running(tmp_path):  # the lock of the one that failed is free again
        pass


def test_disk_full_and_free_again(tmp_path, run):
    with Running(tmp_path) as r:
        r.client.publish(sealed(b"before", run=run), run=run)
        db = r.relay.log.store._writer
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count={pages + 2}")
        large = sealed(os.urandom(100_000), run=run)
        with refused(CODE.UNAVAILABLE, "store"):
            r.client.publish(sealed(run=run), large, run=run)
        assert r.client.payloads(run=run) == [b"before"]
        assert any(event == "store_failed" for event, _ in r.said)
        db.execute(f"PRAGMA max_page_count={1 << 20}")
        assert r.client.publish(large, run=run).sequences == [2]


def test_one_bit_flipped_in_the_store(tmp_path, run):
    words = [f"message {i} ".encode() * 30 for i in range(5)]
    with Running(tmp_path) as r:
        r.client.publish(*(sealed(w, run=run) for w in words), run=run)
    data = bytearray((tmp_path / FILE).read_bytes())
    data[data.index(words[2]) + 7] ^= 4
    (tmp_path / FILE).write_bytes(data)
    with Running(tmp_path) as r:
        reply = r.client.fetch(run=run)
        assert [e.sequence for e in reply.entries] == [1, 2, 4, 5] and reply.next == 5
        assert r.client.fetch(run=run, after=2, limit=1, wait=2000).entries[0].sequence == 4  # skipped, not waited for
        assert r.client.publish(sealed(run=run), run=run).sequences == [6] and r.relay.log.store.damaged >= 1


def test_clock_jumps(tmp_path, run, monkeypatch):
    with Running(tmp_path) as r:
        r.client.publish(sealed(b"before", run=run), run=run)
        for jump in (400 * 86_400, -400 * 86_400):
            monkeypatch.setattr(r.relay.log, "_wall", lambda jump=jump: time.time() + jump)
            with refused(CODE.INVALID_ARGUMENT, "time"):
                r.client.publish(sealed(run=run), run=run)
            assert r.client.payloads(run=run) == [b"before"]
        monkeypatch.setattr(r.relay.log, "_wall", time.time)
        assert r.client.publish(sealed(run=run), run=run).sequences == [2]
    clock = SteadyClock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock() > 1_600_000_000_000  # retention drops nothing on account of a jump


def certificate(folder):
    from datetime import UTC, datetime, timedelta

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    return folder / "cert.pem", folder / "key.pem"


def test_tls_and_a_plaintext_client(tmp_path, run):
    cert, key = certificate(tmp_path)
    with Running(tmp_path / "data", tls_cert=cert, tls_key=key) as r:
        with pytest.raises(grpc.RpcError) as caught:
            r.client.stub.Publish(PublishRequest(run=run, envelopes=[sealed(run=run)]), timeout=5)
        assert caught.value.code() in (CODE.UNAVAILABLE, CODE.DEADLINE_EXCEEDED)
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        port = r.address.rpartition(":")[2]
        secure = Client(f"127.0.0.1:{port}", [("grpc.ssl_target_name_override", "localhost")], credentials)
        assert secure.publish(sealed(run=run), run=run).sequences == [1]
        secure.channel.close()


@pytest.mark.parametrize("which", ["one missing", "no file", "swapped"])
def test_tls_files(tmp_path, which):
    cert, key = certificate(tmp_path)
    given = {"one missing": (cert, None), "no file": (cert, tmp_path / "no"), "swapped": (key, cert)}[which]
    with pytest.raises(RelayError):
        RelayThread(RelayOptions("127.0.0.1:0", tls_cert=given[0], tls_key=given[1])).__enter__()


def test_plaintext_only_on_loopback_unless_asked_for_by_name():
    with pytest.raises(RelayError, match="--insecure"):
        RelayThread(RelayOptions("0.0.0.0:0")).__enter__()
    with pytest.raises(RelayError, match="--insecure"):
        RelayThread(RelayOptions("127.0.0.1:0", metrics="0.0.0.0:0")).__enter__()
    with RelayThread(RelayOptions("0.0.0.0:0", insecure=True)):
        pass
    assert room.is_loopback("::1") and room.is_loopback("localhost") and not room.is_loopback("example.org")


@pytest.mark.parametrize(
    "address", ["", "7000", ":7000", "host:", "host:x", "host:-1", "host:70000", "host:٣", "a\nb:1"]
)
def test_addresses(address):
    with pytest.raises(RelayError, match="HOST:PORT"):
        room.split_address(address, "--listen")
    assert room.split_address("[::1]:5", "--listen") == ("::1", 5)


def test_a_gzip_bomb(client, run):
    bomb = [sealed(b"\0" * MAX_PAYLOAD, run=run)]
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            client.publish(*bomb, run=run, compression=grpc.Compression.Gzip)
        assert caught.value.code() is CODE.UNIMPLEMENTED
    assert client.fetch(run=run).head == 0 and client.publish(*bomb, run=run).sequences == [1]


def test_large_metadata(client, run):
    with pytest.raises(grpc.RpcError):
        client.stub.Fetch(FetchRequest(run=run, kind="group", limit=1), timeout=10, metadata=[("x", "y" * 100_000)])
    assert client.fetch(run=run).head == 0


def test_a_peer_over_its_quota_leaves_others_alone(tmp_path, run):
    with Running(tmp_path, limits=Limits(peer_rate=5)) as r:
        r.client.publish(*(sealed(run=run) for _ in range(20)), run=run)
        for _ in range(30):
            with refused(CODE.RESOURCE_EXHAUSTED, "quota"):
                r.client.publish(*(sealed(run=run) for _ in range(20)), run=run)
        assert r.client.publish(*(sealed(who=OTHER, run=run) for _ in range(10)), run=run).sequences[-1] == 30
        lines = [fields for event, fields in r.said if event == "refused"]
        assert 1 <= len(lines) < 20 and lines[0]["reason"] == "quota"  # one line stands for many


def test_nobody_uses_up_the_quota_of_another(tmp_path, run):
    with Running(tmp_path, limits=Limits(peer_rate=5)) as r:
        for _ in range(60):
            with refused(CODE.UNAUTHENTICATED, "signature"):
                r.client.publish(forged(flip, run=run), run=run)
        assert r.client.publish(sealed(run=run), run=run).sequences == [1]


def test_quota_refills_and_forgets():
    now = [0.0]
    quota = Quota(10, 1000, lambda: now[0])
    full = int(10 * BURST_SECONDS)
    assert quota.take(b"a", full, 1) and not quota.take(b"a", 1, 1) and not quota.left(b"a")
    now[0] = 0.5
    assert quota.left(b"a") and not quota.take(b"a", 6, 1) and quota.take(b"a", 5, 1)
    assert not quota.take(b"b", 1, 10**9) or quota.left(b"b") is False
    assert quota.take(b"c", 1, 4000) and not quota.take(b"c", 1, 1)
    for i in range(MAX_KEYS + 5):
        quota.take(str(i).encode(), 1, 1)
    assert len(quota._buckets) == MAX_KEYS and quota.left(b"a")


def test_back_pressure(tmp_path, run):
    with Running(tmp_path, limits=Limits(queue=10)) as r:
        store, go = r.relay.log.store, threading.Event()
        append = store.append
        store.append = lambda batches, now: (go.wait(20), append(batches, now))[1]
        first = r.client.stub.Publish.future(
            PublishRequest(run=run, envelopes=[sealed(run=run) for _ in range(8)]), timeout=20
        )
        until = time.monotonic() + 10
        while r.relay.log.writer.waiting < 8 and time.monotonic() < until:
            time.sleep(0.01)
        with refused(CODE.RESOURCE_EXHAUSTED, "busy"):
            r.client.publish(*(sealed(run=run) for _ in range(3)), run=run)
        go.set()
        assert list(first.result().sequences) == list(range(1, 9))
        assert r.client.publish(sealed(run=run), run=run).sequences == [9] and r.relay.log.writer.waiting == 0


def test_a_writer_that_was_stopped_takes_nothing(tmp_path):
    class Broken:
        def append(self, batches, now):
            raise ValueError("a defect")

        def prune(self, before, size):
            return 0

    told = []
    writer = Writer(Broken(), lambda keys: None, told.append, 10, 1 << 20, 1000, 1000)
    writer.start()
    with pytest.raises(Exception, match="a defect"):
        writer.submit("a", []).result(10)
    assert told and writer.stop(5)
    with pytest.raises(Busy):
        writer.submit("a", [])


def test_allow_list(tmp_path, run):
    (tmp_path / "allow").write_text(f"# ours\n{ME.peer_id}  # me\n\n")
    with Running(tmp_path / "data", allow=tmp_path / "allow") as r:
        assert r.client.publish(sealed(run=run), run=run).sequences == [1]
        with refused(CODE.PERMISSION_DENIED, "not_allowed"):
            r.client.publish(sealed(run=run), sealed(who=OTHER, run=run), run=run)
        assert r.client.fetch(run=run).head == 1
    for text in ("", "# nobody\n", "not a peer id", "\xff"):
        (tmp_path / "allow").write_bytes(text.encode("latin-1"))
        with pytest.raises(RelayError, match="--allow"):
            room.read_allow_list(tmp_path / "allow")
    with pytest.raises(RelayError, match="--allow"):
        room.read_allow_list(tmp_path / "absent")


def test_metrics(tmp_path, run):
    with Running(tmp_path, metrics="127.0.0.1:0") as r:
        r.client.publish(sealed(run=run), sealed(run=run), run=run)
        with refused(CODE.INVALID_ARGUMENT, "after"):
            r.client.fetch(run=run, after=-1)
        r.client.fetch(run=run)
        with urllib.request.urlopen(f"http://{r.relay.metrics_address}/metrics", timeout=10) as page:
            text = page.read().decode()
    for line in (
        'cz_relay_published_total{kind="group"} 2.0', "cz_relay_fetched_total 2.0", "cz_relay_entries 2.0",
        'cz_relay_refused_total{method="fetch",reason="after"} 1.0', "cz_relay_publish_seconds_count 1.0",
    ):  # fmt: skip
        assert line in text
    assert ME.peer_id not in text and "python_info" not in text  # a registry of its own


def test_memory_relay(run):
    with Running() as r:
        assert r.client.publish(sealed(b"x", run=run), run=run).sequences == [1]
        assert r.client.payloads(run=run) == [b"x"]


def test_draining_answers_who_waits_and_finishes_what_came(tmp_path, run):
    with Running(tmp_path) as r:
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(r.client.fetch, run=run, wait=30_000)
            while not r.relay.log.waiting:
                time.sleep(0.01)
            begun = time.monotonic()
            r._thread._loop.call_soon_threadsafe(r._thread._stop.set)
            assert waiting.result(10).entries == []
            r._thread._thread.join(10)
            assert time.monotonic() - begun < 8
    assert [e for e, _ in r.said][-2:] == ["draining", "stopped"] and r.said[-1][1]["whole"]


def test_a_relay_that_cannot_start_leaves_nothing_running(tmp_path):
    before = {t for t in threading.enumerate() if t.name == "relay writer"}

    async def start():
        with pytest.raises(RelayError):
            await Relay(RelayOptions("127.0.0.1:0", tmp_path, metrics="127.0.0.1"), lambda *a, **k: None).start()

    asyncio.run(start())
    assert {t for t in threading.enumerate() if t.name == "relay writer"} <= before
    with Running(tmp_path):
        pass


# ---- the command, its end, and being killed


class Child:
    """`cz-jax relay` in a process of its own."""

    def __init__(self, data, *more):
        call = [sys.executable, "-c", "import sys; from cz_jax.cli.main import main; sys.exit(main())", "relay"]
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [*call, "--listen", "127.0.0.1:0", "--data", str(data), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        line = self.process.stderr.readline()
        assert line, self.process.wait(10)
        self.serving = json.loads(line)
        self.address = self.serving["address"]

    def end(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


def load(address, run, stop, acknowledged, who, lock):
    """Publishes until `stop`; keeps (content hash -> sequence) of what was acknowledged."""
    client = Client(address, [("grpc.use_local_subchannel_pool", 1)])
    while not stop.is_set():
        batch = [sealed(os.urandom(200), who=who, run=run) for _ in range(4)]
        try:
            reply = client.stub.Publish(PublishRequest(run=run, envelopes=batch), timeout=5)
        except grpc.RpcError:
            break
        with lock:
            acknowledged.update({content_hash(e): s for e, s in zip(batch, reply.sequences, strict=True)})
    client.channel.close()


def everything(client, run):
    found, at = {}, 0
    while True:
        page = client.fetch(run=run, after=at, limit=256)
        for entry in page.entries:
            key = content_hash(Envelope.FromString(entry.envelope))
            assert key not in found, "a message stands there twice"
            found[key] = entry.sequence
        at = page.next
        if at >= page.head:
            assert sorted(found.values()) == list(range(page.floor, page.head + 1))
            return found


def test_sigterm_under_load(tmp_path):
    child, stop, acknowledged, lock = Child(tmp_path), threading.Event(), {}, threading.Lock()
    publishers = [
        threading.Thread(target=load, args=(child.address, "a", stop, acknowledged, new_identity(), lock))
        for _ in range(3)
    ]
    for p in publishers:
        p.start()
    time.sleep(0.5)
    begun = time.monotonic()
    status, out, err = child.end(signal.SIGTERM)
    assert status == 0 and time.monotonic() - begun < 10
    stop.set()
    for p in publishers:
        p.join(20)
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert "draining" in events and events[-1] == "stopped" and "whole" in out
    with Running(tmp_path) as r:
        found = everything(r.client, "a")
    assert acknowledged and acknowledged.items() <= found.items()


def test_killed_at_random_moments_under_load(tmp_path):
    rng, acknowledged, lock = random.Random(11), {}, threading.Lock()
    who = [new_identity() for _ in range(3)]
    starts = []
    for _ in range(10):
        child, stop = Child(tmp_path), threading.Event()
        client = Client(child.address)
        assert client.health() == health_pb2.HealthCheckResponse.SERVING
        client.channel.close()
        starts.append(time.monotonic() - child.begun)
        publishers = [
            threading.Thread(target=load, args=(child.address, "a", stop, acknowledged, w, lock)) for w in who
        ]
        for p in publishers:
            p.start()
        time.sleep(rng.uniform(0.02, 0.35))
        child.process.kill()
        child.process.communicate()
        stop.set()
        for p in publishers:
            p.join(20)
    with Running(tmp_path) as r:
        found = everything(r.client, "a")
    assert len(acknowledged) > 20 and acknowledged.items() <= found.items()
    assert sorted(starts)[4] < 2.0 * slowness(), starts


def slowness():
    """How much slower than at rest this machine starts a Python process now; at least 1."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import grpc, cryptography, prometheus_client"], check=True, timeout=60)
    return max(1.0, (time.monotonic() - begun) / 0.3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--listen", "nowhere", "--data", "d"], "HOST:PORT"),
        (["--listen", "0.0.0.0:0", "--data", "d"], "--insecure"),
        (["--listen", "127.0.0.1:0"], "--data"),
        (["--listen", "127.0.0.1:0", "--data", "/dev/null/x"], "cannot be used"),
        (["--listen", "127.0.0.1:0", "--data", "d", "--allow", "no"], "--allow"),
        (["--listen", "127.0.0.1:0", "--data", "d", "--retain-hours", "nan"], "--retain-hours"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    from cz_jax.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["relay", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_log_that_nobody_reads_stops_no_relay():
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    room.JsonLines(Closed())("serving", address="x")


# ---- generated code


def test_generated_code_is_that_of_the_proto_file(tmp_path):
    proto = Path("cz_jax/swarm/relay.proto")
    (tmp_path / proto.parent).mkdir(parents=True)
    shutil.copy(ROOT / proto, tmp_path / proto)
    call = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "--python_out=.", "--grpc_python_out=.", str(proto)]
    subprocess.run(call, cwd=tmp_path, check=True, timeout=60)
    for name in ("relay_pb2.py", "relay_pb2_grpc.py"):
        made, kept = (folder / proto.parent / name for folder in (tmp_path, ROOT))
        assert made.read_text() == kept.read_text(), f"{name} is stale: see the head of relay.proto"
