"""One conformance suite for the relay's stores, and what only the one on disk has to withstand."""

import hashlib
import sqlite3
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_server import RedisServer

from cz_jax.swarm import store as room
from cz_jax.swarm.store import Appended, Bounds, Conflict, Item, MemoryStore, SqliteStore, StoreError, StoreFailed


def item(name, peer="p", number=None, kind="group", size=0):
    data = f"{name}".encode().ljust(size, b".")
    number = number if number is not None else name + 1 if isinstance(name, int) else 1 << 20
    return Item(kind, peer, number, hashlib.sha256(data + peer.encode()).digest(), data)


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request, tmp_path):
    if request.param == "redis":
        made = request.getfixturevalue("redis_server").empty_store()
    else:
        made = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "data")
    yield made
    made.close()


@pytest.fixture(scope="module")
def redis_server(redis_program, tmp_path_factory):
    with RedisServer(redis_program, tmp_path_factory.mktemp("redis")) as running:
        yield running


def append(store, *items, run="a", now=1000):
    return store.append([(run, items)], now)[0]


def sequences(store, run="a", kind="group", after=0, most=100, size=1 << 20):
    return [s.sequence for s in store.page(run, kind, after, most, size)[0]]


def test_an_unknown_run_is_empty(store):
    assert store.bounds("a") == Bounds(1, 0) and store.size() == (0, 0, 0) and store.runs() == []
    assert store.page("a", "group", 0, 10, 100) == ([], 0)
    assert store.scan("a", "group", 0, 10) == [] and store.read("a", [1]) == []


def test_sequences_are_dense_per_run_and_over_kinds(store):
    first = store.append([("a", [item(1), item(2, kind="proposal")]), ("b", [item(1)]), ("a", [item(3)])], 1000)
    assert [[a.sequence for a in result] for result in first] == [[1, 2], [1], [3]]
    assert store.bounds("a") == Bounds(1, 3) and store.bounds("b") == Bounds(1, 1)
    assert sequences(store) == [1, 3] and sequences(store, kind="proposal") == [2] and sequences(store, after=1) == [3]
    assert store.size() == (2, 4, 4) and store.runs() == [("a", Bounds(1, 3), 3), ("b", Bounds(1, 1), 1)]


def test_the_same_content_is_kept_once(store):
    assert append(store, item(1), item(2)) == [Appended(1, False), Appended(2, False)]
    assert append(store, item(2), item(3), item(3)) == [Appended(2, True), Appended(3, False), Appended(3, True)]
    assert append(store, item(1, peer="other")) == [Appended(4, False)]
    assert store.bounds("a").head == 4


def test_a_number_stands_for_one_message_and_a_batch_is_whole_or_absent(store):
    append(store, item("x", number=7))
    refused = append(store, item("new", number=8), item("y", number=7))
    assert isinstance(refused, Conflict) and refused.reason == "replay"
    assert store.bounds("a") == Bounds(1, 1) and sequences(store) == [1]
    assert isinstance(append(store, item("y", number=9), item("z", number=9)), Conflict)
    results = store.append([("a", [item("y", number=7)]), ("a", [item("good", number=10)])], 1000)
    assert isinstance(results[0], Conflict) and results[1] == [Appended(2, False)]
    assert append(store, item("y", number=7, peer="q")) == [Appended(3, False)]


def test_pages_by_count_and_bytes(store):
    append(store, *(item(i, size=100) for i in range(10)))
    assert sequences(store, most=3) == [1, 2, 3]
    assert sequences(store, size=250) == [1, 2] and sequences(store, size=1) == [1]
    entries, last = store.page("a", "group", 4, 2, 1000)
    assert last == 6 and [e.received_ms for e in entries] == [1000, 1000]
    assert entries[0].envelope == item(4, size=100).envelope
    assert store.page("a", "group", 10, 5, 1000) == ([], 10)


def test_scan_is_of_the_newest(store):
    append(store, *(item(i, peer=f"p{i % 2}") for i in range(6)), item("t", kind="proposal"))
    assert store.scan("a", "group", 1, 3) == [(4, "p1"), (5, "p0"), (6, "p1")]
    assert [s.sequence for s in store.read("a", [6, 2, 99, 0])] == [2, 6]


def test_retention_by_age_keeps_the_rest_dense(store):
    append(store, item(1), item(2), now=1000)
    append(store, item(3), now=5000)
    assert store.prune(1000, 1 << 30) == 0
    assert store.prune(2000, 1 << 30) == 2
    assert store.bounds("a") == Bounds(3, 3) and sequences(store) == [3]
    assert append(store, item(4)) == [Appended(4, False)]
    assert store.prune(9000, 1 << 30) == 2 and store.bounds("a") == Bounds(5, 4)
    assert append(store, item(5)) == [Appended(5, False)] and store.size() == (1, 1, 1)


def test_retention_by_bytes_takes_from_the_largest_run(store):
    append(store, *(item(i, size=100) for i in range(10)))
    append(store, item("b", size=100), run="b")
    assert store.prune(0, 550) == 6
    assert store.bounds("a") == Bounds(7, 10) and store.bounds("b") == Bounds(1, 1) and store.size() == (2, 5, 500)


def test_what_retention_dropped_cannot_be_replayed_until_it_is_too_old_anyway(store):
    old = item("old", number=5)
    append(store, old, item("older", number=3), now=1000)
    store.prune(0, 0)
    assert store.bounds("a") == Bounds(3, 2)
    assert isinstance(append(store, old, now=1100), Conflict)
    assert isinstance(append(store, item("x", number=4), now=1100), Conflict)
    assert append(store, item("x", number=6), now=1100) == [Appended(3, False)]
    store.prune(1050, 1 << 30)
    assert append(store, old, now=1100) == [Appended(4, False)]


def test_numbers_are_whole_to_the_last_bit(store):
    last = (1 << 63) - 1
    assert append(store, item("x", number=last - 1)) == [Appended(1, False)]
    assert append(store, item("y", number=last)) == [Appended(2, False)]  # another number, though not as float64
    assert isinstance(append(store, item("z", number=last)), Conflict)
    store.prune(0, 0)
    assert isinstance(append(store, item("z", number=last)), Conflict)
    append(store, item("x", number=1 << 62, peer="q"))
    store.prune(0, 0)
    assert isinstance(append(store, item("y", number=1 << 62, peer="q")), Conflict)
    assert append(store, item("y", number=(1 << 62) + 1, peer="q")) == [Appended(4, False)]


def test_any_bytes_are_kept(store):
    content = bytes(range(256)) * 10 + b"\r\n\0"
    kept = Item("group", "p", 1, bytes(range(32)), content)
    assert append(store, kept) == [Appended(1, False)] and append(store, kept) == [Appended(1, True)]
    assert store.read("a", [1])[0].envelope == content and store.damaged == 0


def test_pruning_goes_in_steps(store, monkeypatch):
    monkeypatch.setattr(room, "PRUNE_STEP", 4)
    append(store, *(item(i) for i in range(10)))
    assert [store.prune(2000, 1 << 30) for _ in range(4)] == [4, 4, 2, 0]
    append(store, *(item(i, number=1 << 40 | i) for i in range(10)))
    assert [store.prune(0, 0) for _ in range(4)] == [4, 4, 2, 0]


def test_runs_are_limited(store, monkeypatch):
    monkeypatch.setattr(room, "MAX_RUNS", 2)
    append(store, item(1), run="a")
    append(store, item(1), run="b")
    refused = append(store, item(1), run="c")
    assert isinstance(refused, Conflict) and refused.reason == "too_many_runs"
    assert append(store, item(2), run="a") == [Appended(2, False)] and store.bounds("c") == Bounds(1, 0)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 12), min_size=1, max_size=4)),
        st.tuples(st.just("prune"), st.integers(0, 30), st.integers(0, 60)),
    ),
    max_size=25,
)


