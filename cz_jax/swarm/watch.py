"""What a relay's page shows, kept while entries come: who publishes how much, the rounds they claim, the latest tasks.

`Tally` is the numbers, in bounded memory; `Watcher` is the thread that follows the log. It is woken by commits and
stands beside them: each new entry is counted once from the log's index, and of many new ones only the newest are read
whole. It works for a tenth of the time at most, so publishing does not wait for it. Nothing is computed for a viewer.

What this does not protect: a round, a policy and an answer's end are what the peer's message says. Messages carry no
reward and no software version, so none is shown.
"""

import hashlib
import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from cz_jax.swarm.envelope import GROUP, KINDS, Rejected, read_group, read_proposal
from cz_jax.swarm.identity import friendly_name
from cz_jax.swarm.relay_pb2 import Envelope
from cz_jax.swarm.store import Store, StoreFailed
from cz_jax.text.reading import BadJson, load_json

MINUTE_MS = 60_000
MINUTES = 60  # that the charts go back
PEERS = 256  # remembered, those that published last
PEERS_SHOWN = 40
CHARTED = 7  # peers with a curve of their own
TASKS = 20
QUESTION = 600  # characters shown
WORD = 64  # characters shown of a name that a peer chose
WINDOW = 4096  # new entries of one run and kind that one look counts
READ_WHOLE = 32  # of them, the newest
LOOK_SECONDS = 0.05  # after which a look reads no further entry whole
PAUSE_SECONDS = 0.25  # between looks, at least
IDLE_SECONDS = 1.0
REST = 9  # a look is followed by so many times its own duration


@dataclass(slots=True)
class Peer:
    """One peer in one run. `rounds` and `groups` are by minute; `read` and what follows: of entries read whole."""

    name: str
    last_ms: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # by kind
    groups: dict[int, int] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    read: int = 0
    round: int | None = None
    policy: str | None = None
    answers: int = 0
    ended: int = 0
    refused: int = 0
    reason: str = ""


