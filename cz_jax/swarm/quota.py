"""How much one peer may publish: token buckets, one a key, for a bounded number of keys."""

import time
from collections import OrderedDict
from collections.abc import Callable

BURST_SECONDS = 4.0  # what a peer that was quiet may publish at once, in seconds of its rate
MAX_KEYS = 10_000  # those that published last; a forgotten key starts with a full bucket


class Quota:
    """`rate` messages and `bytes_rate` bytes a second for each key."""

    def __init__(self, rate: float, bytes_rate: float, now: Callable[[], float] = time.monotonic):
        self._rates, self._now = (rate, bytes_rate), now
        self._buckets: OrderedDict[bytes, tuple[float, float, float]] = OrderedDict()  # messages, bytes, when

    def left(self, key: bytes) -> bool:
        """Whether the key may publish anything now; costs it nothing."""
        messages, size, _ = self._filled(key)
        return messages >= 1 and size > 0

    def take(self, key: bytes, messages: int, size: int) -> bool:
        """Takes what a batch of `messages` with `size` bytes costs, or nothing where that is not left. A batch larger
        than a whole bucket is taken from a full one."""
        filled = self._filled(key)
        full = [rate * BURST_SECONDS for rate in self._rates]
        if any(have < min(cost, most) for have, cost, most in zip(filled, (messages, size), full, strict=False)):
            return False
        self._buckets[key] = (filled[0] - messages, filled[1] - size, filled[2])
        self._buckets.move_to_end(key)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)
        return True

    def _filled(self, key: bytes) -> tuple[float, float, float]:
        now = self._now()
        full = [rate * BURST_SECONDS for rate in self._rates]
        *have, since = self._buckets.get(key, (*full, now))
        messages, size = (
            min(most, h + rate * (now - since)) for h, most, rate in zip(have, full, self._rates, strict=True)
        )
        return messages, size, now
