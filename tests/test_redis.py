"""Relays that share a Redis: one log, whoever is asked; what was acknowledged outlives the server's death."""

import json
import os
import random
import sys
import threading
import time
import types

import grpc
import pytest
from conftest import MAY_SKIP, may_skip
from redis_server import SAFE, RedisServer

from cz_jax.cli.main import main
from cz_jax.swarm import redis_store as room
from cz_jax.swarm.envelope import GROUP, content_hash, seal
from cz_jax.swarm.identity import new_identity
from cz_jax.swarm.relay import RelayError, RelayOptions, RelayThread, open_store
from cz_jax.swarm.relay_pb2 import Envelope, FetchRequest, PublishRequest
from cz_jax.swarm.relay_pb2_grpc import RelayStub
from cz_jax.swarm.store import StoreError, StoreFailed

SECRET = "hunter2-Sesame"


@pytest.fixture(scope="module")
def server(redis_program, tmp_path_factory):
    with RedisServer(redis_program, tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def url(server):
    """Of an empty database."""
    with server.client() as client:
        client.flushdb()
    return server.url()


class Side:
    """A relay on `url`, and a client of it."""

    def __init__(self, url, **more):
        self.said = []
        options = RelayOptions("127.0.0.1:0", url, **more)
        self._thread = RelayThread(options, lambda event, **fields: self.said.append((event, fields)))

    def __enter__(self):
        self._thread.__enter__()
        self.relay = self._thread.relay
        self._channel = grpc.insecure_channel(self._thread.address)
        self.stub = RelayStub(self._channel)
        return self

    def __exit__(self, *exc):
        self._channel.close()
        self._thread.__exit__(*exc)

    def publish(self, *envelopes, timeout=20):
        return self.stub.Publish(PublishRequest(run="a", envelopes=envelopes), timeout=timeout)

    def fetch(self, after=0, limit=256, wait=0):
        return self.stub.Fetch(FetchRequest(run="a", kind=GROUP, after=after, limit=limit, wait_ms=wait), timeout=40)

    def everything(self):
        """Content hash -> sequence of the whole log, which stands there once each and without a gap."""
        found, at, head = {}, 0, 1
        while at < head:
            page = self.fetch(at)
            for entry in page.entries:
                key = content_hash(Envelope.FromString(entry.envelope))
                assert key not in found, "a message stands there twice"
                found[key] = entry.sequence
            at, head = page.next, page.head
        assert sorted(found.values()) == list(range(1, head + 1))
        return found


class Peer:
    """Seals messages that nobody sealed before."""

    def __init__(self):
        self.me, self._number = new_identity(), time.time_ns() // 1000

    def __call__(self, payload=None):
        self._number += 1
        payload = os.urandom(100) if payload is None else payload
        return seal(self.me, "a", GROUP, self._number, int(time.time() * 1000), payload)


def publish_until(stop, sides, acknowledged, lock, rng):
    """Publishes through either relay until `stop`; what was not acknowledged is sent again as it is, maybe through the
    other one."""
    peer, pending = Peer(), None
    while not stop.is_set() or pending:
        pending = pending or [peer() for _ in range(rng.randrange(1, 6))]
        try:
            reply = rng.choice(sides).publish(*pending, timeout=8)
        except grpc.RpcError as e:
            assert e.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), e
            time.sleep(0.05)
            continue
        with lock:
            acknowledged.update({content_hash(e): s for e, s in zip(pending, reply.sequences, strict=True)})
        pending = None


def load(sides, count=4):
    """Publishers in threads; `end()` waits for all that they hold to be acknowledged."""
    stop, acknowledged, lock = threading.Event(), {}, threading.Lock()
    threads = [
        threading.Thread(target=publish_until, args=(stop, sides, acknowledged, lock, random.Random(i)))
        for i in range(count)
    ]
    for thread in threads:
        thread.start()

    def end():
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return acknowledged

    return end


def test_two_relays_make_one_dense_log(url):
    with Side(url) as a, Side(url) as b:
        end = load([a, b])
        time.sleep(1.0)
        acknowledged = end()
        assert len(acknowledged) > 20 and a.everything() == b.everything() == acknowledged


def test_no_acknowledged_message_is_lost_or_doubled_when_the_server_is_killed(server, url):
    with Side(url) as a, Side(url) as b:
        end, rng = load([a, b]), random.Random(3)
        for _ in range(4):
            time.sleep(rng.uniform(0.2, 0.6))
            server.kill()
            server.start()
        time.sleep(0.3)
        acknowledged = end()
        found = a.everything()
        assert found == b.everything() and found == acknowledged and len(found) > 20
    with Side(url) as again:
        assert again.everything() == acknowledged