class Tally:
    """The numbers of one page. `now_ms`: when it began to count."""

    def __init__(self, now_ms: int):
        self.since_ms = now_ms
        self.counts: Counter[str] = Counter()
        self.uncounted = 0  # at most so many were passed over
        self._peers: OrderedDict[tuple[str, str], Peer] = OrderedDict()
        self._minutes: dict[int, Counter[str]] = {}
        self._tasks: OrderedDict[str, dict] = OrderedDict()
        self._slots: dict[tuple[str, str], int] = {}

    def count(self, run: str, kind: str, peers: Iterable[str], now_ms: int) -> None:
        """One entry of `kind` for each of `peers`, come just now."""
        minute = now_ms // MINUTE_MS
        for name, number in Counter(peers).items():
            peer = self._peer(run, name, now_ms)
            peer.counts[kind] += number
            self.counts[kind] += number
            self._minutes.setdefault(minute, Counter())[kind] += number
            if kind == GROUP:
                peer.groups[minute] = peer.groups.get(minute, 0) + number
                _forget(peer.groups, minute)
        _forget(self._minutes, minute)

    def read(self, run: str, kind: str, name: str, sequence: int, payload: bytes, received_ms: int) -> None:
        """What the payload of an entry says, which `name` signed and nobody checked."""
        peer = self._peer(run, name, received_ms)
        peer.read += 1
        try:
            if kind == GROUP:
                group = read_group(payload, name, None)
                peer.round, peer.policy = group.round, group.policy
                peer.answers += len(group.rollouts)
                peer.ended += sum(r.ended for r in group.rollouts)
                minute = received_ms // MINUTE_MS
                peer.rounds[minute] = group.round
                _forget(peer.rounds, minute)
                task = group.task
            else:
                task = read_proposal(payload)
            shown = {"source": task.source, "level": int(task.level), "tests": len(task.tests), "reason": ""}
            key, question, entry = task.id, task.question, task.entry_point
        except Rejected as e:
            peer.refused += 1
            peer.reason = e.reason
            question, entry = _glance(payload), None
            key = hashlib.sha256(question.encode("utf-8", "replace")).hexdigest()
            shown = {"source": "", "level": None, "tests": None, "reason": e.reason}
        shown["question"], shown["more"] = visible(question[:QUESTION]), max(0, len(question) - QUESTION)
        shown["entry_point"] = visible((entry or "")[:WORD])
        known = self._tasks.pop(f"{run} {key}", None)
        if known is not None and known["kind"] != GROUP:  # a proposal that is being answered stays one
            kind, name = known["kind"], known["peer"]
        about = {"run": run, "kind": kind, "peer": name, "name": friendly_name(name), "sequence": sequence}
        self._tasks[f"{run} {key}"] = shown | about | {"received_ms": received_ms}
        while len(self._tasks) > TASKS:
            self._tasks.popitem(last=False)

    def value(self, now_ms: int) -> dict:
        """All of it, fit for JSON; of bounded size."""
        last = now_ms // MINUTE_MS
        span = range(last - MINUTES + 1, last + 1)
        latest = sorted(self._peers, key=lambda key: self._peers[key].last_ms, reverse=True)[:PEERS_SHOWN]
        latest.sort(key=lambda key: (-self._peers[key].counts[GROUP], key))
        self._choose_curves(span)
        return {
            "since_ms": self.since_ms,
            "counts": {kind: self.counts[kind] for kind in KINDS},
            "uncounted": self.uncounted,
            "peers_known": len(self._peers),
            "first_minute": span[0],
            "minutes": [[self._minutes.get(m, Counter())[kind] for kind in KINDS] for m in span],
            "curves": [_curve(key, self._peers[key], slot, span) for key, slot in self._slots.items()],
            "peers": [_row(key, self._peers[key], self._slots.get(key)) for key in latest],
            "tasks": list(reversed(self._tasks.values())),
        }

    def _choose_curves(self, span: range) -> None:
        """The peers with most groups get a curve; who has one keeps its slot, and so its colour."""
        sums = {key: sum(peer.groups.get(m, 0) for m in span) for key, peer in self._peers.items()}
        loudest = sorted((key for key in sums if sums[key]), key=lambda key: (-sums[key], key))[:CHARTED]
        slots = {key: slot for key, slot in self._slots.items() if key in loudest}
        free = iter(sorted(set(range(CHARTED)) - set(slots.values())))
        slots |= {key: next(free) for key in loudest if key not in slots}
        self._slots = dict(sorted(slots.items(), key=lambda item: item[1]))

    def _peer(self, run: str, name: str, now_ms: int) -> Peer:
        peer = self._peers.pop((run, name), None) or Peer(friendly_name(name))
        peer.last_ms = max(peer.last_ms, now_ms)
        self._peers[run, name] = peer
        while len(self._peers) > PEERS:
            self._peers.popitem(last=False)
        return peer


