"""The node's side of the swarm: an `Exchange` and a `Proposer` whose other end is a relay.

What comes from a peer is text to be read again: sizes, types and ids are checked here, the task must be one that this
node would train on, and nothing is said of rewards, so nothing is believed. The relay is not trusted either: every
signature, the caps and the freshness are checked once more.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cz_jax.config import ProposerConfig, SwarmConfig
from cz_jax.errors import CheckpointError
from cz_jax.nouns import Group, Level, Task, from_json, to_json
from cz_jax.ports import Proposals, Proposer
from cz_jax.rng import seed_for
from cz_jax.swarm.envelope import (
    GROUP,
    PROPOSAL,
    Opened,
    Rejected,
    answers_key,
    group_payload,
    proposal_payload,
    read_group,
    read_proposal,
)
from cz_jax.swarm.link import Link
from cz_jax.swarm.relay_pb2 import Sample
from cz_jax.text.proposals import NearCopies, Refused, parse_proposal

SEEN = 1024  # groups remembered against copies
POOL = 64  # proposals kept for later rounds
PROPOSALS_AT_ONCE = 64
PROPOSALS_PER_PEER = 16
AHEAD_SECONDS = 600.0  # by which a peer's clock may be ahead
USUAL = frozenset({"duplicate", "stale", "own", "other"})  # reasons that nobody needs to be told


class Reader:
    """Where one reader of a log stands, and what it has told about what it refused."""

    def __init__(self, link: Link, config: SwarmConfig, kind: str, say: Callable, now: Callable[[], float]):
        self._link, self._config, self._kind = link, config, kind
        self._say, self._now = say, now
        self._told: set[str] = set()
        self.cursor = 0

    def look(self, limit: int, per_peer: int, seed: int) -> tuple[list[Opened], Counter]:
        """At most `limit` fresh messages of other peers, at most `per_peer` of one, and how many were refused why."""
        c = self._config
        sample = Sample(seed=seed, per_peer=per_peer, except_peer=self._link.peer)
        look = self._link.fetch(self._kind, self.cursor, limit, sample, c.fetch_seconds, c.wait_seconds)
        self.tell_notes()
        refused, taken, by_peer = Counter(), [], Counter()
        if look is None:
            return taken, refused
        self.cursor = look.next
        refused.update(look.refused)
        for message in look.messages:
            age = self._now() - message.time_ms / 1000
            by_peer[message.peer] += 1
            if message.peer == self._link.peer:
                refused["own"] += 1
            elif age > c.max_age_seconds:
                refused["stale"] += 1
            elif age < -AHEAD_SECONDS:
                refused["time"] += 1
            elif by_peer[message.peer] > per_peer:
                refused["per_peer"] += 1
            else:
                taken.append(message)
        return taken, refused

    def tell_notes(self) -> None:
        for note in self._link.take_notes():
            self._say("note", text=note)

    def tell_refused(self, refused: Counter) -> None:
        """Says each reason once."""
        new = sorted(r for r in refused if r not in self._told | USUAL)
        if new:
            self._told.update(new)
            self._say(
                "note", text=f"refused from peers ({self._kind}): " + ", ".join(f"{r} x {refused[r]}" for r in new)
            )

    def restore(self, cursor) -> None:
        if isinstance(cursor, bool) or not isinstance(cursor, int) or not 0 <= cursor < 1 << 62:
            raise CheckpointError("the saved place in the relay's log cannot be read", "a damaged checkpoint?")
        self.cursor = cursor


class SwarmExchange:
    """Implements `ports.Exchange` over a relay.

    `admit(task)`: the task as this node knows it, or Rejected: held out, too long, not one that it would train on.
    `fetch(count)` offers up to swarm.oversample * count groups, so that enough are left when those without any
    advantage are dropped. A relay that is away costs nothing but its groups.
    """

    def __init__(
        self,
        link: Link,
        config: SwarmConfig,
        group_size: int,
        run_seed: int,
        admit: Callable[[Task], Task],
        say: Callable,
        now: Callable[[], float] = time.time,
    ):
        self._link, self._config, self._group_size, self._run_seed = link, config, group_size, run_seed
        self._admit = admit
        self._reader = Reader(link, config, GROUP, say, now)
        self._seen: dict[str, None] = {}

    def publish(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._remember(answers_key(group))
            self._link.send(GROUP, group_payload(group))
        self._reader.tell_notes()

    def fetch(self, count: int, round_number: int) -> tuple[Group, ...]:
        if count == 0:
            return ()
        seed = seed_for(self._run_seed, "external groups", round_number)
        messages, refused = self._reader.look(count * self._config.oversample, self._config.per_peer, seed)
        groups = []
        for message in messages:
            try:
                groups.append(self._read(message))
            except Rejected as e:
                refused[e.reason] += 1
        self._reader.tell_refused(refused)
        return tuple(groups)

    def state(self) -> dict:
        return {"cursor": self._reader.cursor, "seen": list(self._seen)}

    def restore(self, state: dict) -> None:
        self._reader.restore(state.get("cursor", 0))
        self._seen = dict.fromkeys(str(key) for key in state.get("seen", ()))

    def _read(self, message: Opened) -> Group:
        group = read_group(message.payload, message.peer, self._group_size)
        key = answers_key(group)
        if key in self._seen:
            raise Rejected("duplicate")
        group = replace(group, task=self._admit(group.task))
        self._remember(key)
        return group

    def _remember(self, key: str) -> None:
        self._seen.pop(key, None)
        self._seen[key] = None
        while len(self._seen) > SEEN:
            del self._seen[next(iter(self._seen))]


class RelayProposer:
    """Implements `ports.Proposer` with what peers proposed: the tasks nearest the wanted level, newest first.

    `admit` as of `SwarmExchange`. Each task passes the same rules as one of an own proposer, and is given out once.
    """

    def __init__(
        self,
        link: Link,
        config: SwarmConfig,
        rules: ProposerConfig,
        run_seed: int,
        admit: Callable[[Task], Task],
        say: Callable,
        now: Callable[[], float] = time.time,
    ):
        self._rules, self._run_seed, self._admit = rules, run_seed, admit
        self._reader = Reader(link, config, PROPOSAL, say, now)
        self._pool: list[Task] = []
        self._known = NearCopies(rules.memory, rules.near_copy)

    def propose(self, level: Level, count: int, round_number: int) -> Proposals:
        """`tries`: how many messages were read for it."""
        seed = seed_for(self._run_seed, "external proposals", round_number)
        messages, refused = self._reader.look(PROPOSALS_AT_ONCE, PROPOSALS_PER_PEER, seed)
        for message in messages:
            try:
                task = checked_proposal(self._admit(read_proposal(message.payload)), self._rules)
                if self._known.is_copy(task.question):
                    raise Rejected("near_copy")
            except Rejected as e:
                refused[e.reason] += 1
            else:
                self._known.add(task.question)
                self._pool.append(task)
        self._pool = self._pool[-POOL:]
        self._reader.tell_refused(refused)
        order = sorted(range(len(self._pool)), key=lambda i: (abs(self._pool[i].level - level), -i))[:count]
        chosen = tuple(self._pool[i] for i in order)
        self._pool = [task for i, task in enumerate(self._pool) if i not in order]
        return Proposals(chosen, len(messages), dict(sorted(refused.items())))

    def state(self) -> dict:
        return {"cursor": self._reader.cursor, "pool": to_json(self._pool), "known": self._known.state()}

    def restore(self, state: dict) -> None:
        self._reader.restore(state["cursor"])
        self._pool = [from_json(Task, value) for value in state["pool"]]
        self._known.restore(state["known"])


@dataclass(frozen=True)
class SharingProposer:
    """An own proposer whose tasks peers get too."""

    inner: Proposer
    link: Link

    def propose(self, level: Level, count: int, round_number: int) -> Proposals:
        proposals = self.inner.propose(level, count, round_number)
        for task in proposals.tasks:
            self.link.send(PROPOSAL, proposal_payload(task))
        return proposals

    def state(self) -> dict:
        return self.inner.state()

    def restore(self, state: dict) -> None:
        self.inner.restore(state)


def checked_proposal(task: Task, rules: ProposerConfig) -> Task:
    """`task` read again as if a model had written it just now. Rejected where an own proposer's would be refused."""
    text = json.dumps({"question": task.question, "tests": list(task.tests)})
    try:
        read = parse_proposal(f"```json\n{text}\n```", task.level, rules.imports)
    except Refused as e:
        raise Rejected(e.reason, e.detail) from None
    if read.id != task.id:
        raise Rejected("not_canonical", "the task is not spelled as its proposer's parser spells it")
    return read
