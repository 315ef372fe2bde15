"""Hostile and careless model folders: each is refused in one line before a weight is read."""

import json
import pathlib
import shutil

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cz_jax.convert.container import MAX_HEADER_BYTES, Writer, read_header
from cz_jax.convert.folder import check_folder, is_hub_id, locate
from cz_jax.errors import ModelFolderError
from cz_jax.models.spec import arch_from_folder

GOLDEN = pathlib.Path(__file__).parent / "golden"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the tiny Qwen2 folder (tied embeddings)."""
    return pathlib.Path(shutil.copytree(GOLDEN / "tiny_qwen2", tmp_path / "model"))


def refused(folder, *words):
    with pytest.raises(ModelFolderError) as caught:
        check_folder(folder)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 2000
    for word in words:
        assert word in line, line


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def parts(folder):
    """(header object, data bytes) of model.safetensors."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(folder, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_qwen3"])
def test_a_good_folder_and_its_facts(name):
    facts = check_folder(GOLDEN / name)
    assert facts.arch == arch_from_folder(GOLDEN / name) and facts.dtype == "F32"
    with safe_open(GOLDEN / name / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(facts.tensors)
        for key, tensor in facts.tensors.items():
            assert tuple(file.get_slice(key).get_shape()) == tensor.shape


def test_digest_tells_weights_and_not_their_packing(folder):
    before = check_folder(folder).digest()
    shard(folder)
    assert check_folder(folder).digest() == before
    shutil.rmtree(folder)
    shutil.copytree(GOLDEN / "tiny_qwen2", folder)
    change_tensors(folder, lambda t: t.update({Q: t[Q] + np.float32(1e-3)}))
    changed = check_folder(folder).digest()
    assert changed != before
    change_config(folder, rope_theta=5e5)
    assert check_folder(folder).digest() not in (before, changed)


# ---- the header


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no safetensors header"),
        (b"\x05\x00", "no safetensors header"),
        ((0).to_bytes(8, "little") + b"{}", "no safetensors header"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes"),
        ((9).to_bytes(8, "little") + b"not json!", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not an object"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON"),
        ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "not JSON"),
        ((14).to_bytes(8, "little") + b'{"a":1,"a": 2}', "'a' twice"),
        ((5008).to_bytes(8, "little") + b'{"a":' + b"9" * 5002 + b"}", "not JSON"),
    ],
)
def test_header_bytes(folder, raw, words):
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, "model.safetensors", words)


def test_header_above_the_cap(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    refused(folder, f"more than {MAX_HEADER_BYTES}")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "I8"}, "dtype 'I8'"),
        ({"dtype": ["F32"]}, "dtype ['F32']"),
        ({"shape": [48, -48]}, "shape"),
        ({"shape": [True, 48]}, "shape"),
        ({"shape": "48"}, "shape"),
        ({"shape": [10**30, 10**30]}, "shape"),
        ({"shape": [1] * 9}, "shape"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [-4, 0]}, "data_offsets"),
        ({"data_offsets": [0.0, 4.0]}, "data_offsets"),
        ({"data_offsets": [8, 4]}, "offsets span -4"),
        ({"shape": [48, 47]}, "offsets span"),
        ({"more": 1}, "not dtype, shape and data_offsets"),
    ],
)
def test_header_entries(folder, entry, words):
    header, data = parts(folder)
    header[Q] |= entry
    put(folder, header, data)
    refused(folder, repr(Q), words)


def test_offsets_overlap_leave_holes_or_leave_the_file(folder):
    header, data = parts(folder)
    begin, end = header[Q]["data_offsets"]
    for shift, word in ((-4, "overlaps"), (4, "leaves a hole")):
        header[Q]["data_offsets"] = [begin + shift, end + shift]
        put(folder, header, data)
        refused(folder, word)
    header[Q]["data_offsets"] = [1 << 40, (1 << 40) + end - begin]
    put(folder, header, data)
    refused(folder, "hole")
    header[Q]["data_offsets"] = [begin, end]
    put(folder, header, data[:-1])
    refused(folder, "half a download?")
    put(folder, header, data + b"\0")
    refused(folder, "1 bytes after the last tensor")
    put(folder, header, data)
    check_folder(folder)


