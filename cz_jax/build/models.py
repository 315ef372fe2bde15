"""Where a model comes from and where it goes: Hugging Face folders, folders of ours, random weights.

A folder of ours holds `model/` (config, tokenizer: a Hugging Face folder without weights) and `checkpoints/` (orbax,
with manifests), unless its config.toml names another place for them. `cz-jax convert` makes one, and every run folder
is one.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp

from cz_jax import parallel
from cz_jax.checkpoint import Checkpoints
from cz_jax.config import Config, load
from cz_jax.convert.card import license_of, model_card
from cz_jax.convert.folder import check_folder, locate
from cz_jax.convert.read import read_params
from cz_jax.convert.tokenizer import ChatTokenizer, load_tokenizer
from cz_jax.convert.write import COPIED, export_folder
from cz_jax.errors import CheckpointError, ModelFolderError
from cz_jax.files import is_taken, local_folder
from cz_jax.ledger import RunLedger
from cz_jax.models import lora, qwen
from cz_jax.models.attention import implementation
from cz_jax.models.spec import RANDOM_SHAPES, Arch, Weight, arch_from_folder, config_for_export, tree_of, weights
from cz_jax.sampling.engine import Engine

MODEL, CHECKPOINTS, CONFIG = "model", "checkpoints", "config.toml"
RANDOM = "random:"


@dataclass(frozen=True)
class Loaded:
    """A model in memory. `texts`: the folder of its config and tokenizer; `digest()`: of its weights, computed when
    asked."""

    name: str
    arch: Arch
    params: dict
    texts: pathlib.Path
    digest: Callable[[], str]

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded when it is first asked for: speed can be measured on a folder without one."""
        return load_tokenizer(self.texts, self.arch)

    def engine(self, mesh, dtype: str, max_sequences: int, params: Callable[[], dict] | None = None) -> Engine:
        """The model in use; `params` overrides the loaded weights (a solver's change)."""
        return Engine(
            self.name, self.arch, params or (lambda: self.params), self.tokenizer, mesh, jnp.dtype(dtype), max_sequences
        )


def sharding_rule(arch: Arch, mesh) -> Callable[[Weight], jax.sharding.Sharding]:
    return lambda w: parallel.sharding(mesh, w.axes, arch.axis_units)


def load_model(model: str, revision: str | None, dtype: str, mesh, attention: str = "auto") -> Loaded:
    """`model` as the command line names it, its weights in `dtype` on `mesh`; `attention` as `run.attention` has it.
    ModelFolderError, CheckpointError, ConfigError."""
    chosen = implementation(attention, mesh.devices.flat[0].platform)
    loaded = _load(model, revision, dtype, mesh)
    return replace(loaded, arch=replace(loaded.arch, attention=chosen))


def _load(model: str, revision: str | None, dtype: str, mesh) -> Loaded:
    if model.startswith(RANDOM):
        return _random(model.removeprefix(RANDOM), dtype, mesh)
    path = pathlib.Path(model).expanduser()
    if is_ours(path):
        return _ours(path, dtype, mesh)
    folder = locate(model, revision)
    facts = check_folder(folder)
    params = read_params(facts, facts.arch, dtype, sharding_rule(facts.arch, mesh))
    return Loaded(model, facts.arch, params, folder, facts.digest)


def is_ours(path: pathlib.Path) -> bool:
    """Whether `path` is a folder of ours."""
    return (path / MODEL).is_dir() and ((path / CHECKPOINTS).is_dir() or (path / CONFIG).is_file())


def checkpoints_of(path: pathlib.Path, config: Config | None) -> pathlib.Path | str:
    """Where the checkpoints of a folder of ours are; `config`: its own, where it is a run."""
    return (config.checkpoint.folder if config is not None else "") or path / CHECKPOINTS


def _config_of(path: pathlib.Path) -> Config | None:
    return load(path / CONFIG) if (path / CONFIG).exists() else None


def _random(shape: str, dtype: str, mesh) -> Loaded:
    """Random weights of a published shape with the tokenizer of the embedded model, for work on speed."""
    if shape not in RANDOM_SHAPES:
        raise ModelFolderError(f"random:{shape} is not a known shape", f"known: {', '.join(RANDOM_SHAPES)}")
    arch, texts = RANDOM_SHAPES[shape], locate("tiny")
    params = qwen.random_params(arch, 0, jnp.dtype(dtype), sharding_rule(arch, mesh))
    return Loaded(RANDOM + shape, arch, params, texts, lambda: parallel.tree_digest(params))


def _ours(path: pathlib.Path, dtype: str, mesh) -> Loaded:
    texts = path / MODEL
    arch = arch_from_folder(texts)
    params, _, _ = _saved(path, _config_of(path), arch, mesh)
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    return Loaded(str(path), arch, params, texts, lambda: parallel.tree_digest(params))


def _saved(path: pathlib.Path, config: Config | None, arch: Arch, mesh) -> tuple[dict, int, dict]:
    """(plain weights, low-rank pairs merged into their base, round, host dict) of the newest whole checkpoint of a
    folder of ours."""
    rule = sharding_rule(arch, mesh)
    rank = config.lora.rank if config is not None else 0
    table = lora.lora_weights(arch, rank, config.lora.targets if rank else ()) or weights(arch)
    table = tuple(w for w in table if w.path[-1] != "lora_scale")
    with Checkpoints(checkpoints_of(path, config), keep=1, keep_best=0, lock=False) as checkpoints:
        dtypes = checkpoints.dtypes()

        def leaf(w: Weight):
            dtype = dtypes.get(".".join(("params", *w.path)), "float32")
            return jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=rule(w))

        number, arrays, host = checkpoints.restore({"params": tree_of(table, leaf)}, partial=True)
    if not rank:
        return arrays["params"], number, host
    base = load_model(config.solver.model, config.solver.revision, config.solver.param_dtype, mesh)
    if base.digest() != host["base_digest"]:
        raise CheckpointError(
            f"{config.solver.model} is not the model that {path} adapts", "the folder was changed or replaced"
        )
    scales = lora.init_lora(arch, rank, config.lora.alpha, config.lora.targets, 0, jnp.float32)
    pairs = lora.join(arrays["params"], _only_scales(scales))
    return jax.jit(lora.merged, static_argnums=0)(arch, lora.join(pairs, base.params)), number, host


def _only_scales(pairs: dict) -> dict:
    return {"layers": {name: {"lora_scale": leaves["lora_scale"]} for name, leaves in pairs["layers"].items()}}


def write_texts(loaded: Loaded, out: pathlib.Path) -> None:
    """`model/` of a folder of ours: config, generation config, tokenizer, copied from where the model came from."""
    target = out / MODEL
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (loaded.texts / name).is_file():
            shutil.copyfile(loaded.texts / name, target / name)
    if loaded.name.startswith(RANDOM):
        (target / "config.json").write_text(json.dumps(config_for_export(loaded.arch), indent=2) + "\n", "utf-8")
    else:
        shutil.copyfile(loaded.texts / "config.json", target / "config.json")


def convert_model(hf_dir: str, out: pathlib.Path, dtype: str | None) -> dict:
    """A Hugging Face folder or hub id as a folder of ours; `dtype` None keeps the folder's own."""
    out = local_folder(out)
    if is_taken(out):
        raise ModelFolderError(
            f"{out} exists and is not an empty folder", "an earlier conversion?", "name a new folder"
        )
    mesh = parallel.make_mesh(1, -1, 1)
    if dtype is None:
        dtype = "float32" if check_folder(locate(hf_dir)).dtype == "F32" else "bfloat16"
    loaded = load_model(hf_dir, None, dtype, mesh)
    write_texts(loaded, out)
    with Checkpoints(out / CHECKPOINTS, keep=1, keep_best=0) as checkpoints:
        checkpoints.save(0, {"params": loaded.params}, {"source": hf_dir, "base_digest": loaded.digest()})
    return {"out": out, "parameters": loaded.arch.parameters, "dtype": dtype, "digest": loaded.digest()}


def export_run(run: pathlib.Path, out: pathlib.Path) -> dict:
    """A run, or any folder of ours, as a Hugging Face folder with a model card."""
    run, out = pathlib.Path(run), local_folder(out)
    if not is_ours(run):
        raise ModelFolderError(
            f"{run} is no run folder", f"it has no {MODEL}/ and {CHECKPOINTS}/", "cz-jax export runs/demo OUT"
        )
    mesh = parallel.make_mesh(1, -1, 1)
    arch = arch_from_folder(run / MODEL)
    config = _config_of(run)
    params, number, host = _saved(run, config, arch, mesh)
    dtype = jax.tree.leaves(params)[0].dtype
    digest = parallel.tree_digest(params)
    card = _card(run, out.name, config, number, host)
    export_folder(params, arch, run / MODEL, out, card, dtype)
    return {"out": out, "round": number, "dtype": str(dtype), "policy_digest": digest}


def _card(run: pathlib.Path, name: str, config: Config | None, number: int, host: dict) -> str:
    from importlib.metadata import version

    base = config.solver.model if config is not None else host.get("source", "unknown")
    summary = RunLedger(run).read_summary() or {}
    scores = {
        when: {
            f"{kind}@{score['k']}": score["value"]
            for kind in ("avg", "pass")
            if (score := summary.get(f"{kind}_at_k_{when}"))
        }
        for when in ("before", "after")
    }
    return model_card(
        name=name,
        base_model=base,
        base_digest=host.get("base_digest", "unknown"),
        rounds=number,
        config_digest=config.digest if config is not None else "none",
        data_sources=[_source_name(s) for s in config.tasks.sources] if config is not None else [],
        datasets=[
            hub
            for s, hub in _HUB_DATA.items()
            if config is not None and any(x.startswith(s) for x in config.tasks.sources)
        ],
        scores={when: row for when, row in scores.items() if row},
        versions={p: version(p) for p in ("cz-jax", "jax", "flax", "optax", "transformers")},
        license=license_of(run / MODEL),
    )


_HUB_DATA = {"mbpp": "google-research-datasets/mbpp", "code_contests": "deepmind/code_contests"}


def _source_name(spec: str) -> str:
    """A task source without the path it was read from, which is nobody's matter but the machine's."""
    name, _, rest = spec.partition(":")
    return name + ("@" + rest.rpartition("@")[2] if "@" in rest else "")
