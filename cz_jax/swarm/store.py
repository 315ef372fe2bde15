"""Where a relay keeps its logs: one interface, in memory or in SQLite; `redis_store` has one that relays share.

A log is a run's envelopes under the sequences floor..head, without a gap. `append` is the only thing that writes
content, and what it has returned from survives a power cut (not in memory). A store is written to by one thread of a
relay; reading is allowed from others at the same time.
"""

import fcntl
import os
import pathlib
import sqlite3
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cz_jax.errors import UserError

FILE, LOCK = "relay.sqlite", "lock"
MAX_RUNS = 64
PRUNE_STEP = 1000  # entries dropped in one transaction, so that publishers wait milliseconds


class StoreError(UserError):
    """A data folder that cannot be opened."""


class StoreFailed(Exception):
    """The store could not write or read: a full disk, a damaged file, a server that is away."""


class Conflict(Exception):
    """A batch that contradicts what the log holds. `reason`: "replay" or "too_many_runs"."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Item:
    """One envelope to append. `envelope`: its bytes; `hash`: 32 bytes of its content; `number`: the peer's own."""

    kind: str
    peer: str
    number: int
    hash: bytes
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Appended:
    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Stored:
    sequence: int
    received_ms: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Bounds:
    """The log holds floor..head; empty where head = floor - 1."""

    floor: int
    head: int


Batch = tuple[str, Sequence[Item]]  # run, what is appended to it together


class Store(Protocol):
    def append(self, batches: Sequence[Batch], now_ms: int) -> list[list[Appended] | Conflict]:
        """Appends each batch, whole or (Conflict) not at all, all of them with one write to disk.

        An item whose hash the run holds keeps the sequence it has. Conflict "replay": a number that the peer has
        used for other content, or one at or below those that retention has dropped. StoreFailed: nothing of it may be
        acknowledged; the same batches may be appended again.
        """

    def bounds(self, run: str) -> Bounds:
        """Those of an unknown run are 1 and 0."""

    def scan(self, run: str, kind: str, after: int, most: int) -> list[tuple[int, str]]:
        """(sequence, peer) of the newest `most` entries of `kind` beyond `after`, oldest first."""

    def page(self, run: str, kind: str, after: int, most: int, most_bytes: int) -> tuple[list[Stored], int]:
        """The oldest entries of `kind` beyond `after`: at most `most`, and at most `most_bytes` unless it is one; and
        the sequence that was looked at last (`after` where there was none): a damaged entry is left out."""

    def read(self, run: str, sequences: Sequence[int]) -> list[Stored]:
        """Those entries that are there, by rising sequence. A damaged one is left out and counted in `damaged`."""

    def prune(self, before_ms: int, most_bytes: int) -> int:
        """Drops the oldest entries that were received before `before_ms`, then the oldest of the largest run while all
        envelopes take more than `most_bytes`; at most PRUNE_STEP of them. How many. The numbers of what is dropped stay
        refused until `before_ms` has passed them: from then on the caller refuses them for their age."""

    def size(self) -> tuple[int, int, int]:
        """(runs, entries, bytes of envelopes)."""

    def runs(self) -> list[tuple[str, Bounds, int]]:
        """(run, its bounds, bytes of its envelopes), by name."""

    def follow(self, appended: Callable[[Sequence[tuple[str, str]]], None]) -> None:
        """From now on calls `appended`, in a thread of its own, with each (run, kind) that another relay appends to."""

    def close(self) -> None: ...

    damaged: int


@dataclass
class _Log:
    """A run in memory."""

    floor: int = 1
    entries: list[tuple[Item, int]] = field(default_factory=list)  # entry i has sequence floor + i
    by_hash: dict[bytes, int] = field(default_factory=dict)
    numbers: set[tuple[str, int]] = field(default_factory=set)
    dropped: dict[str, tuple[int, int]] = field(default_factory=dict)  # peer -> highest number dropped, its received_ms
    bytes: int = 0