def test_half_a_download(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (7, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "half a download")


# ---- the index


def shard(folder, count=2):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        held = {k: v for j, (k, v) in enumerate(sorted(tensors.items())) if j % count == i}
        save_file(held, folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize(
    "bad", ["../../etc/model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "x.bin", 3, ".."]
)
def test_index_to_elsewhere(folder, bad):
    index = shard(folder)
    index["weight_map"][Q] = bad
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, repr(Q), "plain name")


def test_index_and_files_disagree(folder):
    index = shard(folder)
    path = folder / "model.safetensors.index.json"
    first, second = sorted(set(index["weight_map"].values()))
    for change, words in (
        ({Q: first if index["weight_map"][Q] == second else second}, "disagree"),
        ({"model.more": first}, "'model.more' is not in that file"),
        ({Q: "model-00003-of-00003.safetensors"}, "which is missing"),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        refused(folder, words)
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != Q}}))
    refused(folder, f"{Q!r} is not in the index")
    for broken in ("{", "[]", "{}", '{"weight_map": {}}'):
        path.write_text(broken)
        refused(folder, "index.json")
    path.write_text(json.dumps(index))
    check_folder(folder)
    shutil.copy(folder / first, folder / "model.safetensors")
    refused(folder, "both model.safetensors and an index")
    path.unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor")


# ---- the tensors against config.json


def test_missing_and_extra_tensors(folder):
    change_tensors(folder, lambda t: t.pop(Q))
    refused(folder, f"the tensor {Q} is missing")
    change_tensors(folder, lambda t: t.pop("model.norm.weight"))
    refused(folder, "and 1 more is missing")
    shutil.copy(GOLDEN / "tiny_qwen2" / "model.safetensors", folder)
    change_config(folder, num_hidden_layers=2)
    refused(folder, "unexpected tensor 'model.layers.2", "2 layers")
    change_config(folder, num_hidden_layers=3, tie_word_embeddings=False)
    refused(folder, "lm_head.weight is missing", "tie_word_embeddings")


def test_tolerated_extra_tensors(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    change_tensors(folder, add)
    check_folder(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :5].copy()}))
    refused(folder, "lm_head.weight is [320, 5]")


def test_wrong_shapes_are_explained(folder):
    k = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(folder, lambda t: t.update({k: t[k].T.copy()}))
    refused(folder, k, "transposed", "[24, 48]")
    shutil.copy(GOLDEN / "tiny_qwen2" / "model.safetensors", folder)
    change_config(folder, vocab_size=321)
    refused(folder, "[320, 48]", "[321, 48]", "vocab_size does not fit")
    change_config(folder, vocab_size=320, num_key_value_heads=4)
    refused(folder, "num_key_value_heads")
    change_config(folder, num_key_value_heads=2, intermediate_size=97)
    refused(folder, "mlp.gate_proj.weight is [96, 48]", "[97, 48]")


def test_mixed_dtypes_are_said(folder):
    change_tensors(folder, lambda t: t.update({Q: t[Q].astype(ml_dtypes.bfloat16)}))
    refused(folder, "mixes dtypes: 1 BF16", Q, "37 F32")


# ---- the folder itself


def test_code_and_pickles_are_refused(folder):
    (folder / "modeling.py").write_text("raise SystemExit")
    refused(folder, "Python code (modeling.py)")
    (folder / "modeling.py").unlink()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    refused(folder, "tokenizer_config.json: auto_map")
    (folder / "tokenizer_config.json").unlink()
    change_config(folder, auto_map={"AutoModel": "x.Y"})
    refused(folder, "config.json: auto_map")
    change_config(folder, auto_map=None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "only as pytorch_model.bin", "unpickle", "save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no model.safetensors")