def test_the_same_message_to_both_relays_is_kept_once(url):
    with Side(url) as a, Side(url) as b:
        message, other = Peer()(), Peer()()
        assert list(a.publish(message).duplicates) == [False]
        reply = b.publish(message, other)
        assert (list(reply.sequences), list(reply.duplicates)) == ([1, 2], [True, False])


def test_a_reader_at_one_relay_wakes_for_what_came_to_the_other(url):
    with Side(url) as a, Side(url) as b:
        time.sleep(0.3)
        waiting = b.stub.Fetch.future(FetchRequest(run="a", kind=GROUP, limit=5, wait_ms=25_000), timeout=30)
        while not b.relay.log.waiting:
            time.sleep(0.01)
        begun = time.monotonic()
        a.publish(Peer()())
        assert len(waiting.result(20).entries) == 1 and time.monotonic() - begun < 5


def test_the_page_of_one_relay_shows_what_came_to_the_other(url):
    with Side(url) as a, Side(url, page="127.0.0.1:0") as b:
        watcher, peer = b.relay._watcher, Peer()
        end = time.monotonic() + 20
        while not watcher._told:
            assert time.monotonic() < end
            time.sleep(0.02)
        a.publish(peer(), peer(), peer())
        while watcher.tally.counts[GROUP] < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert [row["peer"] for row in watcher.tally.value(int(time.time() * 1000))["peers"]] == [peer.me.peer_id]


def test_a_server_that_is_away_is_said_and_waited_for(server, url):
    with Side(url) as a:
        message = Peer()()
        server.kill()
        try:
            with pytest.raises(grpc.RpcError) as caught:
                a.publish(message)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert dict(caught.value.trailing_metadata())["cz-reason"] == "store"
            assert "127.0.0.1" not in caught.value.details()
            with pytest.raises(grpc.RpcError) as caught:
                a.fetch()
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS
            assert any(event == "store_failed" for event, _ in a.said)
            with pytest.raises(StoreError, match="cannot be used"):
                open_store(url, False)
        finally:
            server.start()
        assert a.publish(message).sequences == [1] and len(a.fetch().entries) == 1


# ---- what is refused


