"""The tiny random models of tests/golden, loaded without the converter, and what transformers makes of them."""

import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from cz_jax.models.spec import arch_from_folder, tree_of, weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("qwen2", "qwen3")


def load(family: str):
    """(arch, float32 params, the npz of inputs and transformers' outputs)."""
    folder = GOLDEN / f"tiny_{family}"
    arch, tensors = arch_from_folder(folder), load_file(folder / "model.safetensors")

    def leaf(w):
        each = [tensors[n].T if w.transposed else tensors[n] for n in w.hf_names()]
        return jnp.asarray(np.stack(each) if w.stacked else each[0])

    return arch, tree_of(weights(arch), leaf), np.load(GOLDEN / f"logits_{family}.npz")


class PlainTokenizer:
    """Numbers in, numbers out: an engine's tokenizer for tests that are about tokens."""

    pad_id = 0

    def __init__(self, eos_ids=(2,)):
        self.eos_ids = eos_ids

    def decode(self, tokens):
        return " ".join(map(str, tokens))
