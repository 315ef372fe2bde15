"""Running rounds so that Ctrl-C is answered within seconds, whatever compiled program is under way.

A signal reaches Python only between two of its instructions, and a compiled program may compute for a minute. So the
rounds are played in a thread of their own while the main thread waits for signals.
"""

import signal
import threading
from collections.abc import Callable

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # what a step that has already begun gets to finish


class _Stopped(Exception):
    """Ends the thread at the next thing that it reports."""


def run_interruptibly(work: Callable[[Callable], object], say: Callable, is_whole: Callable[[], bool]):
    """`work(say)` in a thread; its result, or what it raised.

    On KeyboardInterrupt (SIGTERM too, in the main thread) the work stops at its next report, and the interrupt is
    passed on at once where `is_whole()`, otherwise after a few seconds of grace. The thread may still be computing
    then.
    """
    stop, outcome = threading.Event(), {}

    def reporting(event: str, **fields):
        if stop.is_set():
            raise _Stopped
        say(event, **fields)

    def body():
        try:
            outcome["result"] = work(reporting)
        except BaseException as e:
            outcome["error"] = e

    thread = threading.Thread(target=body, name="rounds", daemon=True)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
    except KeyboardInterrupt:
        stop.set()
        thread.join(POLL_SECONDS if is_whole() else GRACE_SECONDS)
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
