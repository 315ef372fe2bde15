"""Finding a Hugging Face model folder, and checking all that can be checked before a weight is read.

Only config.json, the index and the headers of the safetensors files are opened. What this does not protect from:
weights that have the right shapes and are not what their card says (see `FolderFacts.digest`).
"""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RevisionResolutionError

from cz_jax.convert.container import TensorFacts, blocks, read_header
from cz_jax.errors import ModelFolderError, one_line
from cz_jax.models.spec import Arch, arch_from_folder, weights
from cz_jax.nouns import canonical_json

EMBEDDED = ("tiny", "tiny/judge")
WANTED = ["*.safetensors", "*.json", "merges.txt", "chat_template.jinja"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
HUB_SECONDS = 10.0
HUB_ERRORS = (HTTPError, OSError, EntryNotFoundError, RevisionResolutionError, ValueError)
TO_SAFETENSORS = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) with transformers, where you trust DIR"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TOLERATED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", re.ASCII)


@dataclass(frozen=True)
class FolderFacts:
    """A folder that passed `check_folder`: its architecture, its tensors by Hugging Face name, their one dtype."""

    folder: pathlib.Path
    arch: Arch
    tensors: Mapping[str, TensorFacts]
    dtype: str

    def digest(self) -> str:
        """Hex SHA-256 of the architecture and every weight by name, however they are spread over files. Reads all."""
        sha = hashlib.sha256(canonical_json(dataclasses.asdict(self.arch)).encode("ascii"))
        for name in sorted(name for w in weights(self.arch) for name in w.hf_names()):
            tensor = self.tensors[name]
            sha.update(canonical_json([name, tensor.dtype, list(tensor.shape)]).encode("ascii"))
            for _, block in blocks(tensor):
                sha.update(block.reshape(-1).view("u1").data)
        return sha.hexdigest()


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form of a Hugging Face hub id, "organisation/name", and is not embedded."""
    return model not in EMBEDDED and bool(_HUB_ID.fullmatch(model)) and ".." not in model and "--" not in model


def locate(model: str, revision: str | None = None) -> pathlib.Path:
    """The local folder of `model`: "tiny" (embedded), an existing folder, or a hub id, fetched to the hub's cache.

    Only weights in safetensors and JSON or text files of the top level are fetched. HF_HUB_OFFLINE=1 uses the cache
    alone. ModelFolderError: no such folder, not an id, or not to be had.
    """
    path = pathlib.Path(model).expanduser()
    is_local = model in EMBEDDED or path.is_dir()
    if is_local and revision is not None:
        raise ModelFolderError(
            f"revision {revision!r} of {model}", "a local folder has no revisions", "leave revision out"
        )
    if model in EMBEDDED:
        return pathlib.Path(str(importlib.resources.files("cz_jax"))) / "assets" / model
    if is_local:
        return path
    if path.is_file():
        raise ModelFolderError(f"{model} is a file", "a model is a folder", f"name its folder: {path.parent}")
    if not is_hub_id(model):
        fix = f"an existing folder, a hub id such as Qwen/Qwen2.5-Coder-0.5B-Instruct, or {', '.join(EMBEDDED)}"
        raise ModelFolderError(f"{model!r} is no model folder and no hub id", "a mistyped path?", fix)
    try:
        fetched = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"]
        )
    except HUB_ERRORS as e:
        why = f"no network, a wrong id or a model that needs a login ({type(e).__name__}: {str(e)[:200]})"
        raise ModelFolderError(f"{model} cannot be fetched from the hub", why, "name a local folder") from None
    return pathlib.Path(fetched)


def unavailable(model: str, revision: str | None = None) -> str | None:
    """Why `model` is not to be had, in a sentence; None where it is on this machine or the hub says that it has it.
    Nothing is fetched but what the hub knows of it."""
    if not is_hub_id(model) or pathlib.Path(model).expanduser().is_dir():
        return None
    with contextlib.suppress(*HUB_ERRORS):
        huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=WANTED, local_files_only=True)
        return None
    try:
        huggingface_hub.HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS)
    except HUB_ERRORS as e:
        why = f"{type(e).__name__}: {one_line(str(e), 120)}"
        return (
            f"{model} is not on this machine, and the hub does not give it: {why}. "
            "Try: hf auth login for a model that needs it, hf download where there is a network, or name a local folder"
        )
    return None


def read_json(path: pathlib.Path) -> dict:
    """The JSON object in `path`; ModelFolderError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFolderError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing", "half a download, or not a Hugging Face model folder?") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelFolderError(f"{path} cannot be read as JSON: {e}", "half a download?") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} is not a JSON object")
    return value


