"""SIGTERM as an interrupt that a run answers."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from cz_jax.errors import Preempted


@contextlib.contextmanager
def sigterm_preempts(raising: bool) -> Iterator[Callable[[], bool]]:
    """While the block lasts, gives a function that tells whether SIGTERM came, and with `raising` the first one raises
    Preempted in it. Later ones do not disturb it: a machine that shuts down may send several. Only in the main thread,
    as Python has it; elsewhere it changes nothing."""
    came: list[int] = []  # not an Event, whose lock a signal in the middle of a signal would wait for
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def preempt(number, frame):
        if not came:
            came.append(number)
            if raising:
                raise Preempted

    before = signal.signal(signal.SIGTERM, preempt)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
