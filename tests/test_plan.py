"""`cz-jax plan`: what it counts against what XLA and a built node take, its advice, and every file in configs/."""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cz_jax import parallel
from cz_jax import plan as planning
from cz_jax.bench import forward_flops
from cz_jax.build.node import build
from cz_jax.cli.main import main
from cz_jax.config import Config, from_dict, load
from cz_jax.errors import ConfigError, ModelFolderError
from cz_jax.models import qwen
from cz_jax.models.spec import RANDOM_SHAPES, Arch, arch_from_folder
from cz_jax.plan import here, memory, plan, programs, roofline
from cz_jax.plan.count import count
from cz_jax.plan.targets import SHARE, TARGETS, V5E, Target, target_of
from cz_jax.plan.work import HUB_SHAPES, architecture, work_of
from cz_jax.ports import SamplingMethod
from cz_jax.sampling import engine as engines

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SMALL = Arch("qwen2", 8192, 256, 1024, 3, 4, 2, 64, 1e6, 1e-6, True, 4096)
HOST = TARGETS["cpu-16gb"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(RANDOM_SHAPES, "small", SMALL)
    return from_dict(
        {
            "solver": {"model": "random:small"},
            "evaluator": {"model": "random:small"},
            "proposer": {"model": "none"},
            "round": {"dataset_tasks": 2, "group_size": 4},
            "sampling": {"max_prompt_tokens": 128, "max_new_tokens": 64, "max_sequences": 8},
            "eval": {"before_and_after": False},
        }
    )


def whole(model: str, **sections) -> Config:
    """Every role played by `model`, in bfloat16 but for the solver's weights; large micro-batches, computed twice."""
    roles = {"proposer": {"model": model, "dtype": "bfloat16"}, "evaluator": {"model": model, "dtype": "bfloat16"}}
    sections["grpo"] = {"micro_batch_tokens": 16384, "remat": "layer"} | sections.get("grpo", {})
    return from_dict({"solver": {"model": model, "compute_dtype": "bfloat16"}} | roles | sections)


# ---- bytes


class Quick:
    """A lowered program whose code is not optimised, which takes most of the time and none of the memory."""

    def __init__(self, program):
        self._program = program

    def compile(self):
        return self._program.compile({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def test_counted_bytes_are_those_of_the_compiled_programs(small):
    counted = count(small, HOST)
    given = memory.arguments(small, counted.work, counted.mesh)
    mesh = parallel.make_mesh(1, 1, 1, programs.devices_of(HOST))
    lowered = programs.lowered(small, counted.work, mesh)
    assert set(lowered) == set(counted.phases) == {"rollout", "judge", "update"}
    for name, lower in lowered.items():
        with jax.set_mesh(mesh):
            program = programs.compiled(Quick(lower()))
        seen, said = given[name] + program.working, given[name] + counted.phases[name]
        assert abs(said / seen - 1) < 0.15, (name, said, seen)


def test_counted_bytes_of_queued_rows(small):
    value = small.model_dump(mode="json", exclude_none=True)
    value["round"] |= {"dataset_tasks": 16, "group_size": 8}
    counted = count(from_dict(value), HOST)
    call = counted.work.rollout
    assert (call.prompts, call.group, call.stages) == (16, 8, (8,))
    mesh = parallel.make_mesh(1, 1, 1, programs.devices_of(HOST))
    with jax.set_mesh(mesh):
        program = programs.compiled(Quick(programs.lowered(small, counted.work, mesh)["rollout"]()))
    assert abs(counted.phases["rollout"] / program.working - 1) < 0.15


def test_predicted_bytes_are_what_a_process_grows_by():
    words = [sys.executable, str(CONFIGS.parent / "scripts/check_plan.py"), "--shape", "qwen2-50m", "--layers", "2"]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    said = subprocess.run([*words, "--programs", "judge"], stdout=subprocess.PIPE, text=True, env=environment).stdout
    seen = json.loads(said.splitlines()[-1])["bytes"]["judge"]
    assert seen["measured"] > 1.2e8 and abs(seen["compiled"] / seen["measured"] - 1) < 0.15, seen


def test_what_stays_is_what_a_built_node_holds():
    config = from_dict({"run": {"compile_cache": "off"}})
    before = {id(a) for a in jax.live_arrays()}
    built = build(config, lambda *_, **__: None)
    new = [a for a in jax.live_arrays() if id(a) not in before]
    first = jax.devices()[0]
    held = sum(s.data.nbytes for a in new for s in a.addressable_shards if s.device == first)
    devices = Target("here", "tpu", V5E, devices=len(jax.devices()))
    said = sum(count(config, devices).kinds.values())
    assert built.node is not None and abs(held / said - 1) < 0.01, (held, said)


@pytest.mark.parametrize("lora", [0, 8])
def test_shared_weights_count_once(lora):
    arch, shape = RANDOM_SHAPES["qwen2.5-coder-0.5b"], memory.Shape({"data": 1, "fsdp": 1, "tensor": 1})
    model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    config = whole(model, solver={"model": model, "param_dtype": "bfloat16"}, lora={"rank": lora})
    kinds = memory.resident(config, work_of(config, 1, "cpu"), shape)
    two_bytes = 2 * arch.parameters
    if lora:  # the frozen base under the pairs is the evaluator too
        assert kinds["evaluator"] == kinds["proposer"] == kinds["starting_weights"] == 0
        assert two_bytes < kinds["parameters"] < 1.1 * two_bytes and kinds["optimizer"] < 0.2 * two_bytes
    else:  # trained weights are a copy; the base they began from is the evaluator
        assert kinds["parameters"] == kinds["evaluator"] == two_bytes and kinds["optimizer"] == 4 * two_bytes
        assert kinds["proposer"] == kinds["starting_weights"] == 0
    other = from_dict(config.model_dump(mode="json", exclude_none=True) | {"evaluator": {"model": "Qwen/Qwen3-0.6B"}})
    kinds = memory.resident(other, work_of(other, 1, "cpu"), shape)
    assert kinds["evaluator"] == 4 * RANDOM_SHAPES["qwen3-0.6b"].parameters


def test_sharding_divides_what_stays():
    config = whole("Qwen/Qwen3-4B")
    one, eight = (count(config, TARGETS[name]).kinds for name in ("v5e-1", "v5e-8"))
    for kind in ("parameters", "optimizer", "evaluator"):
        assert 1 / 8 <= eight[kind] / one[kind] < 1 / 8 + 0.001, kind  # norms and biases are not split


def test_the_kernel_of_tpus_keeps_no_scores():
    kernel, plain = (
        count(whole("Qwen/Qwen3-4B", run={"attention": a}), TARGETS["v5e-8"]).phases for a in ("auto", "plain")
    )
    assert kernel["update"] < plain["update"] and kernel["judge"] < plain["judge"]


def test_the_calls_are_those_of_the_engine(small, monkeypatch):
    seen = []

    def record(arch, params, prompts, lengths, keys, active, stop, **more):
        seen.append((prompts.shape, active.shape, more["max_new_tokens"]))
        raise InterruptedError

    monkeypatch.setattr(engines, "generate", record)
    mesh = parallel.make_mesh(1, 1, 1, jax.devices()[:1])
    numbers = type("Numbers", (), {"eos_ids": (1,), "pad_id": 0})
    engine = engines.Engine("x", SMALL, dict, numbers, mesh, max_sequences=small.sampling.max_sequences)
    with pytest.raises(InterruptedError):
        engine.sample([[5] * 128] * 2, [[1, 2, 3, 4]] * 2, 64, SamplingMethod())
    call = work_of(small, 1, "cpu").rollout
    assert seen == [((call.prompts, call.prompt_tokens), (call.prompts, call.group), call.tokens)]


def test_a_longer_evaluation_is_the_larger_call(small):
    evaluated = from_dict(small.model_dump(mode="json", exclude_none=True) | {"eval": {"k": 8, "max_tasks": 8}})
    assert (work_of(small, 1, "cpu").rollout.prompts, work_of(small, 1, "cpu").rollout.group) == (2, 4)
    rollout = work_of(evaluated, 1, "cpu").rollout
    assert (rollout.prompts, rollout.stages) == (8, (8,))
    wide = from_dict(evaluated.model_dump(mode="json", exclude_none=True) | {"sampling": {"max_sequences": 64}})
    assert (work_of(wide, 1, "cpu").rollout.prompts, work_of(wide, 1, "cpu").rollout.group) == (8, 8)


def test_a_compiler_without_room_says_how_much_it_wants():
    class Program:
        said = (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (19.50G) exceeds available HBM (15.75G)."
        )

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.said)

    found = programs.compiled(Program())
    assert found.working is None and found.required == int(19.5 * (1 << 30))
    Program.said = "RESOURCE_EXHAUSTED: no more"
    assert programs.compiled(Program()).required is None
    Program.said = "INTERNAL: a defect"
    with pytest.raises(jax.errors.JaxRuntimeError):
        programs.compiled(Program())


# ---- FLOPs and time


def test_flops_are_those_of_an_unrolled_model():
    tokens, suffix, group = 16, 16, 2
    params = jax.eval_shape(lambda: qwen.random_params(SMALL, 0))

    def flops(form):
        def run(params, prompts, lengths, suffixes):
            return qwen.shared_forward(SMALL, form(params), prompts, lengths, suffixes)

        ints = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, tokens), (2,), (2, group, suffix))]
        return jax.jit(run).lower(params, *ints).cost_analysis()["flops"]

    counted = 2 * forward_flops(SMALL, tokens, 0) + 2 * group * forward_flops(SMALL, suffix, tokens)
    assert abs(counted / flops(lambda p: qwen.for_decoding(SMALL, p, 1)) - 1) < 0.05
    assert flops(lambda p: p) < 0.5 * counted  # what a compiler says of scanned layers is one of them


