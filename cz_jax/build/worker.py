"""Running rounds so that Ctrl-C and SIGTERM are answered within seconds, whatever compiled program is under way.

A signal reaches Python only between two of its instructions, and a compiled program may compute for a minute. So the
rounds are played in a thread of their own while the main thread waits for signals.
"""

import threading
import time
from collections.abc import Callable

from cz_jax.errors import Preempted

POLL_SECONDS = 0.1
UPDATE = "update"  # the phase of a round that takes the parameters apart
GRACE_SECONDS = 3.0  # what an update that has already begun gets to finish after Ctrl-C
PREEMPTED_SECONDS = 20.0  # and after SIGTERM, which leaves about 30 on a machine that is taken away


class _Stopped(Exception):
    """Ends the thread at the next thing that it reports."""


def run_interruptibly(
    work: Callable[[Callable], object], say: Callable, is_whole: Callable[[], bool], stops: Callable[[], bool] | None
):
    """`work(say)` in a thread; its result, or what it raised.

    On KeyboardInterrupt the work stops at its next phase, and the interrupt is passed on as soon as the state can be
    saved: it `is_whole()`, and no update is under way, which gets some seconds to finish. The thread may still be
    computing then. `stops()` is asked at every phase; True stops the work there and raises Preempted.
    """
    stop, ended, phase, outcome = threading.Event(), threading.Event(), {}, {}

    def reporting(event: str, **fields):
        if event in ("phase", "round"):
            phase["name"] = fields.get("name")  # before it is asked: an interrupt that comes in between sees an update
            if stop.is_set() or (stops is not None and stops()):
                raise _Stopped
        say(event, **fields)

    def body():
        try:
            outcome["result"] = work(reporting)
        except BaseException as e:
            outcome["error"] = e
        ended.set()

    threading.Thread(target=body, name="rounds", daemon=True).start()
    try:
        while not ended.wait(POLL_SECONDS):  # not Thread.join: interrupted, it takes the thread for ended
            pass
    except KeyboardInterrupt as e:
        stop.set()
        until = time.monotonic() + (PREEMPTED_SECONDS if isinstance(e, Preempted) else GRACE_SECONDS)
        ended.wait(POLL_SECONDS)
        while time.monotonic() < until and not (is_whole() and phase.get("name") != UPDATE):
            if ended.wait(POLL_SECONDS):
                break
        raise
    if isinstance(outcome.get("error"), _Stopped):
        raise Preempted
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
