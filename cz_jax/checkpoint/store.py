"""The checkpoints of one run.

    checkpoints/.lock              held by the trainer that may write here (not in a bucket)
    checkpoints/12/arrays/         the arrays, written by Orbax
    checkpoints/12/host.json       everything else
    checkpoints/12/manifest.json   written last: a step without a valid one is not whole

They lie in a folder or in a bucket (see places.py). A step that is not whole is never loaded and never counted. It
stays where it is, and is renamed to `12.broken-1` when its round is saved again. Once there is a whole step of its
round or a later one, it is removed if its save never finished; a step that was damaged afterwards is left for the user
to look at.
"""

import contextlib
import json
import logging
import math
import operator
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cz_jax.checkpoint import manifest
from cz_jax.checkpoint.manifest import ArraySpec
from cz_jax.checkpoint.places import Broken, place_at
from cz_jax.errors import CheckpointError
from cz_jax.nouns import canonical_json
from cz_jax.parallel import any_process

SAVE_DEADLINE_S = 1800
ARRAYS, HOST = "arrays", "host.json"
STEP = re.compile(r"0|[1-9]\d*")
UNFINISHED = re.compile(r"(\d+)\.orbax-checkpoint-tmp.*")
DEBRIS = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*|\.broken-\d+)?")
WRITE_ERRORS = (OSError, ValueError, RuntimeError, CheckpointError)  # TensorStore tells a full disk as a ValueError

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores a run in `folder`, a path or gs://BUCKET/PREFIX. A context manager; `close` waits for what is
    being written.

    keep, keep_best: the newest `keep` (at least 1) whole steps stay, and the `keep_best` with the highest scores.
    lock: True for the one trainer that writes here; False to read only, while a trainer may be writing.
    skipped: names of the steps that the last `latest` or `restore` passed over because they are not whole.

    With several JAX processes on one shared folder, all of them call `save`, `latest` and `restore` alike; process 0
    holds the lock, decides, and writes the manifest. CheckpointError where the folder cannot be used or another trainer
    has it.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int, keep_best: int, lock: bool = True):
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep must be at least 1 and keep_best at least 0, not {keep} and {keep_best}")
        self.place = place_at(folder)
        self.keep, self.keep_best = keep, keep_best
        self.skipped: list[str] = []
        self._damaged: set[str] = set()
        self._primary, self._writes = jax.process_index() == 0, lock
        self._pending: tuple[int, Future] | None = None
        self._lock = self.place.claim() if lock and self._primary else None
        # Trained weights hardly shrink, and to compress them takes longer than to write and hash them.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._quiet = _RaisedAnyway()
        logging.getLogger("absl").addFilter(self._quiet)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.close()
        except CheckpointError as e:
            if kind is None:
                raise
            log.error("%s", e)  # the first error is the one to be told

    def close(self) -> None:
        """Waits for the save under way and gives the lock back. CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown(wait=False)
            with contextlib.suppress(*WRITE_ERRORS):
                self._orbax.close()  # an error of the last save was told by wait
            logging.getLogger("absl").removeFilter(self._quiet)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def save(self, round_number: int, arrays, host: dict, score: float | None = None) -> None:
        """Saves a pytree of jax.Array and a dict of JSON values as `round_number`.

        Returns once the arrays are copied: they may be donated at once, and writing goes on in the background.
        host: tuples come back as lists and keys as strings. score: higher is better; None is never among the best.
        Waits for the save before this one. CheckpointError if that one failed, if the disk is full, or if a whole step
        of this round or a later one is there. ValueError or TypeError for a host dict that is not strict JSON (NaN) or
        leaves that are not jax.Array.
        """
        if not self._writes:
            raise ValueError("these checkpoints were opened with lock=False, to be read only")
        if round_number < 0 or (score is not None and not math.isfinite(score)):
            raise ValueError(f"a round number from 0 up and a finite score or None, not {round_number!r} and {score!r}")
        round_number = operator.index(round_number)
        host_json = canonical_json(host).encode("ascii")
        named = _named(arrays)
        for name, leaf in named.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{name} is a {type(leaf).__name__}, not a jax.Array")
        error = self._settle() or (self._make_room(round_number) if self._primary else None)
        if any_process(error is not None):
            raise error or CheckpointError(f"round {round_number} was not saved: another process could not")
        step = str(round_number)
        try:
            with self.place.told():
                self._orbax.save(self.place.url(step, ARRAYS), args=ocp.args.PyTreeSave(named))
        except WRITE_ERRORS as e:
            self._discard(step)
            raise _failed(round_number, e) from e
        score = None if score is None else float(score)
        job = self._worker.submit(self._finish, step, host_json, score, _specs(named))
        self._pending = (round_number, job)

    def wait(self) -> None:
        """Returns when nothing is being written. CheckpointError if the last save failed; older steps are intact."""
        error = self._settle()
        if error is not None:
            raise error

    def latest(self) -> int | None:
        """The newest round whose step is whole, every byte checked; None if there is none. See `skipped`."""
        self.wait()
        number = self._newest_whole()[0] if self._primary else None
        return _from_process_0(number)

    def dtypes(self) -> dict[str, str]:
        """The dtype of each array of the newest whole step, by its path. CheckpointError if no step is whole."""
        return {spec.name: spec.dtype for spec in self._open(None)[1]}

    def restore(self, target=None, round_number: int | None = None, partial: bool = False) -> tuple[int, object, dict]:
        """(round number, arrays, host dict) of the newest whole step, or of `round_number`.

        target: a pytree of jax.ShapeDtypeStruct or jax.Array; each array comes back with the sharding of its leaf
        (none: the first local device), which need not be the one it was saved with. None: a flat dict by the arrays'
        paths. partial: only the target's arrays are wanted, others are not read. CheckpointError if no step is whole,
        and if an array's path, shape or dtype differs from the target's: nothing is ever cast.
        """
        step, saved, host = self._open(round_number)
        named = _named(target) if target is not None else {s.name: _struct(s) for s in saved}
        compared = tuple(spec for spec in saved if spec.name in named) if partial else saved
        difference = manifest.first_difference(compared, _specs(named))
        if difference:
            raise CheckpointError(
                f"checkpoint {self.place}/{step} does not fit: {difference}",
                "it was saved with another model, dtype or optimizer",
                "resume with the config.toml of that run, or use another folder",
            )
        arrays = self._load(step, named, partial)
        if target is not None:
            arrays = jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in named])
        return int(step), arrays, host

    def _open(self, round_number: int | None) -> tuple[str, tuple[ArraySpec, ...], dict]:
        """(name, arrays of the manifest, host dict) of the newest whole step, or of `round_number`."""
        self.wait()
        number, why = self._choose(round_number) if self._primary else (None, "process 0 found none")
        number = _from_process_0(number)
        if number is None:
            raise CheckpointError(f"{self.place}: {why}", "", "another run folder, or start anew without --resume")
        step = str(number)
        try:
            return step, manifest.read(self.place, step).arrays, json.loads(self.place.read(step, HOST))
        except (OSError, Broken) as e:
            raise CheckpointError(f"checkpoint {self.place}/{step} went away while it was read: {e}") from None

    def _load(self, step: str, named: dict, partial: bool) -> dict:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here) for n, a in named.items()}
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        try:
            with self.place.told():
                return self._orbax.restore(
                    self.place.url(step, ARRAYS),
                    args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=partial),
                )
        except WRITE_ERRORS as e:
            raise CheckpointError(f"checkpoint {self.place}/{step} cannot be read: {e}") from e

    def _finish(self, step: str, host_json: bytes, score: float | None, specs: tuple[ArraySpec, ...]):
        """Runs in the background thread: whole or, where something failed, gone."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._discard, step)
            with self.place.told():
                self._orbax.wait_until_finished()
            if self._primary:
                self.place.write(step, HOST, host_json)
                manifest.write(self.place, step, score, specs)
                self.place.made()
            undo.pop_all()
        if self._primary:
            self._retain(int(step))

    def _settle(self) -> CheckpointError | None:
        """Waits for the save under way; what went wrong with it, once."""
        if self._pending is None:
            return None
        number, job = self._pending
        try:
            error = job.exception(timeout=SAVE_DEADLINE_S)
        except TimeoutError:
            return CheckpointError(f"round {number} is not written after {SAVE_DEADLINE_S} s", "a disk that hangs")
        self._pending = None
        if error is None:
            return None
        if not isinstance(error, WRITE_ERRORS):
            raise error
        told = _failed(number, error)
        told.__cause__ = error
        return told

    def _steps(self) -> list[tuple[int, str]]:
        """Everything named like a step or like one that never was, newest first."""
        found = []
        for name in self.place.names():
            unfinished = UNFINISHED.fullmatch(name)
            if unfinished or STEP.fullmatch(name):
                found.append((int(unfinished[1] if unfinished else name), name))
        return sorted(found, key=lambda entry: (entry[0], entry[1] == str(entry[0])), reverse=True)

    def _problem(self, step: str) -> str | None:
        """Why the step is not whole, after checking all of it; None if it is."""
        if not STEP.fullmatch(step):
            return "it is what a save left that did not finish"
        try:
            manifest.verify(self.place, step)
        except Broken as e:
            self._damaged.add(step)
            return str(e)
        self._damaged.discard(step)
        return None

    def _newest_whole(self) -> tuple[int | None, list[str]]:
        self.skipped, reasons = [], []
        for number, step in self._steps():
            problem = self._problem(step)
            if problem is None:
                return number, reasons
            self.skipped.append(step)
            reasons.append(f"{step}: {problem}")
            log.warning("checkpoint %s/%s is skipped: %s", self.place, step, problem)
        return None, reasons

    def _choose(self, round_number: int | None) -> tuple[int | None, str]:
        """The round to restore, or None and why there is none."""
        if round_number is None:
            number, reasons = self._newest_whole()
            return number, f"no checkpoint here is whole ({'; '.join(reasons)})" if reasons else "no checkpoint here"
        self.skipped = []
        step = str(round_number)
        if not self.place.has(step):
            there = sorted(n for n, name in self._steps() if name == str(n))
            return None, f"no checkpoint of round {round_number}; there are {there or 'none'}"
        problem = self._problem(step)
        return (round_number, "") if problem is None else (None, f"checkpoint {round_number} is not whole: {problem}")

    def _make_room(self, round_number: int) -> CheckpointError | None:
        """Moves a broken step of this round aside and makes an empty one. A whole one of this round or a later one is
        refused: to go on from an older round in the same place would leave two histories in it."""
        step = str(round_number)
        try:
            for number, name in self._steps():
                if number < round_number:
                    break
                if self._problem(name) is None:
                    return CheckpointError(
                        f"round {round_number} cannot be saved: {self.place} holds a whole checkpoint of round "
                        f"{number}",
                        "the run went on from an older one, or the round was saved already",
                        "resume from the newest checkpoint, or use another folder",
                    )
            if self.place.has(step):
                taken = (f"{step}.broken-{k}" for k in range(1, 1 << 20))
                aside = next(name for name in taken if not self.place.has(name))
                self.place.move(step, aside)
                self._damaged.discard(step)
                log.warning("checkpoint %s/%s is not whole: moved to %s", self.place, step, aside)
            self.place.make(step)
        except (OSError, CheckpointError) as e:
            return _failed(round_number, e)
        return None

    def _retain(self, newest: int) -> None:
        """Removes what neither is to be kept nor is worth keeping; `newest` has just become whole."""
        scores = {}
        for number, step in self._steps():
            if step == str(number) and step not in self._damaged:
                with contextlib.suppress(Broken):
                    scores[number] = manifest.read(self.place, step).score
        kept = set(sorted(scores, reverse=True)[: self.keep])
        ranked = sorted((n for n in scores if scores[n] is not None), key=lambda n: (scores[n], n), reverse=True)
        kept |= {newest, *ranked[: self.keep_best]}
        for number in scores.keys() - kept:
            self._discard(str(number))
        for name in self.place.names():
            debris = DEBRIS.fullmatch(name)
            if debris and int(debris[1]) <= newest and self._never_finished(name):
                self._discard(name)

    def _never_finished(self, step: str) -> bool:
        try:
            return manifest.NAME not in self.place.files(step)
        except (OSError, Broken, CheckpointError):
            return False

    def _discard(self, step: str) -> None:
        """Removes a step, its manifest first: what a kill leaves of it is then a step that never finished."""
        if not self._primary:
            return
        try:
            self.place.remove(step, manifest.NAME)
        except (OSError, Broken, CheckpointError) as e:
            log.warning("checkpoint %s/%s cannot be removed: %s", self.place, step, getattr(e, "strerror", None) or e)


def _named(tree) -> dict:
    """The leaves by their path in the tree ("params.layers.q.kernel"), in the tree's order."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise ValueError(f"two arrays of the tree have the path {name}")
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise TypeError(f"{name} is a {type(leaf).__name__}, neither a jax.Array nor a jax.ShapeDtypeStruct")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed key: save jax.random.key_data of it")
        named[name] = leaf
    if not named:
        raise ValueError("a tree without arrays cannot be a checkpoint")
    return named


def _specs(named: dict) -> tuple[ArraySpec, ...]:
    return tuple(ArraySpec(name, tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in named.items())


def _struct(spec: ArraySpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype))


def _failed(round_number: int, error: Exception) -> CheckpointError:
    full = "no space" in str(error).lower()
    why = "the disk is full: free some space, or keep fewer" if full else "older checkpoints are intact"
    return CheckpointError(f"the checkpoint of round {round_number} could not be written: {error}", why)


class _RaisedAnyway(logging.Filter):
    """Orbax logs a failed write several times over, each with its traceback, and then raises it; raising is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _from_process_0(number: int | None) -> int | None:
    if jax.process_count() == 1:
        return number
    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number)))
    return None if told < 0 else told