def test_a_round_costs_what_its_parts_do(small):
    counted = count(small, HOST)
    phases = roofline.costs(small, counted.work, counted.mesh)
    twice = from_dict(small.model_dump(mode="json", exclude_none=True) | {"grpo": {"updates": 2}})
    again = roofline.costs(twice, count(twice, HOST).work, counted.mesh)
    forward = phases["update"].flops / 3
    assert again["update"].flops == pytest.approx(7 * forward)  # two updates and the log-probabilities before them
    assert again["rollout"].flops == phases["rollout"].flops
    slow, fast = (roofline.seconds(phases["rollout"], TARGETS[name]) for name in ("v5e-1", "v6e-1"))
    assert slow > fast > 0


def test_bytes_read_are_weights_and_caches():
    config = whole("Qwen/Qwen3-4B", round={"dataset_tasks": 4, "proposed_tasks": 0, "group_size": 8})
    counted = count(config, TARGETS["v5p-8"])
    work, weights = counted.work, 2 * counted.work.solver.arch.parameters
    costs = roofline.costs(config, work, counted.mesh)
    of_token = 2 * 36 * 8 * 128 * 2  # keys and values of all layers, in bfloat16
    steps, s = config.sampling.max_new_tokens - 1, config.sampling
    on_average = 4 * (s.max_prompt_tokens + 8 * s.max_new_tokens / 2) / counted.mesh.ways
    assert costs["rollout"].bytes == pytest.approx(weights + steps * (weights + on_average * of_token))
    assert costs["update"].bytes == (3 + 1) * work.micro_batches * weights  # forward, again, and twice backward