def test_broken_configs(folder, tmp_path):
    for text, words in (
        ("{", "JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama"}', "'llama' is not supported"),
    ):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json", words)
    (folder / "config.json").unlink()
    refused(folder, "config.json")
    refused(tmp_path / "nothing", "is not a folder")


# ---- writing containers


def test_writer_makes_what_the_library_reads(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        "a": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
    }
    with Writer(tmp_path / "x", {k: v.shape for k, v in values.items()}, values["a"].dtype) as writer:
        for name, value in values.items():
            writer.write(name, np.asfortranarray(value))
    with safe_open(tmp_path / "x", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in values.items():
            assert file.get_tensor(name).tobytes() == value.tobytes()
    assert {t.start % 2 for t in read_header(tmp_path / "x").values()} == {0}


def test_writer_keeps_its_word(tmp_path):
    layout, float32 = {"a": (2,)}, np.dtype(np.float32)
    with pytest.raises(ValueError, match="1 tensors were told"), Writer(tmp_path / "x", layout, float32):
        pass
    for i, (name, value) in enumerate((("b", np.zeros(2, "f4")), ("a", np.zeros(3, "f4")), ("a", np.zeros(2, "f8")))):
        with pytest.raises(ValueError, match="was told"), Writer(tmp_path / f"y{i}", layout, float32) as writer:
            writer.write(name, value)


# ---- finding


def test_locate_folders(folder, monkeypatch):
    assert locate(str(folder)) == folder
    assert check_folder(locate("tiny")).arch.family == "qwen2"
    monkeypatch.chdir(folder)
    for model, words in (
        (str(folder / "config.json"), "is a file"),
        (str(folder) + "x", "no model folder and no hub id"),
        ("nothing", "no model folder"),
        ("a/b/c", "no model folder"),
        ("../b", "no model folder"),
    ):
        with pytest.raises(ModelFolderError, match=words):
            locate(model)
    with pytest.raises(ModelFolderError, match="no revisions"):
        locate("tiny", "main")


def test_locate_asks_the_hub_for_data_only(monkeypatch, tmp_path):
    asked = {}

    def download(repo, **options):
        asked[repo] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("Qwen/Qwen2.5-Coder-0.5B-Instruct", "abc") == tmp_path
    (options,) = asked.values()
    assert options["revision"] == "abc" and options["ignore_patterns"] == ["*/*"]
    from huggingface_hub.utils import filter_repo_objects

    files = ["model.safetensors", "config.json", "merges.txt", "vocab.json", "tokenizer.json", "chat_template.jinja"]
    others = ["pytorch_model.bin", "modeling_x.py", "onnx/model.safetensors", "README.md", "training_args.bin"]
    patterns = {k: v for k, v in options.items() if k.endswith("patterns")}
    assert list(filter_repo_objects(files + others, **patterns)) == files


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    class Response:
        headers, request, status_code = {}, None, 404

    failures = [
        LocalEntryNotFoundError("offline\nand not cached"),
        RepositoryNotFoundError("no such repository", response=Response()),
        ConnectionError("network is down"),
        ValueError("odd id"),
    ]
    for failure in failures:

        def download(*_, failure=failure, **__):
            raise failure

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(ModelFolderError) as caught:
            locate("some/model")
        assert "\n" not in str(caught.value) and "name a local folder" in str(caught.value)


def test_offline_is_honoured(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFolderError, match="cannot be fetched"):
        locate("some-organisation/no-such-model")


@pytest.mark.parametrize("text", ["a/b", "Qwen/Qwen3-0.6B", "org_1/x.y-z"])
def test_hub_ids(text):
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["a", "a/b/c", "a/..", "/a", "./a", "a/b\n", "random:x/y", "a/b--c", "é/b", ""])
def test_no_hub_ids(text):
    assert not is_hub_id(text)
