"""The training order of tasks: several sources shuffled, repeated and mixed by weight, through grain.

grain's pipeline is a function of a position, so that its state is one number. It runs in the calling thread: nothing
is read ahead, and no thread or process is left behind.
"""

import math
import operator
from collections.abc import Callable, Sequence

import grain

from cz_jax.errors import TaskError
from cz_jax.nouns import Task, digest
from cz_jax.rng import seed_for
from cz_jax.tasks.rows import question_key

MAX_WEIGHT_RATIO = 1e6


class MixedStream:
    """Training tasks without end (a `ports.TaskStream`).

    Each of `sources` is shuffled anew in every epoch, in an order that depends on `seed`, its place and the epoch, and
    repeated without end; `weights` (one a source, any positive scale; empty: equal) say how many tasks of each are
    drawn. The mix is even rather than random: after n draws a source has had its share of n to within one or two.

    Before anything else are left out, and counted: tasks that are held out (`excluded`), by id or, if `held_out` holds
    `rows.held_out_keys`, by question too, so that a held-out question does not slip in with other tests; tasks of an
    earlier source (`duplicates`); tasks for which `max_prompt` is False, whose prompt would not fit (`too_long`).

    TaskError: no source, a source of which nothing remains, weights that do not fit.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Task, ...]],
        weights: Sequence[float],
        seed: int,
        held_out: frozenset[str],
        max_prompt: Callable[[Task], bool] | None = None,
    ):
        self.excluded = self.duplicates = self.too_long = 0
        weights = _checked_weights(weights, len(sources))
        self._sources = self._select(sources, _with_questions(held_out, sources), max_prompt)
        self._fingerprint = digest([[[t.id for t in source] for source in self._sources], weights, seed])
        self._iterator = _endless([len(source) for source in self._sources], weights, seed)
        self._deferred: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """How many tasks there are to draw from."""
        return sum(len(source) for source in self._sources)

    def take(self, count: int) -> tuple[Task, ...]:
        """The next `count` tasks. Within one call a task comes twice only where more tasks of its source are asked for
        than it has; a repeat drawn where two epochs meet waits for the next call, and is not lost."""
        taken, given = [], [set() for _ in self._sources]
        waiting, self._deferred = self._deferred, []
        while len(taken) < count:
            at = next((i for i, (s, task) in enumerate(waiting) if task not in given[s]), None)
            s, task = next(self._iterator) if at is None else waiting.pop(at)
            if task in given[s]:
                waiting.append((s, task))
                continue
            taken.append(self._sources[s][task])
            given[s].add(task)
            if len(given[s]) == len(self._sources[s]):
                given[s].clear()
        self._deferred = waiting
        return tuple(taken)

    def state(self) -> dict:
        """JSON-able; `restore` of it on a stream of the same tasks, weights and seed continues exactly."""
        position = operator.index(self._iterator.get_state()["next_index"])
        return {"position": position, "deferred": [list(d) for d in self._deferred], "fingerprint": self._fingerprint}

    def restore(self, state: dict) -> None:
        """Continues at `state`. TaskError, and no change, for one of other tasks, weights or seed, or a broken one."""
        if not isinstance(state, dict) or set(state) != {"position", "deferred", "fingerprint"}:
            raise TaskError("the saved place in the task stream cannot be read", "a damaged checkpoint?")
        if state["fingerprint"] != self._fingerprint:
            raise TaskError(
                "the saved place in the task stream belongs to other tasks, weights or another seed",
                "tasks.*, run.seed or a data file changed since the checkpoint",
                "resume with the run's own config.toml, or start anew with another --out",
            )
        position, deferred = state["position"], state["deferred"]
        sizes = [len(source) for source in self._sources]
        if (
            not _whole(position, 1 << 62)
            or not isinstance(deferred, list)
            or not all(_pair(d, sizes) for d in deferred)
        ):
            raise TaskError("the saved place in the task stream is out of range", "a damaged checkpoint?")
        self._iterator.set_state({"next_index": position})
        self._deferred = [(s, task) for s, task in deferred]

    def _select(self, sources, held_out: frozenset[str], fits) -> tuple[tuple[Task, ...], ...]:
        seen: set[str] = set()
        selected = []
        for number, source in enumerate(sources, 1):
            before = self.excluded, self.duplicates, self.too_long
            kept = []
            for task in source:
                if task.id in held_out or question_key(task) in held_out:
                    self.excluded += 1
                elif task.id in seen:
                    self.duplicates += 1
                elif fits is not None and not fits(task):
                    self.too_long += 1
                else:
                    seen.add(task.id)
                    kept.append(task)
            if not kept:
                out, twice, long = (
                    a - b for a, b in zip((self.excluded, self.duplicates, self.too_long), before, strict=True)
                )
                raise TaskError(
                    f"nothing remains of the {len(source)} tasks of task source {number}: {out} are held out, {twice} "
                    f"are in an earlier source, {long} have too long a prompt",
                    "tasks.sources and tasks.held_out name the same tasks, or sampling.max_prompt_tokens is small",
                    'tasks.sources=["builtin@train"] tasks.held_out=["builtin@held_out"]',
                )
            selected.append(tuple(kept))
        return tuple(selected)


def _endless(sizes: Sequence[int], weights: Sequence[float], seed: int):
    """grain's iterator over (source, task) numbers: shuffled, repeated, mixed, read in this thread."""
    parts = []
    for s, size in enumerate(sizes):
        shuffle_seed = seed_for(seed, "shuffle tasks", s) % (1 << 32)
        numbers = grain.MapDataset.source([(s, task) for task in range(size)])
        parts.append(numbers.shuffle(seed=shuffle_seed).repeat())
    mixed = grain.MapDataset.mix(parts, weights=weights)
    return iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _with_questions(held_out: frozenset[str], sources) -> frozenset[str]:
    """`held_out` and the question keys of those tasks of `sources` whose ids it holds."""
    return frozenset(held_out) | {question_key(task) for source in sources for task in source if task.id in held_out}


def _checked_weights(weights: Sequence[float], count: int) -> list[float]:
    if not count:
        raise TaskError("there is no task source to draw from", "", 'tasks.sources=["builtin@train"]')
    weights = [float(w) for w in weights] or [1.0] * count
    if len(weights) != count:
        raise TaskError(
            f"{len(weights)} weights for {count} task sources", "", "tasks.weights with one number a source"
        )
    if not all(math.isfinite(w) and w > 0 for w in weights) or max(weights) / min(weights) > MAX_WEIGHT_RATIO:
        raise TaskError(
            f"task weights {weights} are not positive numbers within a factor of {MAX_WEIGHT_RATIO:.0e} of each other",
            "a source that is not wanted is still listed",
            "leave it out of tasks.sources",
        )
    return weights


def _whole(value, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _pair(value, sizes: Sequence[int]) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not _whole(value[0], len(sizes)):
        return False
    return _whole(value[1], sizes[value[0]])