def test_modes_of_judging_cost_differently():
    flops = {}
    for mode in ("direct", "reason", "generate"):
        config = whole("Qwen/Qwen3-0.6B", evaluator={"model": "Qwen/Qwen3-0.6B", "dtype": "bfloat16", "mode": mode})
        counted = count(config, TARGETS["gpu-24gb"])
        assert ("reason" in counted.phases) == (mode != "direct") and ("judge" in counted.phases) == (
            mode != "generate"
        )
        flops[mode] = plan(config, "gpu-24gb")["flops"]
    assert flops["reason"] > flops["direct"] and flops["reason"] > flops["generate"]


# ---- what fits, and what would


@pytest.mark.parametrize(
    "config, topology",
    [
        (whole("Qwen/Qwen2.5-Coder-1.5B-Instruct"), "gpu-24gb"),
        (
            whole(
                "Qwen/Qwen2.5-Coder-0.5B-Instruct",
                grpo={"micro_batch_tokens": 262144, "remat": "products"},
                sampling={"max_prompt_tokens": 2048, "max_new_tokens": 1024, "max_sequences": 8},
            ),
            "gpu-24gb",
        ),
        (whole("Qwen/Qwen2.5-Coder-1.5B-Instruct", mesh={"data": 8, "fsdp": 1}), "v5e-8"),
        (whole("Qwen/Qwen3-4B"), "gpu-80gb"),
        (whole("Qwen/Qwen3-4B"), "v5e-1"),
    ],
)
def test_following_the_advice_fits(config, topology):
    value = plan(config, topology, compiled=False)
    assert not value["fits"] and value["bytes_per_device"]["total"] > value["hbm_bytes"]
    following_fits(config, value["advice"], topology)