@pytest.mark.parametrize(
    "options, told",
    [
        (("--appendonly", "no"), "appendonly no.*CONFIG SET appendonly yes"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync everysec.*CONFIG SET appendfsync always"),
        ((*SAFE, "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy allkeys-lru"),
    ],
)
def test_a_server_that_could_lose_something_is_refused(redis_program, tmp_path, options, told):
    with RedisServer(redis_program, tmp_path, options) as unsafe, pytest.raises(StoreError, match=told):
        open_store(unsafe.url(), False)


def test_a_server_that_comes_back_unsafe_is_not_written_to(redis_program, tmp_path):
    with RedisServer(redis_program, tmp_path) as server, Side(server.url()) as a:
        assert a.publish(Peer()()).sequences == [1]
        server.kill()
        server.restart_with("--appendonly", "yes", "--appendfsync", "everysec")
        with pytest.raises(grpc.RpcError) as caught:
            a.publish(Peer()())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "everysec" in caught.value.details()
        server.kill()
        server.restart_with(*SAFE)
        assert a.publish(Peer()()).sequences == [2]


def test_other_data_is_refused(url, server, monkeypatch):
    store, _ = open_store(url, False)
    monkeypatch.setattr(room, "LEAST_VERSION", (99, 0))
    with pytest.raises(StoreError, match="needs 99.0 or newer"):
        open_store(url, False)
    monkeypatch.undo()
    with server.client() as client:
        client.set("{cz-relay}:format", "77")
        with pytest.raises(StoreError, match="another version"):
            open_store(url, False)
        client.flushdb()
        client.sadd("{cz-relay}:runs", "a")
        client.hset("{cz-relay}:meta:a", mapping={"floor": 1, "head": 5, "bytes": 0})
        with pytest.raises(StoreError, match="run a should end at 5 and ends at 0"):
            open_store(url, False)
    store.close()


def test_a_damaged_entry_is_left_out(url, server):
    store, _ = open_store(url, False)
    with server.client() as client:
        client.sadd("{cz-relay}:runs", "a")
        for sequence, crc in ((1, 4_289_425_978), (2, 7), (3, 4_289_425_978)):
            client.xadd("{cz-relay}:log:a", {"t": 5, "c": crc, "e": b"hello, world"}, f"{sequence}-0")
            client.xadd("{cz-relay}:kind:a:group", {"p": "p", "n": "1", "t": 5, "h": "h", "s": 12}, f"{sequence}-0")
        client.hset("{cz-relay}:meta:a", mapping={"floor": 1, "head": 3, "bytes": 36})
    stored, last = store.page("a", GROUP, 0, 10, 1000)
    assert [s.sequence for s in stored] == [1, 3] and last == 3 and store.damaged == 1
    store.close()


def test_a_script_that_the_server_refuses_keeps_nothing(url, server):
    store, _ = open_store(url, False)
    with server.client() as client:
        client.set("{cz-relay}:hash:a", "no hash")
        with Side(url) as a:
            with pytest.raises(grpc.RpcError) as caught:
                a.publish(Peer()())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "WRONGTYPE" in caught.value.details()
        assert store.size() == (0, 0, 0) and not client.exists("{cz-relay}:log:a")
    with pytest.raises(StoreFailed, match="refuses"):
        store._done(store._client.execute_command, "NOSUCHCOMMAND")
    store.close()


@pytest.mark.parametrize(
    "address",
    [
        f"redis://user:{SECRET}@127.0.0.1:x/0",
        f"redis://user:{SECRET}/more@127.0.0.1/0",
        f"redis://user:{SECRET}#more@127.0.0.1/0",
        f"redis://user:{SECRET}@127.0.0.1:6379/zero",
        f"redis://user:{SECRET}@127.0.0.1:6379/0?password={SECRET}",
        f"redis://user:{SECRET}@:6379/0",
        f"redis://user:{SECRET}@[::1/0",
        f"valkey://user:{SECRET}@127.0.0.1/0",
        f"redis://user:{SECRET}@redis.example.org/0",
        f"redis://user:{SECRET}@127.0.0.1:1/0",
        f"rediss://user:{SECRET}@127.0.0.1:1/0",
        f"redis://user:{SECRET}@127.0.0.1:70000/0",
        f"REDIS://user:{SECRET}@127.0.0.1:1/0",
        f"redis:/user:{SECRET}@127.0.0.1/0",
        f"redis:{SECRET}",
    ],
)
def test_no_password_in_an_error(capfd, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["relay", "--listen", "127.0.0.1:0", "--data", address]) == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "redis" in err.lower() and SECRET not in out + err and "hunter2" not in out + err
    assert not list(tmp_path.iterdir())


def test_no_password_in_what_a_relay_says(redis_program, tmp_path):
    with RedisServer(redis_program, tmp_path, password=SECRET) as locked:
        wrong = locked.url().replace(SECRET, "mistaken")
        with pytest.raises(StoreError) as caught:
            open_store(wrong, False)
        assert "mistaken" not in str(caught.value) and "cannot be used" in str(caught.value)
        options = RelayOptions("127.0.0.1:0", locked.url())
        with Side(locked.url()) as a:
            assert a.publish(Peer()()).sequences == [1]
            locked.kill()
            with pytest.raises(grpc.RpcError) as caught:
                a.publish(Peer()())
            assert SECRET not in caught.value.details()
        said = json.dumps(a.said, default=str)
        assert locked.url().replace(f":{SECRET}@", "") in said and SECRET not in said + repr(options)
        assert SECRET not in repr(room.read_address(locked.url()))


def test_addresses():
    read = room.read_address
    assert read("redis://h") == room.Address("h", 6379, 0, False)
    assert read("rediss://u:p%40ss@[::1]:7000/3") == room.Address("::1", 7000, 3, True, "u", "p@ss")
    assert str(read("rediss://u:p%40ss@[::1]:7000/3")) == "rediss://u@[::1]:7000/3"
    assert read("redis://:secret@h:1/2") == room.Address("h", 1, 2, False, None, "secret")


def test_plaintext_beyond_loopback_is_asked_for_by_name():
    with pytest.raises(RelayError, match="rediss://HOST:PORT/DB, or --insecure"):
        open_store("redis://redis.example.org/0", False)
    with pytest.raises(RelayError, match="neither a folder"):
        open_store("http://127.0.0.1/0", True)


def test_without_the_package_it_is_one_clear_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "cz_jax.swarm.redis_store")
    assert main(["relay", "--listen", "127.0.0.1:0", "--data", "redis://127.0.0.1/0"]) == 2
    err = capfd.readouterr().err
    assert "pip install 'cz-jax[redis]'" in err and err.count("\n") == 1


def test_ci_goes_on_without_programs_that_no_package_of_ours_brings_and_without_nothing_else():
    def told(reason):
        return types.SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}"))

    assert all(may_skip(told(reason)) for reason in MAY_SKIP)
    assert not may_skip(told("torch is not installed")) and not may_skip(types.SimpleNamespace(longrepr="xfail"))
