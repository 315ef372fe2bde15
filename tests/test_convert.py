"""Folders into parameters and back: bit for bit, shard by shard, within a bound on host memory."""

import json
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cz_jax.convert import read, write
from cz_jax.convert.card import license_of, model_card
from cz_jax.convert.container import Writer
from cz_jax.convert.folder import check_folder, locate
from cz_jax.convert.read import read_params
from cz_jax.convert.write import export_folder
from cz_jax.errors import ModelFolderError
from cz_jax.models.spec import Arch, arch_from_folder, config_for_export, leaf_of, weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("tiny_qwen2", "tiny_qwen3")  # tied and untied embeddings


def expected(folder, arch, w, dtype):
    tensors = load_file(folder / "model.safetensors")
    layers = [tensors[name].T if w.transposed else tensors[name] for name in w.hf_names()]
    return (np.stack(layers) if w.stacked else layers[0]).astype(dtype)


def copy_of(name, tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))


def mesh_sharding(axes):
    """Weights over the test's eight CPU devices, by logical axis."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    return lambda w: NamedSharding(mesh, PartitionSpec(*(axes.get(axis) for axis in w.axes)))


LAYOUTS = {
    "fsdp and tensor": {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"},
    "replicated": {},
    "eight ways": {"embed": ("data", "fsdp", "tensor")},
    "columns only": {"heads": "tensor", "ffn": ("fsdp", "tensor")},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, jax.numpy.bfloat16])
def test_parameters_are_the_files_tensors(name, dtype):
    arch = arch_from_folder(GOLDEN / name)
    params = read_params(GOLDEN / name, arch, dtype)
    for w in weights(arch):
        leaf = leaf_of(params, w)
        assert leaf.shape == w.shape and leaf.dtype == np.dtype(dtype) and isinstance(leaf, jax.Array)
        np.testing.assert_array_equal(np.asarray(leaf), expected(GOLDEN / name, arch, w, np.dtype(dtype)), str(w.path))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == arch.parameters


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_parameters_are_the_same(name, layout):
    arch = arch_from_folder(GOLDEN / name)
    sharding_of = mesh_sharding(LAYOUTS[layout])
    params = read_params(check_folder(GOLDEN / name), arch, "float32", sharding_of)
    for w in weights(arch):
        leaf = leaf_of(params, w)
        assert leaf.sharding == sharding_of(w)
        np.testing.assert_array_equal(np.asarray(leaf), expected(GOLDEN / name, arch, w, np.float32), str(w.path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_read_once_however_often_it_is_held(layout, monkeypatch):
    count = 0

    def counting(tensor, *region):
        nonlocal count
        for row, block in blocks(tensor, *region):
            count += block.size
            yield row, block

    blocks = read.blocks
    monkeypatch.setattr(read, "blocks", counting)
    arch = arch_from_folder(GOLDEN / "tiny_qwen3")
    read_params(GOLDEN / "tiny_qwen3", arch, "float32", mesh_sharding(LAYOUTS[layout]))
    assert count == arch.parameters


def test_small_blocks_give_the_same(monkeypatch):
    arch = arch_from_folder(GOLDEN / "tiny_qwen2")
    want = read_params(GOLDEN / "tiny_qwen2", arch, "float32")
    monkeypatch.setattr("cz_jax.convert.container.BLOCK_BYTES", 1000)
    got = read_params(GOLDEN / "tiny_qwen2", arch, "float32", mesh_sharding(LAYOUTS["fsdp and tensor"]))
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_replicas_do_not_share_memory():
    """Donating a replicated weight lets XLA write into every device's copy; they must not be one."""
    arch = arch_from_folder(GOLDEN / "tiny_qwen2")
    params = read_params(GOLDEN / "tiny_qwen2", arch, "float32", mesh_sharding({}))
    w = weights(arch)[0]
    want = expected(GOLDEN / "tiny_qwen2", arch, w, np.float32)
    twice = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)(params["embed"])
    for shard in twice.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), want * 2 + 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named(name, value, tmp_path):
    folder = copy_of("tiny_qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][..., 3] = value
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("float32", ml_dtypes.bfloat16):
        with pytest.raises(ModelFolderError, match=f"the tensor {name} holds NaN or infinite"):
            read_params(folder, arch_from_folder(folder), dtype)
    with pytest.raises(ModelFolderError, match=name):
        read_params(folder, arch_from_folder(folder), "float32", mesh_sharding(LAYOUTS["fsdp and tensor"]))


def test_values_beyond_the_dtype_are_refused(tmp_path):
    folder = copy_of("tiny_qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e30
    save_file(tensors, folder / "model.safetensors")
    read_params(folder, arch_from_folder(folder), ml_dtypes.bfloat16)
    with pytest.raises(ModelFolderError, match=r"model.norm.weight .* beyond float16"):
        read_params(folder, arch_from_folder(folder), "float16")


def test_another_models_architecture_is_refused():
    with pytest.raises(ModelFolderError, match="another model"):
        read_params(GOLDEN / "tiny_qwen2", arch_from_folder(GOLDEN / "tiny_qwen3"), "float32")


def test_a_tied_copy_of_the_embedding_must_be_one(tmp_path):
    folder = copy_of("tiny_qwen2", tmp_path)
    arch = arch_from_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head" not in read_params(folder, arch, "float32")
    tensors["lm_head.weight"][319, 47] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match="ties the embeddings"):
        read_params(folder, arch, "float32")


# ---- memory

BIG = Arch("qwen2", 8192, 512, 2048, 12, 8, 2, 64, 1e6, 1e-6, True, 1024)
CHILD = """
import pathlib, sys
import jax, numpy as np
from cz_jax.convert.folder import check_folder
from cz_jax.convert.read import read_params
def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(key + ":")).split()[1])
warm, big = map(check_folder, sys.argv[1:])
read_params(warm, warm.arch, "float32")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
params = read_params(big, big.arch, "float32")
print(status("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_host_memory_stays_within_the_shards_and_1_3_of_the_largest_weight(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_for_export(BIG)))
    layout = {name: w.hf_shape for w in weights(BIG) for name in w.hf_names()}
    row = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    with Writer(tmp_path / "model.safetensors", layout, np.dtype(np.float32)) as writer:
        for name, shape in layout.items():
            writer.write(name, np.resize(row, shape))
    command = [sys.executable, "-c", CHILD, str(GOLDEN / "tiny_qwen2"), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    peak, held = map(int, output.split())
    largest = 4 * max(w.size for w in weights(BIG))
    assert held == 4 * BIG.parameters > 180e6
    assert peak < held + 1.3 * largest, (
        f"peak {peak / 1e6:.0f} MB, shards {held / 1e6:.0f}, largest {largest / 1e6:.0f}"
    )


# ---- export


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("limit", [write.MAX_FILE_BYTES, 100_000, 1])
@pytest.mark.parametrize("layout", [None, "fsdp and tensor"])
def test_export_of_convert_is_the_same_bits(name, limit, layout, tmp_path):
    arch = arch_from_folder(GOLDEN / name)
    sharding_of = mesh_sharding(LAYOUTS[layout]) if layout else None
    params = read_params(GOLDEN / name, arch, "float32", sharding_of)
    out = export_folder(params, arch, GOLDEN / name, tmp_path / "a" / "out", "# card\n", "float32", limit)
    facts = check_folder(out)
    assert facts.digest() == check_folder(GOLDEN / name).digest()
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (limit < write.MAX_FILE_BYTES)
    found = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {key: file.get_tensor(key) for key in file.keys()}
        assert path.stat().st_size <= limit + 20_000 or len(load_file(path)) == 1
    source = load_file(GOLDEN / name / "model.safetensors")
    assert found.keys() == source.keys()
    assert all(found[k].tobytes() == source[k].tobytes() and found[k].shape == source[k].shape for k in source)
    assert (out / "README.md").read_text() == "# card\n"
    assert json.loads((out / "config.json").read_text()) == json.loads((GOLDEN / name / "config.json").read_text())
    assert not [p for p in out.parent.iterdir() if p != out]


def test_export_in_bfloat16_and_from_numpy(tmp_path):
    folder = locate("tiny")
    arch = arch_from_folder(folder)
    params = jax.tree.map(np.asarray, read_params(folder, arch, ml_dtypes.bfloat16))
    out = export_folder(params, arch, folder, tmp_path / "out", "card", ml_dtypes.bfloat16)
    assert check_folder(out).dtype == "BF16"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = read_params(out, arch, ml_dtypes.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    (out / "tokenizer.json").unlink()
    out.rename(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    out = export_folder(params, arch, tmp_path / "source", tmp_path / "out", "card", "float32")
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": "float32"}


def test_export_without_a_source(tmp_path):
    arch = arch_from_folder(GOLDEN / "tiny_qwen3")
    params = read_params(GOLDEN / "tiny_qwen3", arch, "float32")
    (tmp_path / "out").mkdir()  # an empty folder is welcome
    out = export_folder(params, arch, None, tmp_path / "out", "card", "float32")
    assert check_folder(out).arch == arch


def test_export_refuses_and_leaves_nothing_behind(tmp_path, monkeypatch):
    source = GOLDEN / "tiny_qwen2"
    arch = arch_from_folder(source)
    params = read_params(source, arch, "float32")

    def refused(words, out=tmp_path / "out", params=params, source=source, dtype="float32"):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ModelFolderError, match=words):
            export_folder(params, arch, source, out, "card", dtype)
        assert sorted(tmp_path.iterdir()) == before

    refused("cannot be exported as int8", dtype="int8")
    refused("another architecture", source=GOLDEN / "tiny_qwen3")
    refused("model.norm.weight holds NaN", params=params | {"norm": params["norm"].at[1].set(np.nan)})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refused("not an empty folder", out=tmp_path / "taken")
    refused("not an empty folder", out=tmp_path / "taken" / "file")
    refused("cannot be written", out=tmp_path / "taken" / "file" / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.Writer, "write", full)
    refused("No space left on device")
    monkeypatch.undo()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_write_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_folder(params, arch, source, tmp_path / "out", "card", "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the weight norm has shape"):
        export_folder(params | {"norm": params["norm"][:3]}, arch, source, tmp_path / "out", "card", "float32")


@pytest.mark.parametrize("folder", [GOLDEN / "tiny_qwen2", GOLDEN / "tiny_qwen3", "tiny"])
def test_transformers_loads_what_was_exported(folder, tmp_path, torch):
    import transformers

    folder = locate(str(folder))
    arch = arch_from_folder(folder)
    params = read_params(folder, arch, "float32")
    out = export_folder(params, arch, folder, tmp_path / "out", "card", "float32", 100_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    golden = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), value.astype(np.float32)) for name, value in golden.items())
    with torch.no_grad():
        ids = torch.arange(24).reshape(2, 12)
        want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert torch.equal(model(ids).logits, want)
    if folder == GOLDEN / "tiny_qwen3":
        assert np.abs(np.load(GOLDEN / "logits_qwen3.npz")["logits"]).max() > 1


# ---- the card


def card(**more):
    facts = {
        "name": "my-model", "base_model": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "base_digest": "ab" * 32, "rounds": 12,
        "config_digest": "cd" * 32, "data_sources": ["mbpp@train", "proposer"], "license": "apache-2.0",
        "datasets": ["google-research-datasets/mbpp"], "versions": {"jax": "0.10.2", "cz-jax": "0.1.0"},
        "scores": {"before": {"average@8": 0.25, "pass@8": 0.5}, "after": {"average@8": 0.3125, "pass@8": None}},
    }  # fmt: skip
    return model_card(**facts | more)


def front_of(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0][4:]), text.split("\n---\n", 1)[1]


def test_card_says_where_the_weights_come_from():
    front, body = front_of(card())
    assert front["base_model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct" and front["library_name"] == "transformers"
    assert front["license"] == "apache-2.0" and front["datasets"] == ["google-research-datasets/mbpp"]
    assert "grpo" in front["tags"] and front["pipeline_tag"] == "text-generation"
    for words in ("ab" * 32, "cd" * 32, "| Rounds | 12 |", "mbpp@train, proposer", "| Version of jax | 0.10.2 |"):
        assert words in body
    assert "|  | average@8 | pass@8 |\n| --- | --- | --- |\n| before | 0.25 | 0.5 |\n| after | 0.3125 | - |" in body


def test_card_without_the_optional_parts():
    front, body = front_of(
        card(license=None, datasets=(), scores=None, versions=None, base_model="/home/me/models/mine")
    )
    assert not {"license", "datasets", "base_model"} & set(front)
    assert "mine" in body and "/home" not in body and "Scores" not in body


def test_nothing_from_outside_adds_markup():
    nasty = "x\n---\nlicense: other\n# y <script>|`[a](b)*\u2028\x00"
    front, body = front_of(
        card(
            name=nasty, base_model=nasty, license=nasty, data_sources=[nasty], datasets=[nasty], versions={nasty: nasty}
        )
    )
    assert set(front) == {"license", "datasets", "library_name", "pipeline_tag", "tags"}
    assert [line for line in body.splitlines() if line.startswith("#")] == [body.splitlines()[1], "## Scores"]
    assert "---\nlicense" not in body and "<script>" not in body.replace("\\<script\\>", "")
    assert all(line.replace("\\|", "").count("|") in (0, 3, 4) for line in body.splitlines())


def test_license_of_a_source_folder(tmp_path):
    assert license_of(locate("tiny")) == "apache-2.0" and license_of(tmp_path) is None
    for text in ("no front matter", "---\nlicense: [a]\n---\n", "---\n[: broken\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert license_of(tmp_path) is None
    huggingface_hub.metadata_save(tmp_path / "README.md", {"license": "mit"})