def following_fits(config, advice, topology):
    if "topology" in advice:
        return plan_fits(config, advice["topology"], advice["total"])
    data = config.model_dump(mode="json", exclude_none=True)
    for word in advice["settings"]:
        name, _, text = word.partition("=")
        section, _, key = name.partition(".")
        data[section][key] = type(data[section][key])(text)
    return plan_fits(from_dict(data), topology, advice["total"])


NEAREST = {  # what it takes, from the nearest change on, where the ones before it do not suffice
    "grpo.micro_batch_tokens": whole(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", grpo={"micro_batch_tokens": 65536}, round={"dataset_tasks": 16},
    ),
    "grpo.remat": whole(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", grpo={"micro_batch_tokens": 1024, "remat": "products"},
        sampling={"max_prompt_tokens": 2048, "max_new_tokens": 1024, "max_sequences": 8},
    ),
    "mesh.fsdp": whole("Qwen/Qwen2.5-Coder-1.5B-Instruct", mesh={"data": 8, "fsdp": 1}),
    "lora.rank": whole(
        "Qwen/Qwen3-4B", solver={"model": "Qwen/Qwen3-4B", "param_dtype": "bfloat16", "compute_dtype": "bfloat16"},
        optimizer={"moments_dtype": "bfloat16"}, sampling={"max_sequences": 8}, grpo={"micro_batch_tokens": 1024},
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", NEAREST)
def test_each_kind_of_advice_is_given_alone_and_fits(key):
    topology = "v5e-8" if key.startswith("mesh") else "gpu-24gb"
    value = plan(NEAREST[key], topology, compiled=False)
    words = (value["advice"] or {}).get("settings", [])
    assert not value["fits"] and {w.split(".")[0] for w in words} == {key.split(".")[0]}, value
    assert any(w.startswith(key + "=") for w in words)
    following_fits(NEAREST[key], value["advice"], topology)


@pytest.mark.parametrize("topology", TARGETS)
def test_every_topology_counts_a_small_config_and_names_its_devices(topology):
    value = plan(load(CONFIGS / "cpu.toml", ["mesh.data=1", "mesh.fsdp=-1"]), topology, compiled=False)
    assert value["fits"] and value["devices"] == np.prod(list(value["mesh"].values())), value
    assert value["devices"] % value["hosts"] == 0 and value["seconds_estimate"] > 0


def plan_fits(config, topology, total):
    value = plan(config, topology, compiled=False)
    assert value["fits"] and value["advice"] is None and value["bytes_per_device"]["total"] == total


def test_the_nearest_change_comes_first():
    config = whole("Qwen/Qwen2.5-Coder-0.5B-Instruct", grpo={"micro_batch_tokens": 65536}, round={"dataset_tasks": 16})
    value = plan(config, "gpu-24gb")
    assert not value["fits"] and len(value["advice"]["settings"]) == 1
    assert re.fullmatch(r"grpo.micro_batch_tokens=\d+", value["advice"]["settings"][0])


def test_a_larger_machine_is_named_where_no_setting_helps():
    large = {"model": "random:qwen3-4b-instruct-2507", "dtype": "bfloat16"}
    solver = {"model": "random:qwen3-4b", "param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    config = from_dict({"solver": solver, "evaluator": large, "proposer": large, "lora": {"rank": 8}})
    advice = plan(config, "gpu-24gb")["advice"]
    plan_fits(config, "gpu-80gb", advice["total"])
    assert advice["topology"] == "gpu-80gb" and set(plan(config, "cpu-16gb", compiled=False)["advice"]) == {"note"}
    with pytest.raises(ConfigError, match="sampling.max_new_tokens=40000 exceeds 32768"):
        plan(from_dict({"sampling": {"max_new_tokens": 40000}}), "gpu-24gb")


FOR = {
    "cpu": "cpu-16gb", "gpu-24gb-0.5b": "gpu-24gb", "gpu-24gb-1.5b": "gpu-24gb", "gpu-80gb": "gpu-80gb",
    "tpu-v5e-8": "v5e-8", "tpu-multihost": "v5e-16",
}  # fmt: skip


def test_every_config_has_its_machine():
    assert {p.stem for p in CONFIGS.glob("*.toml")} == set(FOR)


@pytest.mark.parametrize("name", FOR)
def test_a_config_fits_its_machine_and_its_header_says_so(name):
    path = CONFIGS / f"{name}.toml"
    config, header = load(path), path.read_text().split("\n[")[0]
    value = plan(config, FOR[name], compiled=False)
    assert value["fits"], value["bytes_per_device"]
    assert header.startswith("# ") and "to be measured" in header and f"--topology {FOR[name]}" in header
    told = {k: float(n) for k, n in re.findall(r"^#\s+(\w+)\s+(\d+\.\d\d)\b", header, re.MULTILINE)}
    said = {k: round(n / 1e9, 2) for k, n in value["bytes_per_device"].items()}
    assert told == {k: v for k, v in said.items() if v}
    assert set(config.tasks.sources) == {"mbpp@train", "code_contests@train"}
    assert config.tasks.held_out == ("mbpp@validation",)


# ---- names, and what is refused


def test_hub_names_stand_for_the_published_shapes(shared):
    for name, shape in HUB_SHAPES.items():
        folder = shared / "model_configs" / name.split("/")[1]
        if folder.is_dir():
            assert arch_from_folder(folder) == RANDOM_SHAPES[shape] == architecture(name), name
    assert len([n for n in HUB_SHAPES if (shared / "model_configs" / n.split("/")[1]).is_dir()]) >= 6


def test_a_folder_wins_and_an_unknown_name_is_refused(tmp_path):
    tiny = architecture("tiny")
    shutil.copyfile(pathlib.Path(engines.__file__).parents[1] / "assets/tiny/config.json", tmp_path / "config.json")
    assert architecture(str(tmp_path)) == tiny and architecture("random:qwen3-4b").layers == 36
    for model in ("Some/Model", "random:nothing", "no such folder"):
        with pytest.raises(ModelFolderError):
            architecture(model)


def test_topologies_and_meshes_that_cannot_be():
    with pytest.raises(ConfigError, match=r"v9-8 is not known\. known are v4-8, .*gpu-24gb"):
        target_of("v9-8")
    with pytest.raises(ConfigError, match="data=3 x fsdp=-1 x tensor=1 does not divide the 8 devices of v5e-8"):
        plan(from_dict({"mesh": {"data": 3}}), "v5e-8", compiled=False)
    assert {"v4-8", "v5e-1", "v5e-4", "v5e-8", "v5e-16", "v5p-8", "v6e-1", "v6e-4", "v6e-8", "v6e-16"} < set(TARGETS)
    assert all(np.prod([int(n) for n in t.layout.split(":")[1].split("x")]) == t.devices
               for t in TARGETS.values() if t.layout)  # fmt: skip


def test_without_libtpu_one_clear_line(monkeypatch, capsys):
    find = planning.importlib.util.find_spec
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda n: None if n == "libtpu" else find(n))
    assert main(["plan", str(CONFIGS / "tpu-v5e-8.toml"), "--topology", "v5e-8", "--json"]) == 2
    out, err = capsys.readouterr()
    complaint = [line for line in err.splitlines() if line.startswith("cz-jax: ")]
    assert (
        out == "" and len(complaint) == 1 and "pip install 'cz-jax[plan]'" in complaint[0] and "--count" in complaint[0]
    )


def test_the_environment_that_libtpu_needs(monkeypatch):
    found = planning._environment(TARGETS["v5e-4"])
    assert found["JAX_PLATFORMS"] == "cpu" and found["TPU_SKIP_MDS_QUERY"] == "1"
    assert found["TPU_ACCELERATOR_TYPE"] == "v5litepod-4" and found["TPU_WORKER_HOSTNAMES"] == "localhost"
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with planning._variables(found), multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(planning.os.getenv, ("TPU_SKIP_MDS_QUERY",)) == "1"
    assert planning.os.environ["TPU_WORKER_HOSTNAMES"] == "mine" and "TPU_SKIP_MDS_QUERY" not in planning.os.environ


def test_the_command(capsys):
    words = ["--topology", "gpu-24gb", "solver.param_dtype=float32", "lora.rank=0", "grpo.micro_batch_tokens=65536"]
    path = str(CONFIGS / "gpu-24gb-1.5b.toml")
    assert main(["plan", path, *words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] is False and value["hbm_bytes"] < value["bytes_per_device"]["total"]
    assert value["flops"] > 1e13 and value["seconds_estimate"] > 1 and "40% of the bfloat16 peak" in value["assumption"]
    parts = value["bytes_per_device"]
    assert sum(n for k, n in parts.items() if k != "total") == parts["total"]
    assert main([*value["next"][0].split()[1:], "--json"]) == 0  # the command that it advises
    assert json.loads(capsys.readouterr().out)["fits"] is True


# ---- the machine that is here


def test_fit_here_counts_and_advises():
    config = from_dict({"round": {"dataset_tasks": 2, "proposed_tasks": 0}, "sampling": {"max_new_tokens": 32}})
    found, said = here.fit(config, 64 << 30)
    assert said == [] and 0 < found["bytes_per_device"] < found["of"] == int((64 << 30) * SHARE / len(jax.devices()))
    found, said = here.fit(config, 256 << 20)
    assert len(said) == 1 and found["bytes_per_device"] > found["of"] and ". Try: " in said[0]
    assert here.fit(config, None) == (None, [])


def test_what_cannot_be_had_from_here_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert here.unreachable(from_dict({})) == []
    config = from_dict({
        "solver": {"model": "nobody/has-this"}, "evaluator": {"model": str(tmp_path)},
        "swarm": {"relay": "127.0.0.1:9"}, "checkpoint": {"folder": "s3://bucket/x"},
    })  # fmt: skip
    relay, bucket, model = here.unreachable(config)
    assert relay.startswith("relay 127.0.0.1:9 does not serve: ")
    assert "s3://bucket/x is no folder of this machine" in bucket
    assert model.startswith("nobody/has-this is not on this machine") and "Try: hf auth login" in model
