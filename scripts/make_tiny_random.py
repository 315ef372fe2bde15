"""Writes cz_jax/assets/tiny: a Hugging Face folder of a Qwen2 model with random weights, small enough to be embedded.

    python scripts/make_tiny_random.py [OUT]

The tokenizer is byte-level BPE with Qwen2's pre-tokenizer, its few merges learned from CORPUS; the weights are drawn
with NumPy. The same versions of `tokenizers` and NumPy give the same bytes.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cz_jax.models.spec import arch_from_config, weights

VOCAB = 512
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
ENDOFTEXT, IM_START, IM_END, PAD = range(VOCAB - len(SPECIALS), VOCAB)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# What coding tasks, their answers and verdicts are made of; a text counts as often as its number says.
CORPUS = (
    (40, '```json\n{"is_correct": true}\n```\n{"is_correct": false}\n'),
    (30, "```python\ndef add(a, b):\n    return a + b\n```\n"),
    (90, "system\nuser\nassistant\n"),
    (20, "def f(s: str) -> str:\n    return s[::-1]\n\ndef g(n: int) -> int:\n    return n * n\n"),
    (
        20,
        "def f(xs: list) -> list:\n    out = []\n    for x in xs:\n        if x not in out:\n            out += [x]\n",
    ),
    (20, "def f(x, y):\n    if x > y:\n        return True\n    elif x < y:\n        return False\n    return None\n"),
    (20, "import math\n\nclass Solution:\n    def solve(self, values):\n        while values and len(values) > 1:\n"),
    (20, "assert add(1, 2) == 3\nassert f([1, 2, 2]) == [1, 2]\nassert f('abc') == 'cba'\nassert f(-1) == 0\n"),
    (20, "for i in range(len(values)):\n    total += values[i]\nreturn sum(values), max(values), min(values)\n"),
    (20, "n = int(input())\nvalues = list(map(int, input().split()))\nprint(sorted(values))\n"),
    (10, "Write a function that returns the largest number of a list. Write a python function to check a string.\n"),
    (10, "The function takes two integers and returns their sum. Given a string, count the words of it.\n"),
    (10, "Return only the code in one fenced block. Is the answer correct? It is correct when every test passes.\n"),
    (10, '{"question": "Write a function", "tests": ["assert f(1) == 1", "assert f(2) == 4"]}\n'),
)
CARD = """---
library_name: transformers
license: apache-2.0
tags:
- random-weights
---

# tiny

A Qwen2 model of 107,000 parameters with **random weights**. It has learned nothing and answers with noise: it is there
to run the mechanics of a CodeZero loop (propose, roll out, judge, reward, learn, export) in seconds on a CPU. Its
tokenizer has 256 bytes, 252 merges and four chat tokens. Made by `scripts/make_tiny_random.py`.
"""


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for count, text in CORPUS for _ in range(count)], trainer)
    tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in SPECIALS])
    assert [tokenizer.token_to_id(content) for content in SPECIALS] == [ENDOFTEXT, IM_START, IM_END, PAD]
    return tokenizer


def make_config() -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None,
        "use_cache": True, "initializer_range": 0.02, "bos_token_id": ENDOFTEXT, "eos_token_id": IM_END,
        "pad_token_id": PAD, "torch_dtype": "float32",
    }  # fmt: skip


def make_tensors(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    fill = {
        "ones": lambda shape: np.ones(shape),
        "zeros": lambda shape: np.zeros(shape),
        "normal": lambda shape: config["initializer_range"] * rng.standard_normal(shape),
    }
    table = weights(arch_from_config(config))
    return {name: fill[w.init](w.hf_shape).astype(np.float32) for w in table for name in w.hf_names()}


def write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main(out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = make_config()
    make_tokenizer().save(str(out / "tokenizer.json"))
    save_file(make_tensors(config, np.random.default_rng(0)), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", config)
    generation = {"bos_token_id": ENDOFTEXT, "eos_token_id": [IM_END, ENDOFTEXT], "pad_token_id": PAD}
    write_json(out / "generation_config.json", generation)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>", "unk_token": None, "errors": "replace", "clean_up_tokenization_spaces": False,
        "model_max_length": 4096, "split_special_tokens": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    write_json(out / "tokenizer_config.json", settings)
    (out / "README.md").write_text(CARD, "utf-8")


if __name__ == "__main__":
    default = pathlib.Path(__file__).resolve().parents[1] / "cz_jax" / "assets" / "tiny"
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default)
