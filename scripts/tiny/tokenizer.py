"""The tokenizer of the tiny models: byte-level BPE with Qwen2's pre-tokenizer and four chat tokens at the end."""

import json
import pathlib
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# While merges are learned, a mark before a word stands alone: a name is then one token behind "(", "_" and "[" alike.
LEARNING_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTEXT = 4096


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """`size` tokens: 256 bytes, merges learned from `texts`, SPECIALS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)

    def cut(*patterns: str):
        splits = [pre_tokenizers.Split(Regex(p), behavior="isolated", invert=False) for p in patterns]
        return pre_tokenizers.Sequence([*splits, bytes_])

    tokenizer.pre_tokenizer = cut(QWEN2_PATTERN, LEARNING_PATTERN)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS), initial_alphabet=alphabet, min_frequency=3, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size - len(SPECIALS):
        raise ValueError(f"the texts give only {tokenizer.get_vocab_size()} tokens: ask for fewer")
    tokenizer.pre_tokenizer = cut(QWEN2_PATTERN)
    tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in SPECIALS])
    return tokenizer


def write_texts(tokenizer: Tokenizer, config: dict, folder: pathlib.Path) -> None:
    """The folder without weights: tokenizer, chat template, `config` with the ids of the chat tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    endoftext, _, im_end, pad = (tokenizer.token_to_id(s) for s in SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", config | {"bos_token_id": endoftext, "eos_token_id": im_end, "pad_token_id": pad})
    generation = {"bos_token_id": endoftext, "eos_token_id": [im_end, endoftext], "pad_token_id": pad}
    _write(folder / "generation_config.json", generation)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>", "unk_token": None, "errors": "replace", "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT, "split_special_tokens": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", settings)


def _write(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
