"""Writes tests/golden/: two tiny random models as Hugging Face folders, and what transformers computes with them.

    python scripts/make_golden_logits.py [OUT]          needs torch; OUT is tests/golden by default

For each family: tiny_FAMILY/ (float32 weights, config.json, generation_config.json) and logits_FAMILY.npz with
`tokens` int32 [3, 40], `logits` float32 [3, 40, V], `prompts` int32 [3, 9] and `greedy` int32 [3, 64]: the tokens that
follow each prompt at temperature 0, with no token that ends the text. Weights are drawn with numpy, wide enough that
attention is not uniform and that greedy choices are far from ties; biases and norms are not at their usual values.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from cz_jax.models.spec import arch_from_config, weights

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, CONTEXT = 320, 48, 96, 3, 4, 2, 512
SMALLEST_MARGIN = 1e-2  # between the two largest logits of a greedy step
FAMILIES = {
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen3": {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
              "head_dim": 16, "attention_bias": False},
}  # fmt: skip


def config_of(family: str) -> dict:
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT, "hidden_act": "silu",
        "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "use_cache": True,
        "initializer_range": 0.02, "bos_token_id": 317, "eos_token_id": 319, "torch_dtype": "float32",
        **FAMILIES[family],
    }  # fmt: skip


def random_tensors(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tensors = {}
    for w in weights(arch_from_config(config)):
        for name in w.hf_names():
            noise = rng.standard_normal(w.hf_shape)
            if w.init == "ones":
                value = 1.0 + 0.3 * noise
            elif w.init == "zeros":
                value = 0.5 * noise
            else:
                value = noise * (0.25 if w.path == ("embed",) else 1.5 / np.sqrt(w.hf_shape[-1]))
            tensors[name] = value.astype(np.float32)
    return tensors


def write_folder(folder: pathlib.Path, config: dict, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(config, rng), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 317, "pad_token_id": 317, "eos_token_id": [319, 317]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@torch.no_grad()
def answers_of(folder: pathlib.Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = model.state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(loaded[name].numpy(), value, err_msg=name)
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens, prompts = rng.integers(0, VOCAB, (3, 40)), rng.integers(0, VOCAB, (3, 9))
    logits = model(torch.tensor(tokens)).logits.numpy()
    ids = torch.tensor(prompts)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64)
    assert text.shape == (3, 73), text.shape
    top = model(text).logits[:, 8:-1].topk(2).values
    margin = float((top[..., 0] - top[..., 1]).min())
    distinct = [len(set(row)) for row in text[:, 9:].tolist()]
    print(
        f"{folder.name}: smallest greedy margin {margin:.3g}, distinct greedy tokens {distinct}, std {logits.std():.3g}"
    )
    assert min(distinct) > 10, f"{folder.name}: greedy text repeats itself; change the seed"
    assert margin > SMALLEST_MARGIN, (
        f"{folder.name}: a greedy margin of {margin:.2g} is too near a tie; change the seed"
    )
    return {
        "tokens": tokens.astype(np.int32), "logits": logits.astype(np.float32),
        "prompts": prompts.astype(np.int32), "greedy": text[:, 9:].numpy().astype(np.int32),
    }  # fmt: skip


def main(out: pathlib.Path) -> None:
    torch.set_num_threads(1)
    for family, seed in (("qwen2", 4), ("qwen3", 45)):
        folder, rng = out / f"tiny_{family}", np.random.default_rng(seed)
        write_folder(folder, config_of(family), rng)
        np.savez_compressed(out / f"logits_{family}.npz", **answers_of(folder, rng))


if __name__ == "__main__":
    default = pathlib.Path(__file__).resolve().parents[1] / "tests" / "golden"
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default)