def check_folder(folder) -> FolderFacts:
    """The facts of a Hugging Face folder of a Qwen2 or Qwen3 model, from its config and the headers of its files.

    ModelFolderError, one line, for: code in the folder, weights that are not safetensors, a header or an index that
    does not fit the files, and tensors that do not fit config.json (missing, extra, another shape, several dtypes).
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder", "a mistyped path?")
    _refuse_code(folder)
    arch = arch_from_folder(folder)
    tensors: dict[str, TensorFacts] = {}
    for path, names in _weight_files(folder).items():
        found = read_header(path)
        if names is not None and names != set(found):
            name = min(names ^ set(found))
            where = "is not in that file" if name in names else "is not in the index"
            raise ModelFolderError(
                f"{folder}/{INDEX} and {path.name} disagree: {name!r} {where}", "files of two versions?"
            )
        tensors |= found
    _check_tensors(folder, arch, tensors)
    return FolderFacts(folder, arch, tensors, _one_dtype(folder, tensors))


def _listing(folder: pathlib.Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError as e:
        raise ModelFolderError(f"{folder} cannot be listed: {e.strerror or e}", "no permission?") from None


def _refuse_code(folder: pathlib.Path) -> None:
    scripts = [name for name in _listing(folder) if name.endswith(".py")]
    if scripts:
        fix = "a copy of the folder without it, if the model is an ordinary Qwen2 or Qwen3"
        raise ModelFolderError(f"{folder} holds Python code ({scripts[0]})", "code of a model folder is never run", fix)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and read_json(folder / name).get("auto_map"):
            why = "remote code is never loaded"
            raise ModelFolderError(f"{folder / name}: auto_map asks for code from the folder", why)


def _weight_files(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """The safetensors files that make the model -> the tensors that the index promises in each (None without index)."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if single.exists():
            return {single: None}
        names = _listing(folder)
        shards = [n for n in names if n.endswith(".safetensors")]
        pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if shards:
            raise ModelFolderError(f"{folder} has {shards[0]} but neither {SINGLE} nor {INDEX}", "half a download?")
        if pickled:
            why = "loading it would unpickle, which can run code"
            raise ModelFolderError(f"{folder} has weights only as {pickled[0]}", why, TO_SAFETENSORS)
        raise ModelFolderError(f"{folder} has no {SINGLE}", "half a download, or not a model folder?")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index} has no weight_map")
    files: dict[pathlib.Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.safetensors", shard, re.ASCII):
            why = "a shard lies beside the index, under a plain name"
            raise ModelFolderError(f"{index} puts {name!r} into {shard!r}", why)
        files.setdefault(folder / shard, set()).add(name)
    for path in files:
        if not path.is_file():
            raise ModelFolderError(f"{index} names {path.name}, which is missing", "half a download?")
    if single.exists() and single not in files:
        raise ModelFolderError(f"{folder} has both {SINGLE} and an index of other files", "two models in one folder?")
    return files


def _check_tensors(folder: pathlib.Path, arch: Arch, tensors: dict[str, TensorFacts]) -> None:
    expected = {name: w.hf_shape for w in weights(arch) for name in w.hf_names()}
    allowed = dict(expected)
    if arch.tied_embeddings:  # a copy of the embedding; that it is one is checked when the weights are read
        allowed["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    for name, shape in allowed.items():
        if name in tensors and tensors[name].shape != shape:
            raise ModelFolderError(
                f"{folder}: {name} is {_say(tensors[name].shape)}, {_mismatch(name, shape, tensors)}"
            )
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = (
            "tie_word_embeddings is false in config.json"
            if missing == ["lm_head.weight"]
            else "config.json of another model?"
        )
        raise ModelFolderError(f"{folder}: the tensor {missing[0]}{more} is missing", why)
    extra = sorted(name for name in tensors if name not in allowed and not _TOLERATED.fullmatch(name))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        why = f"the model that config.json describes has no such tensor ({arch.family}, {arch.layers} layers)"
        raise ModelFolderError(f"{folder}: unexpected tensor {extra[0]!r}{more}", why)


def _say(shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _mismatch(name: str, shape: tuple[int, ...], tensors) -> str:
    found = tensors[name].shape
    if len(shape) == 2 and found == shape[::-1]:
        return f"transposed: config.json makes it {_say(shape)}, [out, in]"
    asks = f"config.json makes it {_say(shape)}"
    if name in ("model.embed_tokens.weight", "lm_head.weight") and found[1:] == shape[1:]:
        return f"{asks}: vocab_size does not fit the weights"
    if ".self_attn." in name and math.prod(found) != math.prod(shape):
        return f"{asks}: num_attention_heads, num_key_value_heads or head_dim does not fit the weights"
    return asks


def _one_dtype(folder: pathlib.Path, tensors: dict[str, TensorFacts]) -> str:
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if not _TOLERATED.fullmatch(name):  # frequencies stay float32 in bfloat16 folders
            by_dtype.setdefault(tensor.dtype, []).append(name)
    if len(by_dtype) > 1:
        said = ", ".join(f"{len(names)} {dtype} (such as {names[0]})" for dtype, names in sorted(by_dtype.items()))
        raise ModelFolderError(
            f"{folder} mixes dtypes: {said}", "a merge of two models?", TO_SAFETENSORS + " and one dtype"
        )
    return next(iter(by_dtype))
