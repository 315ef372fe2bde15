"""Saving a run and restoring it exactly: parameters and optimizer state with Orbax, host state as JSON, and an own
manifest of checksums, because Orbax alone loads a flipped bit, a renamed step and a changed dtype without a word."""

from cz_jax.checkpoint.places import held
from cz_jax.checkpoint.store import Checkpoints

__all__ = ["Checkpoints", "held"]