class Watcher(threading.Thread):
    """Follows `store` until `stop`. `changed(state)` is called in this thread with the page's JSON, at most four times
    a second and only where something is new. `health`: what else the page shows of the relay, fit for JSON.
    `failed(text)` is told of a defect, which costs the page one look and nobody else anything.

    What the log holds already is looked into once for peers and tasks, and not counted.
    """

    def __init__(
        self,
        store: Store,
        changed: Callable[[bytes], None],
        health: Callable[[], dict],
        failed: Callable[[str], None] = lambda text: None,
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ):
        super().__init__(name="relay page", daemon=True)
        self._store, self._changed, self._health = store, changed, health
        self._failed, self._now_ms = failed, now_ms
        self.tally = Tally(now_ms())
        self._cursors: dict[tuple[str, str], int] = {}
        self._runs: list[tuple[str, int, int, int]] = []
        self._news, self._stopping = threading.Event(), threading.Event()
        self._told: dict = {}

    def wake(self) -> None:
        """Something was appended."""
        self._news.set()

    def stop(self) -> None:
        self._stopping.set()
        self._news.set()
        self.join(IDLE_SECONDS + 1)

    def run(self) -> None:
        counting = False
        while not self._stopping.is_set():
            self._news.clear()
            begun = time.monotonic()
            try:
                self._tell(self._looked(counting))
                counting = True
            except Exception as e:  # whatever it was, the page goes on with the next entries
                self._failed(repr(e))
            self._stopping.wait(max(PAUSE_SECONDS, REST * (time.monotonic() - begun)))
            self._news.wait(IDLE_SECONDS)

    def _looked(self, counting: bool) -> bool:
        try:
            self.look(counting)
        except StoreFailed:
            return False
        return True

    def look(self, counting: bool = True) -> None:
        """Takes in what is new; with `counting` False, what was there before. StoreFailed where it cannot be read."""
        until = time.monotonic() + LOOK_SECONDS
        runs = self._store.runs()
        for run, bounds, _ in runs:
            for kind in KINDS:
                after = self._cursors.get((run, kind), 0)
                if bounds.head == after:
                    continue
                after = after if after < bounds.head else 0  # a log that was begun anew
                rows = self._store.scan(run, kind, after, WINDOW if counting else READ_WHOLE)
                self._cursors[run, kind] = max(bounds.head, rows[-1][0] if rows else 0)
                if counting:
                    self.tally.uncounted += rows[0][0] - max(after, bounds.floor - 1) - 1 if len(rows) == WINDOW else 0
                    self.tally.count(run, kind, (peer for _, peer in rows), self._now_ms())
                self._read_whole(run, kind, rows[-READ_WHOLE:], until)
        self._runs = [(run, bounds.floor, bounds.head, size) for run, bounds, size in runs]

    def _read_whole(self, run: str, kind: str, rows: list[tuple[int, str]], until: float) -> None:
        peers = dict(rows)
        for sequence in peers:
            if time.monotonic() > until and sequence != rows[-1][0]:
                continue
            for stored in self._store.read(run, [sequence]):
                try:
                    payload = Envelope.FromString(stored.envelope).payload
                except DecodeError:
                    continue
                self.tally.read(run, kind, peers[sequence], sequence, payload, stored.received_ms)

    def _tell(self, readable: bool) -> None:
        now = self._now_ms()
        runs = [dict(zip(("run", "floor", "head", "bytes"), run, strict=True)) for run in self._runs]
        value = self.tally.value(now) | {"runs": runs, "health": self._health() | {"readable": readable}}
        if value != self._told:
            self._told = value
            self._changed(encoded(value | {"time_ms": now}))


def encoded(value: dict) -> bytes:
    """JSON in ASCII that holds no markup, wherever it may land."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode("ascii")


def visible(text: str) -> str:
    """`text` with every character that does not print, or turns the direction of reading, as its code point."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"<U+{ord(c):04X}>" for c in text.replace("\r\n", "\n"))


def _glance(payload: bytes) -> str:
    """The question of a payload that is no message, as far as there is one."""
    try:
        value = load_json(payload.decode("utf-8"))
    except (UnicodeDecodeError, BadJson):
        return ""
    task = value.get("task") if isinstance(value, dict) else None
    question = task.get("question") if isinstance(task, dict) else None
    return question if isinstance(question, str) else ""


def _forget(by_minute: dict[int, object], now: int) -> None:
    for minute in [m for m in by_minute if m <= now - MINUTES]:
        del by_minute[minute]


def _curve(key: tuple[str, str], peer: Peer, slot: int, span: range) -> dict:
    """By minute: groups, and the round that was claimed last in it (None: none)."""
    return {
        "run": key[0],
        "peer": key[1],
        "name": peer.name,
        "slot": slot,
        "groups": [peer.groups.get(m, 0) for m in span],
        "rounds": [peer.rounds.get(m) for m in span],
    }


def _row(key: tuple[str, str], peer: Peer, slot: int | None) -> dict:
    return {
        "run": key[0],
        "peer": key[1],
        "name": peer.name,
        "slot": slot,
        "last_ms": peer.last_ms,
        "counts": {kind: peer.counts[kind] for kind in KINDS},
        "round": peer.round,
        "policy": None if peer.policy is None else peer.policy[:12],
        "ended": peer.ended / peer.answers if peer.answers else None,
        "read": peer.read,
        "refused": peer.refused,
        "reason": peer.reason,
    }
