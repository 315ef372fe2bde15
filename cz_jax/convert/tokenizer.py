"""A folder's own tokenizer, with chat tokens that only its chat template can write.

tokenizer.json is the truth whatever the model type says: `AutoTokenizer` would put Qwen2's pre-tokenizer into every
folder with model_type qwen2. An added token (`<|im_start|>`, `<think>`, ...) is one id where the template wrote it, and
plain text where it stands in a message, a forced prefix or an encoded text.
"""

import pathlib
import re
from collections.abc import Sequence

import jinja2
import tokenizers
import transformers

from cz_jax.convert.folder import read_json
from cz_jax.errors import ModelFolderError
from cz_jax.models.spec import Arch

ROLES = ("system", "user", "assistant")
_MARKS = [chr(c) for c in range(0xE000, 0xF8FF)]  # private use: no meaning of their own in any text


class ChatTokenizer:
    """Text <-> token ids of one model. Make it with `load_tokenizer`.

    `eos_ids`: the ids that end an answer; `pad_id`: fills up a batch; `vocab_size`: largest known id + 1. Lone
    surrogates, which no tokenizer can read, are taken as U+FFFD.
    """

    def __init__(self, fast: transformers.PreTrainedTokenizerFast, eos_ids: tuple[int, ...], pad_id: int):
        backend = fast.backend_tokenizer
        self._fast, self._backend = fast, backend
        self.eos_ids, self.pad_id = eos_ids, pad_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._plain = tokenizers.Tokenizer(backend.model)  # the same model, told of no added token
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            setattr(self._plain, part, getattr(backend, part))
        added = sorted(backend.get_added_tokens_decoder().items(), key=lambda item: -len(item[1].content))
        self._added_ids = [id_ for id_, _ in added]
        self._contents = [token.content for _, token in added]
        self._any_content = re.compile("|".join(map(re.escape, self._contents)))
        self._any_token = re.compile("|".join(f"({_pattern(token)})" for _, token in added))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: no chat token, whatever the text holds."""
        return self._plain.encode(_readable(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, chat tokens shown; bytes that are no UTF-8 come out as U+FFFD, unused ids as nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def encode_chat(self, messages: Sequence[dict[str, str]], forced: str = "") -> list[int]:
        """Token ids of the chat, the assistant's header and `forced`, the beginning of its answer.

        Equal to `apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)` followed by
        `forced`, encoded as one text, where contents hold no added token. ValueError: a message that is not a role of
        ROLES and a text. ModelFolderError: the template refuses these messages.
        """
        for message in messages:
            if set(message) != {"role", "content"} or message["role"] not in ROLES:
                raise ValueError(f"a message has a role ({', '.join(ROLES)}) and a content, not {sorted(message)}")
        texts = [_readable(message["content"]) for message in messages]
        forced = _readable(forced)
        mark = self._unused_mark([*texts, forced, str(self._fast.chat_template)])
        held: list[str] = []  # the added tokens that stood in contents, in the order of their marks

        def hide(match: re.Match) -> str:
            held.append(match.group())
            return f"{mark}{len(held) - 1}{mark}"

        hidden = [
            {"role": message["role"], "content": self._any_content.sub(hide, text)}
            for message, text in zip(messages, texts, strict=True)
        ]
        text = self._render(hidden) + self._any_content.sub(hide, forced)
        ids: list[int] = []
        at = 0
        for match in self._any_token.finditer(text):
            ids += self._encode_hidden(text[at : match.start()], mark, held)
            ids.append(self._added_ids[match.lastindex - 1])
            at = match.end()
        return ids + self._encode_hidden(text[at:], mark, held)

    def _encode_hidden(self, text: str, mark: str, held: list[str]) -> list[int]:
        """Added tokens end a text for the normaliser, the pre-tokenizer and the merges, so pieces are encoded alone."""
        return self.encode(re.sub(f"{mark}(\\d+){mark}", lambda m: held[int(m.group(1))], text)) if text else []

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self._fast.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except jinja2.TemplateError as e:
            roles = ", ".join(m["role"] for m in messages)
            raise ModelFolderError(f"the model's chat template refuses messages of the roles {roles}: {e}") from None

    @staticmethod
    def _unused_mark(texts: list[str]) -> str:
        used = set().union(*texts)
        return next(mark for mark in _MARKS if mark not in used)


def _readable(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if not text.isascii() else text


def _pattern(token: tokenizers.AddedToken) -> str:
    """An added token in a text, with the white space that its flags make it swallow."""
    return (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


def load_tokenizer(folder, arch: Arch) -> ChatTokenizer:
    """The tokenizer of a model folder, checked against the model's `arch`.

    ModelFolderError: no tokenizer.json, no chat template, code in it, no token that ends an answer, ids beyond the
    model's vocabulary, or end tokens that are ordinary words in this tokenizer (one of another model).
    """
    folder = pathlib.Path(folder)
    settings = read_json(folder / "tokenizer_config.json")
    if settings.get("auto_map"):
        what = f"{folder}/tokenizer_config.json: auto_map asks for code from the folder"
        raise ModelFolderError(what, "remote code is never loaded")
    if not (folder / "tokenizer.json").is_file():
        fix = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) with transformers, which writes one"
        raise ModelFolderError(
            f"{folder} has no tokenizer.json", "a folder of an old version, or half a download?", fix
        )
    try:
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # the tokenizers library raises plain Exception for a file that it cannot read
        raise ModelFolderError(f"{folder}/tokenizer.json cannot be read: {e}", "half a download?") from None
    if not fast.chat_template:
        fix = "the Instruct version of the model"
        raise ModelFolderError(f"{folder} has no chat template", "a base model, or a missing chat_template.jinja?", fix)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    eos_ids = _eos_ids(folder, generation, fast)
    pads = (generation.get("pad_token_id"), fast.pad_token_id, eos_ids[0])
    tokenizer = ChatTokenizer(fast, eos_ids, next(i for i in pads if i is not None))
    _check_ids(folder, tokenizer, arch, fast)
    return tokenizer


def _eos_ids(folder: pathlib.Path, generation: dict, fast) -> tuple[int, ...]:
    places = (
        ("generation_config.json", generation.get("eos_token_id")),
        ("config.json", read_json(folder / "config.json").get("eos_token_id")),
        ("tokenizer_config.json", fast.eos_token_id),
    )
    for where, value in places:
        if value is None or value == []:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelFolderError(f"{folder}/{where}: eos_token_id is {value!r}, not a token id or a list of them")
        return tuple(dict.fromkeys(ids))
    why = "none of generation_config.json, config.json and tokenizer_config.json names the token that ends an answer"
    raise ModelFolderError(f"{folder} has no EOS token", why, 'set "eos_token_id" in generation_config.json')


def _check_ids(folder: pathlib.Path, tokenizer: ChatTokenizer, arch: Arch, fast) -> None:
    why = "the tokenizer of another model?"
    if tokenizer.vocab_size > arch.vocab_size:
        what = f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model rows for {arch.vocab_size}"
        raise ModelFolderError(what, why)
    added = fast.backend_tokenizer.get_added_tokens_decoder()
    for id_, token in added.items():
        if token.special and id_ in tokenizer.encode(token.content):
            what = f"{folder}/tokenizer.json: {token.content} cannot be told from the same letters in a text"
            raise ModelFolderError(what, "its BPE model makes the special token from plain text")
    strange = [i for i in tokenizer.eos_ids if i not in added]
    if strange:
        token = fast.backend_tokenizer.id_to_token(strange[0])
        said = "unknown to the tokenizer" if token is None else f"the ordinary token {token!r} in the tokenizer"
        raise ModelFolderError(f"{folder}: the EOS id {strange[0]} is {said}", why)
    if (
        isinstance(tokenizer.pad_id, bool)
        or not isinstance(tokenizer.pad_id, int)
        or not 0 <= tokenizer.pad_id < arch.vocab_size
    ):
        raise ModelFolderError(f"{folder}: pad_token_id is {tokenizer.pad_id!r}, no token of the model")
