"""A model in use: parameters on a mesh and a tokenizer behind `ports.LanguageModel`.

Prompts are padded to a ladder of lengths and calls to a few row counts, so that a run compiles a handful of programs.
What is more than a model decodes side by side is queued inside of the program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from cz_jax import parallel, rng, shapes
from cz_jax.models.spec import Arch
from cz_jax.ports import Sample, SamplingMethod
from cz_jax.sampling.generate import choice_probabilities, generate
from cz_jax.sampling.queue import generate_queued

JUDGING_TOKENS = 2048  # of one step: enough for a matmul's speed, and little that only fills up
JUDGING_STEPS = 16  # of one call at most; those without a task are not made


@dataclass
class Engine:
    """`params` is called for every use, so that a solver's engine sees its newest weights. `tokenizer`: encode_chat,
    encode, decode, eos_ids, pad_id (see convert.tokenizer). `max_sequences`: rows decoded side by side; `max_tokens`:
    tokens of the prompts that one queue holds."""

    name: str
    arch: Arch
    params: Callable[[], dict]
    tokenizer: object
    mesh: jax.sharding.Mesh
    dtype: jnp.dtype = jnp.float32
    max_sequences: int = 64
    max_tokens: int = 16384

    @property
    def max_context(self) -> int:
        return self.arch.max_context

    def encode_chat(self, messages, forced: str = "") -> list[int]:
        return self.tokenizer.encode_chat(messages, forced)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, tokens) -> str:
        return self.tokenizer.decode(tokens)

    def sample(self, prompts, seeds, max_new_tokens: int, method: SamplingMethod) -> list[list[Sample]]:
        """See ports.LanguageModel. ValueError where prompt and completion exceed the context."""
        longest = max((len(p) for p in prompts), default=0) + max_new_tokens
        if longest > self.max_context or not all(prompts):
            raise ValueError(
                f"prompts must hold 1 to {self.max_context - max_new_tokens} tokens, the longest makes {longest}"
            )
        out: list[list[Sample]] = [[] for _ in prompts]
        for call in self._calls([len(p) for p in prompts], [len(s) for s in seeds]):
            rows = self._generate([prompts[i] for i in call], [seeds[i] for i in call], max_new_tokens, method)
            for i, samples in zip(call, rows, strict=True):
                out[i] = samples
        return out

    def _calls(self, lengths: Sequence[int], groups: Sequence[int]):
        """Indices of each call's prompts, those of like length together."""
        order = sorted(range(len(lengths)), key=lambda i: (groups[i], lengths[i]))
        for group, same in groupby(order, key=lambda i: groups[i]):
            same = list(same)
            step = prompts_at_once(
                len(same), group, shapes.rung(lengths[same[-1]]), self.max_sequences, self.max_tokens
            )
            for start in range(0, len(same), step):
                yield same[start : start + step]

    def _generate(self, prompts, seeds, max_new_tokens, method):
        length, group = shapes.rung(max(map(len, prompts))), len(seeds[0])
        ways = parallel.batch_devices(self.mesh)
        count = shapes.rows(len(prompts), ways)
        tokens, lengths = pad(prompts, count, length, self.tokenizer.pad_id)
        all_seeds = np.zeros((count, group), np.uint64)
        all_seeds[: len(prompts)] = seeds
        limits = np.zeros((count, group), np.int32)
        limits[: len(prompts)] = max_new_tokens
        program, more = generate, {}
        if len(prompts) * group > self.max_sequences:
            platform = self.mesh.devices.flat[0].platform
            program, more = generate_queued, {"stages": shapes.stages(self.max_sequences, ways, platform), "ways": ways}
        with jax.set_mesh(self.mesh):
            done = program(
                self.arch, self.params(), *self._place(tokens, lengths, rng.key_data(all_seeds), limits),
                np.asarray(self.tokenizer.eos_ids, np.int32),
                max_new_tokens=max_new_tokens, method=method, dtype=self.dtype, **more,
            )  # fmt: skip
            got = parallel.to_host(done)
        return [[self._as_sample(got, p, g) for g in range(group)] for p in range(len(prompts))]

    def _as_sample(self, got, p: int, g: int) -> Sample:
        n, ended = int(got.lengths[p, g]), bool(got.ended[p, g])
        tokens = tuple(got.tokens[p, g, :n].tolist())
        logprobs = tuple(got.logprobs[p, g, :n].tolist())
        return Sample(tokens, logprobs, ended, self.decode(tokens[:-1] if ended else tokens))

    def choice_probabilities(self, prompts, choices) -> list[list[list[float]]]:
        """See ports.LanguageModel."""
        split = [common_prefix(rows) for rows in prompts]
        suffixes = [[row[n:] for row in rows] for rows, n in zip(prompts, split, strict=True)]
        shape = [
            (*shapes.judged(n, max(map(len, rows))), shapes.group(len(rows)))
            for n, rows in zip(split, suffixes, strict=True)
        ]
        out: list[list[list[float]]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=shape.__getitem__)
        for key, same in groupby(order, key=shape.__getitem__):
            same = list(same)
            at_once = judged_at_once(*key, parallel.batch_devices(self.mesh))
            for start in range(0, len(same), JUDGING_STEPS * at_once):
                call = same[start : start + JUDGING_STEPS * at_once]
                prefixes = [prompts[i][0][: split[i]] for i in call]
                found = self._choose(prefixes, [suffixes[i] for i in call], (at_once, *key), choices)
                for i, rows in zip(call, found, strict=True):
                    out[i] = rows
        return out

    def _choose(self, prefixes, suffixes, shape, choices):
        at_once, prefix_length, suffix_length, group = shape
        count, steps = JUDGING_STEPS * at_once, (JUDGING_STEPS, at_once)
        tokens, lengths = pad(prefixes, count, prefix_length, self.tokenizer.pad_id)
        rows = np.full((count, group, suffix_length), self.tokenizer.pad_id, np.int32)
        row_lengths = np.zeros((count, group), np.int32)
        for p, group_rows in enumerate(suffixes):
            for g, row in enumerate(group_rows):
                rows[p, g, : len(row)], row_lengths[p, g] = row, len(row)
        arrays = [a.reshape(*steps, *a.shape[1:]) for a in (tokens, lengths, rows, row_lengths)]
        with jax.set_mesh(self.mesh):
            got = parallel.to_host(choice_probabilities(
                self.arch, self.params(), *self._place(*arrays, dimension=1), np.asarray(choices, np.int32),
                dtype=self.dtype,
            )).reshape(count, group, -1)  # fmt: skip
        return [got[p, : len(group_rows)].tolist() for p, group_rows in enumerate(suffixes)]

    def _place(self, *arrays, dimension: int = 0):
        """Host arrays as device arrays split over the batch axes of the mesh."""
        return [parallel.place_batch(self.mesh, a, dimension) for a in arrays]


