"""Group commit: one thread that appends what many callers hand in, as much as there is with one write to disk."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from cz_jax.swarm.store import Conflict, Item, Store, StoreFailed

COMMIT_ITEMS = 1024  # in one commit
PRUNE_SECONDS = 5.0


class Busy(Exception):
    """More waits to be written than the queue may hold."""


class SteadyClock:
    """Milliseconds since 1970 that no later change of the machine's clock moves: retention counts on it."""

    def __init__(self):
        self._start = time.time() - time.monotonic()

    def __call__(self) -> int:
        return int((self._start + time.monotonic()) * 1000)


class Writer(threading.Thread):
    """Owns writing to `store`. `committed(batches)` is called, in this thread, with what a commit has added to.

    `most_items` and `most_bytes` bound what waits; `retain_ms` and `retain_bytes` what is kept.
    """

    def __init__(
        self,
        store: Store,
        committed: Callable[[Sequence[tuple[str, str]]], None],
        failed: Callable[[str], None],
        most_items: int,
        most_bytes: int,
        retain_ms: int,
        retain_bytes: int,
        now_ms: Callable[[], int] | None = None,
    ):
        super().__init__(name="relay writer", daemon=True)
        self._store, self._committed, self._failed = store, committed, failed
        self._most_items, self._most_bytes = most_items, most_bytes
        self._retain_ms, self._retain_bytes = retain_ms, retain_bytes
        self._now_ms = now_ms or SteadyClock()
        self._jobs: deque[tuple[str, Sequence[Item], Future]] = deque()
        self._items = self._bytes = 0  # of jobs that are not yet answered
        self._changed = threading.Condition()
        self._stopping = False

    @property
    def waiting(self) -> int:
        return self._items

    def submit(self, run: str, items: Sequence[Item]) -> Future:
        """The list of Appended of a batch once it is on disk; Conflict or StoreFailed otherwise. Busy where the queue
        is full or closed."""
        size = sum(len(i.envelope) for i in items)
        with self._changed:
            if self._stopping or self._items + len(items) > self._most_items or self._bytes + size > self._most_bytes:
                raise Busy
            self._items += len(items)
            self._bytes += size
            future: Future = Future()
            self._jobs.append((run, items, future))
            self._changed.notify()
        return future

    def stop(self, timeout: float) -> bool:
        """Writes what was handed in and ends the thread; whether it has ended within `timeout` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.join(timeout)
        return not self.is_alive()

    def run(self) -> None:
        pruned = 0.0
        while True:
            jobs = self._next_jobs()
            if jobs:
                self._commit(jobs)
            elif self._stopping:
                return
            if time.monotonic() - pruned >= PRUNE_SECONDS:
                pruned = time.monotonic() if self._prune() == 0 else pruned

    def _next_jobs(self) -> list[tuple[str, Sequence[Item], Future]]:
        with self._changed:
            if not self._jobs and not self._stopping:
                self._changed.wait(1.0)
            taken, count = [], 0
            while self._jobs and (not taken or count + len(self._jobs[0][1]) <= COMMIT_ITEMS):
                taken.append(self._jobs.popleft())
                count += len(taken[-1][1])
            return taken

    def _commit(self, jobs: list[tuple[str, Sequence[Item], Future]]) -> None:
        try:
            results = self._store.append([(run, items) for run, items, _ in jobs], self._now_ms())
        except Exception as e:  # whatever it was, it is told, and every caller gets it instead of waiting
            self._failed(f"{e}" if isinstance(e, StoreFailed) else repr(e))
            results = [e if isinstance(e, StoreFailed) else StoreFailed(repr(e))] * len(jobs)
        with self._changed:
            self._items -= sum(len(items) for _, items, _ in jobs)
            self._bytes -= sum(len(i.envelope) for _, items, _ in jobs for i in items)
        added = set()
        for (run, items, future), result in zip(jobs, results, strict=True):
            if isinstance(result, (Conflict, StoreFailed)):
                future.set_exception(result)
                continue
            added |= {(run, i.kind) for i, done in zip(items, result, strict=True) if not done.duplicate}
            future.set_result(result)
        if added:
            self._committed(sorted(added))

    def _prune(self) -> int:
        try:
            return self._store.prune(self._now_ms() - self._retain_ms, self._retain_bytes)
        except StoreFailed as e:
            self._failed(str(e))
            return 0