class MemoryStore:
    """A `Store` that is gone with its process: for tests and for a demo."""

    def __init__(self):
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()
        self.damaged = 0

    def append(self, batches: Sequence[Batch], now_ms: int) -> list[list[Appended] | Conflict]:
        with self._lock:
            return [self._append(run, items, now_ms) for run, items in batches]

    def bounds(self, run: str) -> Bounds:
        with self._lock:
            log = self._logs.get(run, _Log())
            return Bounds(log.floor, log.floor + len(log.entries) - 1)

    def scan(self, run: str, kind: str, after: int, most: int) -> list[tuple[int, str]]:
        return [(sequence, item.peer) for sequence, item, _ in self._beyond(run, kind, after)][-most:]

    def page(self, run: str, kind: str, after: int, most: int, most_bytes: int) -> tuple[list[Stored], int]:
        found = self._beyond(run, kind, after)[:most]
        wanted = within([(s, len(item.envelope)) for s, item, _ in found], most_bytes)
        return [Stored(s, ms, item.envelope) for s, item, ms in found[: len(wanted)]], max([after, *wanted])

    def read(self, run: str, sequences: Sequence[int]) -> list[Stored]:
        with self._lock:
            log = self._logs.get(run, _Log())
            at = [s for s in sorted(sequences) if 0 <= s - log.floor < len(log.entries)]
            return [Stored(s, log.entries[s - log.floor][1], log.entries[s - log.floor][0].envelope) for s in at]

    def prune(self, before_ms: int, most_bytes: int) -> int:
        dropped = 0
        with self._lock:
            for log in self._logs.values():
                log.dropped = {peer: d for peer, d in log.dropped.items() if d[1] >= before_ms}
                old = next((i for i, (_, ms) in enumerate(log.entries) if ms >= before_ms), len(log.entries))
                dropped += self._drop(log, min(old, PRUNE_STEP - dropped))
            while dropped < PRUNE_STEP and sum(log.bytes for log in self._logs.values()) > most_bytes:
                dropped += self._drop(max(self._logs.values(), key=lambda log: log.bytes), 1)
        return dropped

    def size(self) -> tuple[int, int, int]:
        with self._lock:
            logs = self._logs.values()
            return len(logs), sum(len(log.entries) for log in logs), sum(log.bytes for log in logs)

    def runs(self) -> list[tuple[str, Bounds, int]]:
        with self._lock:
            logs = sorted(self._logs.items())
            return [(run, Bounds(log.floor, log.floor + len(log.entries) - 1), log.bytes) for run, log in logs]

    def follow(self, appended: Callable[[Sequence[tuple[str, str]]], None]) -> None:
        pass  # there is no other relay

    def close(self) -> None:
        pass

    def _beyond(self, run: str, kind: str, after: int) -> list[tuple[int, Item, int]]:
        with self._lock:
            log = self._logs.get(run, _Log())
            start = max(0, after + 1 - log.floor)
            return [
                (log.floor + start + i, item, received)
                for i, (item, received) in enumerate(log.entries[start:])
                if item.kind == kind
            ]

    def _append(self, run: str, items: Sequence[Item], now_ms: int) -> list[Appended] | Conflict:
        if run not in self._logs and len(self._logs) >= MAX_RUNS:
            return too_many_runs()
        log = self._logs.get(run, _Log())
        fresh: dict[bytes, Item] = {}
        numbers = set()
        for item in items:
            if item.hash in log.by_hash or item.hash in fresh:
                continue
            used = (item.peer, item.number) in log.numbers or (item.peer, item.number) in numbers
            if used or item.number <= log.dropped.get(item.peer, (0, 0))[0]:
                return replay(item)
            fresh[item.hash] = item
            numbers.add((item.peer, item.number))
        self._logs[run] = log
        for item in fresh.values():
            log.by_hash[item.hash] = log.floor + len(log.entries)
            log.entries.append((item, now_ms))
            log.bytes += len(item.envelope)
        log.numbers |= numbers
        seen: set[bytes] = set()
        results = []
        for item in items:
            results.append(Appended(log.by_hash[item.hash], item.hash not in fresh or item.hash in seen))
            seen.add(item.hash)
        return results

    def _drop(self, log: _Log, count: int) -> int:
        for item, received in log.entries[:count]:
            del log.by_hash[item.hash]
            log.numbers.discard((item.peer, item.number))
            log.dropped[item.peer] = max((item.number, received), log.dropped.get(item.peer, (0, 0)))
            log.bytes -= len(item.envelope)
        del log.entries[:count]
        log.floor += count
        return count


