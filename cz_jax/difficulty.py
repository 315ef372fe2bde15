"""The proposer's level, moved by how often solvers succeed at it.

`band` (the default) reacts to the success rate itself: above the band the next level, below it the one before, counted
over outcomes at the current level only. Two things keep noise from moving it: a rate counts from `min_count` outcomes
on, and must leave the band by `hysteresis` or more. With the defaults (24 outcomes, 0.3..0.7, 0.05) a solver that is
right half the time needs 18 of 24 to move, 2.4 standard errors away, and 3.5 at a full window of 48. That holds for
independent outcomes; answers to one task are alike, so raise `min_count` and `window` along with the group size.
`trend` is the reference's rule, kept for comparison: it reacts to change, so that a constant success rate of 1 never
moves it and one of 0.5 lets it walk at random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cz_jax.config import LevelConfig
from cz_jax.nouns import MAX_LEVEL, MIN_LEVEL, Level

TREND_OUTCOMES = 10  # in each of the two means that "trend" compares
TREND_STEP = 0.05


@dataclass(frozen=True, slots=True)
class LevelState:
    """The level (1..5) and the outcomes (0..1, oldest first) that the next move is decided on."""

    level: int
    outcomes: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "level", int(Level(self.level)))
        object.__setattr__(self, "outcomes", tuple(_outcome(x) for x in self.outcomes))

    def to_dict(self) -> dict:
        return {"level": self.level, "outcomes": list(self.outcomes)}

    @classmethod
    def from_dict(cls, value: dict) -> "LevelState":
        """Inverse of `to_dict`. ValueError for anything else."""
        if not isinstance(value, dict) or set(value) != {"level", "outcomes"}:
            raise ValueError("a level state holds exactly level and outcomes")
        try:
            return cls(**value)
        except TypeError as e:
            raise ValueError(f"not a level state: {e}") from None


def adapt(state: LevelState, successes: Sequence[bool | float], config: LevelConfig) -> LevelState:
    """The state after a round whose rollouts at the current level had `successes` (1 or 0, or within 0..1), at most one
    level away. No successes: no change. ValueError for a success that is NaN or outside of 0..1."""
    new = tuple(_outcome(x) for x in successes)
    if not new:
        return state
    return _trend(state, new) if config.rule == "trend" else _band(state, new, config)


def _band(state: LevelState, new: tuple[float, ...], config: LevelConfig) -> LevelState:
    outcomes = (state.outcomes + new)[-config.window :]
    if len(outcomes) < config.min_count:
        return LevelState(state.level, outcomes)
    rate = math.fsum(outcomes) / len(outcomes)
    step = (rate >= config.high + config.hysteresis) - (rate <= config.low - config.hysteresis)
    level = min(MAX_LEVEL, max(MIN_LEVEL, state.level + step))
    return LevelState(level, outcomes if level == state.level else ())


def _trend(state: LevelState, new: tuple[float, ...]) -> LevelState:
    outcomes = (state.outcomes + new)[-2 * TREND_OUTCOMES :]
    if len(outcomes) < 2 * TREND_OUTCOMES:
        return LevelState(state.level, outcomes)
    before, last = (math.fsum(half) / TREND_OUTCOMES for half in (outcomes[:TREND_OUTCOMES], outcomes[TREND_OUTCOMES:]))
    step = (last - before > TREND_STEP) - (before - last > TREND_STEP)
    return LevelState(min(MAX_LEVEL, max(MIN_LEVEL, state.level + step)), outcomes)


def _outcome(value) -> float:
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"a success is within 0..1, not {value}")
    return value
