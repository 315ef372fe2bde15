"""The few sizes that compiled shapes come in, so that a run compiles a handful of programs and not one a batch."""

import jax
import jax.numpy as jnp

LADDER = (
    16,
    32,
    64,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8192,
    12288,
    16384,
    32768,
)

FEWEST = 16  # rows of a queue's stage that another one precedes


def rung(length: int) -> int:
    """The smallest size of the ladder that holds `length` tokens."""
    for size in LADDER:
        if length <= size:
            return size
    raise ValueError(f"{length} tokens exceed the longest supported sequence of {LADDER[-1]}")


def rows(count: int, multiple: int = 1) -> int:
    """The smallest power of two that holds `count` rows, raised to a multiple of `multiple` (ways a batch is split)."""
    size = 1 << max(0, count - 1).bit_length()
    return -(-size // multiple) * multiple


def judged(task: int, answer: int) -> tuple[int, int]:
    """The padded lengths of a task and of the answers to it that are judged, with the words around them. Few are
    shorter than 256 and 128 tokens, and a program for those takes longer to compile than it saves."""
    return rung(max(task, 256)), rung(max(answer, 128))


def group(count: int) -> int:
    """The padded number of answers to one task: 2, or a multiple of 8."""
    return 2 if count <= 2 else -(-count // 8) * 8


def cache_lengths(new_tokens: int) -> tuple[int, ...]:
    """How long the caches of a call's new tokens are, one length after the other: half, then all, so that its early
    steps do not read the second half, which is empty yet. Each length is compiled, so that few tokens have one."""
    half = -(-new_tokens // 32) * 16
    return (half, new_tokens) if new_tokens >= 64 else (new_tokens,)


def slots(most: int, multiple: int) -> int:
    """`most`, lowered to a multiple of `multiple` that is not 0."""
    return max(1, most // multiple) * multiple


def stages(most: int, multiple: int, platform: str) -> tuple[int, ...]:
    """How many rows a queue decodes side by side, each once no more are left: `slots`, and on a CPU, where a step takes
    longer the more rows it has, a half and a quarter of that, but for few. Each is compiled."""
    counts = [slots(most, multiple)]
    while platform == "cpu" and len(counts) < 3 and counts[-1] >= 2 * FEWEST:
        counts.append(slots(counts[-1] // 2, multiple))
    return tuple(counts)


def filled(lengths_MPG: jax.Array) -> jax.Array:
    """int32 []: how many of M steps there are up to the last with a row that has tokens; a loop makes no others."""
    some_M = (lengths_MPG > 0).any((1, 2))
    return jnp.max(jnp.where(some_M, jnp.arange(1, len(some_M) + 1), 0))