def same_as_memory(other, operations):
    memory = MemoryStore()
    for now, (name, *arguments) in enumerate(operations):
        results = []
        for store in (memory, other):
            if name == "append":
                result = append(store, *(item(i, f"p{i % 3}", i + 1, size=7) for i in arguments[0]), now=now)
                results.append(result.reason if isinstance(result, Conflict) else result)
            else:
                results.append(store.prune(*arguments))
            results.append((store.bounds("a"), store.size(), store.scan("a", "group", 0, 50)))
        assert results[:2] == results[2:]
        assert memory.runs() == other.runs()
        floor, head = memory.bounds("a").floor, memory.bounds("a").head
        assert sequences(memory) == sequences(other) == list(range(floor, head + 1))
    other.close()


@given(OPERATIONS)
@settings(max_examples=60)
def test_on_disk_all_is_as_in_memory(operations):
    with tempfile.TemporaryDirectory() as folder:
        same_as_memory(SqliteStore(folder), operations)


@given(OPERATIONS)
@settings(max_examples=40)
def test_on_redis_all_is_as_in_memory(redis_server, operations):
    same_as_memory(redis_server.empty_store(), operations)


# ---- on disk


def test_what_was_appended_is_there_after_reopening(tmp_path):
    store = SqliteStore(tmp_path)
    append(store, item(1), item(2))
    store.prune(0, 1)
    store.close()
    store = SqliteStore(tmp_path)
    assert store.bounds("a") == Bounds(2, 2) and store.size() == (1, 1, 1)
    assert append(store, item(2), item(3)) == [Appended(2, True), Appended(3, False)]
    store.close()


def test_every_commit_reaches_the_disk(tmp_path):
    store = SqliteStore(tmp_path)
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    store.close()


def test_a_second_process_is_refused(tmp_path):
    store = SqliteStore(tmp_path)
    script = f"from cz_jax.swarm.store import SqliteStore; SqliteStore({str(tmp_path)!r})"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert told.returncode and "in use by another relay" in told.stderr
    with pytest.raises(StoreError, match="in use by another relay"):
        SqliteStore(tmp_path)
    store.close()
    SqliteStore(tmp_path).close()


def test_a_full_disk_keeps_nothing_of_the_batch_and_recovers(tmp_path):
    store = SqliteStore(tmp_path)
    append(store, item(1))
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count={pages + 4}")
    with pytest.raises(StoreFailed, match="full"):
        append(store, item(2), item("large", size=1 << 20))
    assert store.bounds("a") == Bounds(1, 1) and store.size() == (1, 1, 1)
    store._writer.execute(f"PRAGMA max_page_count={1 << 20}")
    assert append(store, item(2)) == [Appended(2, False)]
    store.close()


def test_one_flipped_bit_costs_one_entry(tmp_path):
    store = SqliteStore(tmp_path)
    append(store, *(item(i, size=300) for i in range(5)))
    store.close()
    file = tmp_path / room.FILE
    data = bytearray(file.read_bytes())
    data[data.index(item(2, size=300).envelope) + 50] ^= 1
    file.write_bytes(data)
    store = SqliteStore(tmp_path)
    entries, last = store.page("a", "group", 0, 10, 1 << 20)
    assert [e.sequence for e in entries] == [1, 2, 4, 5] and last == 5 and store.damaged == 1
    assert append(store, item(9)) == [Appended(6, False)]
    store.close()


@pytest.mark.parametrize("damage", ["rubbish", "head", "folder"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    store = SqliteStore(tmp_path)
    append(store, item(1), item(2))
    store.close()
    file = tmp_path / room.FILE
    if damage == "rubbish":
        file.write_bytes(b"not a database" * 1000)
    elif damage == "head":
        with sqlite3.connect(file) as db:
            db.execute("DELETE FROM log WHERE sequence = 2")
        db.close()
    else:
        file.unlink()
        file.mkdir()
    with pytest.raises(StoreError, match=room.FILE):
        SqliteStore(tmp_path)


def test_readers_see_whole_commits_while_the_writer_writes(tmp_path):
    store = SqliteStore(tmp_path)
    store._writer.execute("BEGIN IMMEDIATE")
    store._append("a", [item(1)], 0)
    assert store.bounds("a") == Bounds(1, 0)
    store._writer.execute("COMMIT")
    assert store.bounds("a") == Bounds(1, 1)
    store.close()
