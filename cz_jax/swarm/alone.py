"""The exchange of a node that is alone: what it publishes goes nowhere, and nothing comes back."""

from collections.abc import Sequence

from cz_jax.nouns import Group


class Alone:
    """Implements `ports.Exchange` without peers."""

    def publish(self, groups: Sequence[Group]) -> None:
        pass

    def fetch(self, count: int, round_number: int) -> tuple[Group, ...]:
        return ()

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass
