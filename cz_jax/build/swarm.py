"""A node's place in a swarm: its identity, its line to the relay, and which tasks of peers it takes."""

import pathlib
from collections.abc import Callable, Iterable

import jax

from cz_jax.config import Config
from cz_jax.errors import ConfigError
from cz_jax.nouns import Task
from cz_jax.swarm.client import checked_proposal
from cz_jax.swarm.envelope import Rejected
from cz_jax.swarm.identity import Identity, exposure, new_identity, read_identity, write_identity
from cz_jax.swarm.link import Link, LinkOptions
from cz_jax.tasks import question_key

KEY_FILE = "peer.key"


def connect(config: Config, folder: pathlib.Path | None, say: Callable) -> Link | None:
    """The line to config.swarm.relay, which need not be up; None where none is named. ConfigError, IdentityError."""
    s = config.swarm
    if not s.relay:
        return None
    if jax.process_count() > 1:
        raise ConfigError(
            f"swarm.relay={s.relay} with {jax.process_count()} processes", "a run of several processes shares nothing",
            'swarm.relay=""',
        )  # fmt: skip
    identity = identity_of(config, folder, say)
    say("note", text=f"peer {identity.peer_id} ({identity.name}) shares run {s.run} over relay {s.relay}")
    options = LinkOptions(s.relay, s.run, s.tls, _roots(s.tls_ca), s.buffer)
    return Link(options, identity)


def identity_of(config: Config, folder: pathlib.Path | None, say: Callable) -> Identity:
    """swarm.identity, else peer.key of the run folder, made on first use; without a folder one that is not kept."""
    if config.swarm.identity:
        path = pathlib.Path(config.swarm.identity)
    elif folder is None:
        return new_identity()
    else:
        path = folder / KEY_FILE
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_identity(new_identity(), path)
    identity = read_identity(path)
    warning = exposure(path)
    if warning:
        say("note", text=f"warning: {warning}")
    return identity


def usable_task(held_out: frozenset[str], fits: Callable[[Task], bool]) -> Callable[[Task], Task]:
    """Passes a peer's task on, or raises Rejected: it is held out (by id or question), or its prompt is too long."""

    def admit(task: Task) -> Task:
        if task.id in held_out or question_key(task) in held_out:
            raise Rejected("held_out")
        if not fits(task):
            raise Rejected("too_long")
        return task

    return admit


def trainable_task(config: Config, known: Iterable[Task], usable: Callable[[Task], Task]) -> Callable[[Task], Task]:
    """The task of a peer's group as this node trains on it: its own copy where its data sets hold the task, else one
    that passes every rule for a proposal. Rejected otherwise: a peer could call anything a data set's task."""
    by_id = {task.id: task for task in known}

    def admit(task: Task) -> Task:
        own = by_id.get(task.id)
        return usable(own if own is not None else checked_proposal(task, config.proposer))

    return admit


def _roots(path: str) -> bytes:
    if not path:
        return b""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"swarm.tls_ca: {path} cannot be read: {e.strerror or e}") from None
