"""How much the queue of rows inside of the sampling program saves where answers end at different lengths.

    nice python scripts/bench_queue.py [--model random:qwen2-50m] [--prompts 64] [--group 8] [--slots 64]
                                       [--prompt-tokens 192] [--shortest 16] [--longest 128] [--repeats 3]

Answers have lengths drawn uniformly between the two. Beside the queue the same rows are sampled in calls of as many as
there are slots, each of which lasts as long as its longest row. Both run in turn, and a ratio is one of a pair. The
tokens are compared: they are the same but where rounding meets the edge of a draw.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from cz_jax import parallel, rng, shapes
from cz_jax.build.models import load_model
from cz_jax.ports import SamplingMethod
from cz_jax.sampling.generate import generate
from cz_jax.sampling.queue import generate_queued

NO_STOP = np.array([-1], np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:qwen2-50m")
    for name, value in (("prompts", 64), ("group", 8), ("slots", 64), ("prompt-tokens", 192), ("shortest", 16),
                        ("longest", 128), ("repeats", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    mesh = parallel.make_mesh(1, -1, 1, jax.devices()[:1])
    loaded = load_model(a.model, None, "float32", mesh)
    draws = np.random.default_rng(0)
    prompts = draws.integers(3, loaded.arch.vocab_size, (a.prompts, a.prompt_tokens)).astype(np.int32)
    lengths = np.full(a.prompts, a.prompt_tokens, np.int32)
    limits = draws.integers(a.shortest, a.longest + 1, (a.prompts, a.group)).astype(np.int32)
    keys = rng.key_data(draws.integers(0, 1 << 63, (a.prompts, a.group), dtype=np.uint64))
    at_once = max(1, a.slots // a.group)
    options = {"max_new_tokens": a.longest, "method": SamplingMethod()}

    def queued():
        rows = (prompts, lengths, keys, limits)
        stages = shapes.stages(a.slots, 1, jax.default_backend())
        out = generate_queued(loaded.arch, loaded.params, *rows, NO_STOP, stages=stages, ways=1, **options)
        return np.asarray(out.tokens)

    def in_calls():
        parts = []
        for at in range(0, a.prompts, at_once):
            rows = (x[at : at + at_once] for x in (prompts, lengths, keys, limits))
            parts.append(np.asarray(generate(loaded.arch, loaded.params, *rows, NO_STOP, **options).tokens))
        return np.concatenate(parts)

    def seconds(work):
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    with jax.set_mesh(mesh):
        differing = (queued() != in_calls()).any(-1).mean()  # and both are compiled
        pairs = [(seconds(queued), seconds(in_calls)) for _ in range(a.repeats)]
    ratios = sorted(calls / queue for queue, calls in pairs)
    longest = limits.reshape(-1, at_once * a.group).max(1) if a.prompts % at_once == 0 else np.array([a.longest])
    print(f"{limits.size} rows of {limits.mean():.0f} tokens on average, {a.slots} slots, {a.model}")
    print(f"steps: at least {-(-limits.sum() // a.slots)} with the queue, {longest.sum()} in calls")
    print(f"queue {statistics.median(q for q, _ in pairs):.2f} s, calls {statistics.median(c for _, c in pairs):.2f} s")
    print(f"x {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); rows that differ: {differing:.2%}")


if __name__ == "__main__":
    main()