def judged_at_once(prefix: int, suffix: int, group: int, ways: int) -> int:
    """How many tasks with `group` answers one step of judging takes: those of JUDGING_TOKENS padded tokens, and a
    multiple of `ways`."""
    return shapes.slots(max(ways, JUDGING_TOKENS // (prefix + suffix * group)), ways)


def prompts_at_once(prompts: int, group: int, length: int, max_sequences: int, max_tokens: int) -> int:
    """How many of `prompts`, padded to `length`, one sampling call takes with `group` rows each: all, where they are
    no more than `max_sequences` rows; else a queue of as many as `max_tokens` hold, whose caches are all kept."""
    if prompts * group <= max_sequences:
        return prompts
    return min(prompts, max(1, max_sequences // group, max_tokens // length))


def pad(rows, count: int, length: int, pad_id: int):
    """(int32 [count, length] right-padded, int32 [count] lengths); rows beyond those given hold one pad token."""
    tokens = np.full((count, length), pad_id, np.int32)
    lengths = np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def common_prefix(rows) -> int:
    """How many leading tokens all rows share, leaving each at least one token of its own."""
    most = min(len(r) for r in rows) - 1
    first = rows[0]
    for i in range(most):
        if any(r[i] != first[i] for r in rows):
            return i
    return most
