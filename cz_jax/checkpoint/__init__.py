"""Saving a run and restoring it exactly: parameters and optimizer state with Orbax, host state as JSON, and an own
SHA-256 manifest, because Orbax alone loads a flipped bit, a renamed step and a changed dtype without a word."""

from cz_jax.checkpoint.store import Checkpoints

__all__ = ["Checkpoints"]