_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, floor INTEGER NOT NULL,
  head INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS log (run INTEGER NOT NULL, sequence INTEGER NOT NULL, kind TEXT NOT NULL, peer TEXT NOT NULL,
  number INTEGER NOT NULL, received INTEGER NOT NULL, hash BLOB NOT NULL, crc INTEGER NOT NULL, size INTEGER NOT NULL,
  envelope BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS log_sequence ON log (run, sequence);
CREATE UNIQUE INDEX IF NOT EXISTS log_hash ON log (run, hash);
CREATE UNIQUE INDEX IF NOT EXISTS log_number ON log (run, peer, number);
CREATE INDEX IF NOT EXISTS log_kind ON log (run, kind, sequence, peer);
CREATE TABLE IF NOT EXISTS dropped (run INTEGER NOT NULL, peer TEXT NOT NULL, number INTEGER NOT NULL,
  received INTEGER NOT NULL, PRIMARY KEY (run, peer)) WITHOUT ROWID;
"""
_KEEP_DROPPED = """
INSERT INTO dropped SELECT run, peer, max(number), max(received) FROM log WHERE run = ? AND sequence < ? GROUP BY peer
ON CONFLICT DO UPDATE SET number = max(number, excluded.number), received = max(received, excluded.received)
"""


class SqliteStore:
    """A `Store` in the folder `path`, for one process: write-ahead log, one fdatasync a commit. StoreError where it
    cannot be opened, or another process has it open."""

    def __init__(self, path: str | os.PathLike):
        self._file = pathlib.Path(path) / FILE
        self._readers = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._bytes = 0
        self.damaged = 0
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = _locked(self._file.with_name(LOCK))
            self._writer = self._connect()
            self._writer.execute("PRAGMA journal_mode=WAL")
            self._writer.execute("PRAGMA synchronous=FULL")
            self._writer.executescript(_SCHEMA)
            self._bytes = self._writer.execute("SELECT coalesce(sum(bytes), 0) FROM runs").fetchone()[0]
            self._check_heads()
        except (sqlite3.Error, OSError) as e:
            raise StoreError(
                f"{self._file} cannot be used: {e}",
                "a damaged file, a full disk, or a folder without write permission",
                "cz-jax relay --data with another folder; nodes go on, and publish there",
            ) from None

    def append(self, batches: Sequence[Batch], now_ms: int) -> list[list[Appended] | Conflict]:
        db, grown = self._writer, 0
        try:
            db.execute("BEGIN IMMEDIATE")
            results = []
            for run, items in batches:
                db.execute("SAVEPOINT batch")
                result, more = self._append(run, items, now_ms)
                if isinstance(result, Conflict):
                    db.execute("ROLLBACK TO batch")
                db.execute("RELEASE batch")
                results.append(result)
                grown += more
            db.execute("COMMIT")
        except sqlite3.Error as e:
            self._roll_back()
            raise StoreFailed(f"{e}") from e
        self._bytes += grown
        return results

    def bounds(self, run: str) -> Bounds:
        rows = self._select("SELECT floor, head FROM runs WHERE name = ?", run)
        return Bounds(*rows[0]) if rows else Bounds(1, 0)

    def scan(self, run: str, kind: str, after: int, most: int) -> list[tuple[int, str]]:
        found = self._select(
            "SELECT sequence, peer FROM log WHERE run = (SELECT id FROM runs WHERE name = ?) AND kind = ? "
            "AND sequence > ? ORDER BY sequence DESC LIMIT ?", run, kind, after, most,
        )  # fmt: skip
        return found[::-1]

    def page(self, run: str, kind: str, after: int, most: int, most_bytes: int) -> tuple[list[Stored], int]:
        sizes = self._select(
            "SELECT sequence, size FROM log WHERE run = (SELECT id FROM runs WHERE name = ?) AND kind = ? "
            "AND sequence > ? ORDER BY sequence LIMIT ?", run, kind, after, most,
        )  # fmt: skip
        wanted = within(sizes, most_bytes)
        return self.read(run, wanted), max([after, *wanted])

    def read(self, run: str, sequences: Sequence[int]) -> list[Stored]:
        found = []
        for sequence in sorted(sequences):
            rows = self._select(
                "SELECT received, crc, envelope FROM log WHERE run = (SELECT id FROM runs WHERE name = ?) "
                "AND sequence = ?", run, sequence,
            )  # fmt: skip
            for received, crc, envelope in rows:
                if zlib.crc32(envelope) == crc:
                    found.append(Stored(sequence, received, envelope))
                else:
                    self.damaged += 1
        return found

    def prune(self, before_ms: int, most_bytes: int) -> int:
        db, dropped, freed = self._writer, 0, 0
        try:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM dropped WHERE received < ?", (before_ms,))
            for run, floor, head in db.execute("SELECT id, floor, head FROM runs").fetchall():
                fresh = db.execute(
                    "SELECT sequence FROM log WHERE run = ? AND sequence >= ? AND received >= ? ORDER BY sequence "
                    "LIMIT 1", (run, floor, before_ms),
                ).fetchone() if floor <= head and self._oldest(run, floor) < before_ms else (floor,)  # fmt: skip
                to = min(fresh[0] if fresh else head + 1, floor + PRUNE_STEP - dropped)
                freed += self._drop(run, floor, to)
                dropped += to - floor
            while dropped < PRUNE_STEP and self._bytes - freed > most_bytes:
                run, floor = db.execute("SELECT id, floor FROM runs ORDER BY bytes DESC LIMIT 1").fetchone()
                freed += self._drop(run, floor, floor + 1)
                dropped += 1
            db.execute("COMMIT")
        except sqlite3.Error as e:
            self._roll_back()
            raise StoreFailed(f"{e}") from e
        self._bytes -= freed
        return dropped

    def size(self) -> tuple[int, int, int]:
        return self._select("SELECT count(*), coalesce(sum(head - floor + 1), 0), coalesce(sum(bytes), 0) FROM runs")[0]

    def runs(self) -> list[tuple[str, Bounds, int]]:
        rows = self._select("SELECT name, floor, head, bytes FROM runs ORDER BY name")
        return [(name, Bounds(floor, head), size) for name, floor, head, size in rows]

    def follow(self, appended: Callable[[Sequence[tuple[str, str]]], None]) -> None:
        pass  # another relay on this folder is refused

    def close(self) -> None:
        with self._lock:
            for db in self._opened:
                db.close()
            self._opened.clear()
        os.close(self._lock_file)

    def _append(self, run: str, items: Sequence[Item], now_ms: int) -> tuple[list[Appended] | Conflict, int]:
        """The batch's result, and by how many bytes the log has grown."""
        db = self._writer
        row = db.execute("SELECT id, head FROM runs WHERE name = ?", (run,)).fetchone()
        if row is None:
            if db.execute("SELECT count(*) FROM runs").fetchone()[0] >= MAX_RUNS:
                return too_many_runs(), 0
            row = db.execute("INSERT INTO runs (name, floor, head, bytes) VALUES (?, 1, 0, 0)", (run,)).lastrowid, 0
        (run_id, head), grown, results = row, 0, []
        for item in items:
            known = db.execute("SELECT sequence FROM log WHERE run = ? AND hash = ?", (run_id, item.hash)).fetchone()
            if known:
                results.append(Appended(known[0], True))
                continue
            used = db.execute(
                "SELECT 1 FROM log WHERE run = ? AND peer = ? AND number = ? UNION ALL "
                "SELECT 1 FROM dropped WHERE run = ? AND peer = ? AND number >= ?",
                (run_id, item.peer, item.number) * 2,
            ).fetchone()
            if used:
                return replay(item), 0
            head += 1
            size = len(item.envelope)
            db.execute(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (run_id, head, item.kind, item.peer, item.number, now_ms, item.hash, zlib.crc32(item.envelope), size,
                 item.envelope),
            )  # fmt: skip
            grown += size
            results.append(Appended(head, False))
        db.execute("UPDATE runs SET head = ?, bytes = bytes + ? WHERE id = ?", (head, grown, run_id))
        return results, grown

    def _oldest(self, run: int, floor: int) -> int:
        row = self._writer.execute("SELECT received FROM log WHERE run = ? AND sequence = ?", (run, floor)).fetchone()
        return row[0] if row else 0

    def _drop(self, run: int, floor: int, to: int) -> int:
        """Drops floor..to-1 of a run; how many bytes they took."""
        if to <= floor:
            return 0
        db = self._writer
        db.execute(_KEEP_DROPPED, (run, to))
        freed = db.execute("SELECT sum(size) FROM log WHERE run = ? AND sequence < ?", (run, to)).fetchone()[0] or 0
        db.execute("DELETE FROM log WHERE run = ? AND sequence < ?", (run, to))
        db.execute("UPDATE runs SET floor = ?, bytes = bytes - ? WHERE id = ?", (to, freed, run))
        return freed

    def _check_heads(self) -> None:
        """DatabaseError unless every run's last entry is where its head says."""
        for run, name, floor, head in self._writer.execute("SELECT id, name, floor, head FROM runs").fetchall():
            last = self._writer.execute("SELECT max(sequence) FROM log WHERE run = ?", (run,)).fetchone()[0]
            if (last if last is not None else floor - 1) != head:
                raise sqlite3.DatabaseError(f"run {name} should end at {head} and ends at {last}")

    def _select(self, query: str, *values) -> list[tuple]:
        try:
            return self._reader().execute(query, values).fetchall()
        except sqlite3.Error as e:
            raise StoreFailed(f"{e}") from e

    def _reader(self) -> sqlite3.Connection:
        """This thread's own connection: readers see the last commit and never wait for the writer."""
        db = getattr(self._readers, "db", None)
        if db is None:
            db = self._readers.db = self._connect()
            db.execute("PRAGMA query_only=1")
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._file, timeout=5.0, isolation_level=None, check_same_thread=False)
        with self._lock:
            self._opened.append(db)
        return db

    def _roll_back(self) -> None:
        if self._writer.in_transaction:
            try:
                self._writer.execute("ROLLBACK")
            except sqlite3.Error as e:
                raise StoreFailed(f"the failed write could not be taken back: {e}") from e


def _locked(path: pathlib.Path) -> int:
    """A descriptor that holds the lock on `path` until it is closed, however its process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"{path.parent} is in use by another relay", "two relays on one folder would mix their logs",
            "stop the other one, or name another --data",
        ) from None  # fmt: skip
    return descriptor


def within(sizes: Sequence[tuple[int, int]], most_bytes: int) -> list[int]:
    """The leading sequences of (sequence, bytes) that take at most `most_bytes` together; the first in any case."""
    total, wanted = 0, []
    for sequence, size in sizes:
        total += size
        if wanted and total > most_bytes:
            break
        wanted.append(sequence)
    return wanted


def replay(item: Item) -> Conflict:
    return Conflict("replay", f"number {item.number} of this peer stands for another message, or for one long dropped")


def too_many_runs() -> Conflict:
    return Conflict("too_many_runs", f"the relay holds {MAX_RUNS} runs, its limit")
