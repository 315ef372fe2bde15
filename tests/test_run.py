"""Whole runs on the embedded tiny model: what a run folder holds, exact resume, interrupts, kills, adapters, export."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cz_jax.build import convert_model, evaluate_model, export_run, judge_model, train
from cz_jax.build.models import load_model
from cz_jax.build.node import Pool
from cz_jax.build.verbs import Keeper
from cz_jax.config import from_dict, load, to_toml
from cz_jax.difficulty import LevelState
from cz_jax.errors import CheckpointError, ConfigError, ModelFolderError, Preempted, TaskError, UserError
from cz_jax.ledger import RunLedger
from cz_jax.loop import Position
from cz_jax.models.spec import weights
from cz_jax.parallel import make_mesh, tree_digest
from cz_jax.ports import SamplingMethod

TIMES = ("seconds", "seconds_by_phase", "tokens_per_second")
ROUNDS = 4
SMALL = {
    "run": {"rounds": ROUNDS},
    "proposer": {"max_new_tokens": 16, "max_tries": 1},
    "evaluator": {"model": "tiny/judge"},
    "tasks": {"sources": ["builtin@tiny_train"], "held_out": ["builtin@tiny_held_out"]},
    "sampling": {"max_new_tokens": 40, "max_sequences": 8},
    "round": {"group_size": 4, "dataset_tasks": 1, "proposed_tasks": 1},
    "reward": {"format": 0.5},
    "optimizer": {"learning_rate": 1e-3},
    "grpo": {"drop_zero_advantage": False},
    "checkpoint": {"every": 2},
    "eval": {"k": 2, "max_tasks": 2},
}


def small(**sections):
    merged = {s: dict(v) for s, v in SMALL.items()}
    for section, values in sections.items():
        merged.setdefault(section, {}).update(values)
    return from_dict(merged)


def timeless(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in RunLedger(folder).rounds()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, run folder, summary) of an undisturbed run, whose third round was recorded."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return small(), out, train(small(), out, trace=3)


def test_a_run_folder_holds_everything(finished):
    config, out, summary = finished
    names = {
        "config.toml",
        "model",
        "checkpoints",
        "metrics.jsonl",
        "rounds",
        "evaluations.json",
        "export",
        "summary.json",
    }
    assert names <= {p.name for p in out.iterdir()}
    assert load(out / "config.toml") == config
    rows = list(RunLedger(out).rounds())
    assert [r["round"] for r in rows] == [1, 2, 3, 4]
    wanted = {
        "reward", "reward_structure", "reward_format", "reward_correctness", "success", "success_by_level",
        "success_by_source", "level", "groups_dropped", "groups_trained", "groups_failed", "entropy", "clip_low_share",
        "clip_high_share", "policy_kl", "gradient_norm", "loss", "logprob_difference_mean", "logprob_difference_max",
        "truncated", "tokens_per_second", "seconds_by_phase", "proposals", "verdicts", "learning_rate",
    }  # fmt: skip
    assert all(wanted <= set(r) for r in rows), wanted - set(rows[0])
    assert json.loads((out / "summary.json").read_text())["rounds"] == ROUNDS == summary["rounds"]
    assert summary["avg_at_k_before"]["k"] == summary["pass_at_k_after"]["k"] == 2


def test_the_recorded_round_is_in_the_report(finished):
    _, out, _ = finished
    timeline = json.loads((out / "trace" / "timeline.json").read_text())
    names = [phase["name"] for phase in timeline["phases"]]
    assert (timeline["round"], names) == (3, ["propose", "roll_out", "share", "judge", "update"])
    assert timeline["seconds"] == pytest.approx(list(RunLedger(out).rounds())[2]["seconds"], rel=0.2, abs=0.1)
    busy = {phase["name"]: phase["busy"] for phase in timeline["phases"]}
    assert busy["roll_out"] > 0.3 and busy["share"] < 0.1, busy
    assert "One round on the devices" in (out / "report.html").read_text()


def test_sampler_and_trainer_agree_in_every_round(finished):
    assert all(r["logprob_difference_max"] <= 1e-4 for r in RunLedger(finished[1]).rounds())


def test_records_chain_the_policies_and_hold_the_answers(finished):
    ledger = RunLedger(finished[1])
    records = [ledger.read_round(n) for n in range(1, ROUNDS + 1)]
    for earlier, later in zip(records, records[1:], strict=False):
        assert earlier.policy_after == later.policy_before
    assert len({r.policy_after for r in records}) == ROUNDS  # every round moved the weights
    assert records[-1].policy_after == finished[2]["policy_digest"]
    for record in records:
        assert all(len(g.rollouts) == 4 and g.policy == record.policy_before for g in record.own)


def test_resume_continues_exactly(finished, tmp_path):
    config, whole, summary = finished
    first = small(run={"rounds": 2})
    train(first, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert timeless(tmp_path / "run") == timeless(whole)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policy_digest"] == summary["policy_digest"]


def test_resume_refuses_what_would_not_continue_exactly(finished, tmp_path):
    config, out, _ = finished
    changed = small(optimizer={"learning_rate": 5e-4}, sampling={"temperature": 0.7})
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.learning_rate.*sampling\.temperature|sampling\.temperature.*optimizer\.learning_rate",
    ):
        train(changed, out, resume=True)
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(config, tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match="holds a run.*--resume"):
        train(config, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        train(config, tmp_path / "mine")


def test_more_rounds_may_be_asked_for_but_not_under_a_falling_schedule(finished, tmp_path):
    falling = small(optimizer={"schedule": "linear"}, run={"rounds": 1}, eval={"before_and_after": False})
    train(falling, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run\.rounds changed"):
        train(
            falling.model_copy(update={"run": falling.run.model_copy(update={"rounds": 2})}),
            tmp_path / "run",
            resume=True,
        )


QUICK = {  # to compile quickly, and only once for all runs with the same run.compile_cache
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def child(config_path, out, *more, **variables):
    words = [sys.executable, "-c", "from cz_jax.cli.main import program; program()"]
    words += ["train", str(config_path), "--out", str(out), *more]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | variables
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
    )


def test_five_kills_at_random_moments_change_nothing(tmp_path):
    config = small(run={"rounds": 12}, checkpoint={"every": 1}, eval={"before_and_after": False})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert child(path, tmp_path / "whole").wait(300) == 0
    moments = random.Random(7)
    out, kills, resume = tmp_path / "killed", 0, []
    for _ in range(40):
        run = child(path, out, *resume)
        if kills < 5:
            target = len(lines(out)) + moments.choice([1, 2])
            wait_until(lambda: len(lines(out)) >= target or run.poll() is not None, 120)  # noqa: B023
            time.sleep(moments.random() * 0.5)
            kills += run.poll() is None
            run.kill()
            run.communicate()
        else:
            assert run.wait(300) == 0, run.stderr.read()
            break
        resume = ["--resume"] if (out / "config.toml").exists() else []
    assert kills == 5
    assert timeless(out) == timeless(tmp_path / "whole")
    digests = [json.loads((f / "summary.json").read_text())["policy_digest"] for f in (out, tmp_path / "whole")]
    assert digests[0] == digests[1]


def test_sigterm_at_random_moments_loses_no_round(tmp_path):
    config = small(
        run={"rounds": 12, "compile_cache": str(tmp_path / "cache")}, eval={"before_and_after": False},
        checkpoint={"every": 100}, proposer={"model": "none"}, grpo={"updates": 2},
    )  # fmt: skip
    path, whole, out = (tmp_path / name for name in ("config.toml", "whole", "out"))
    path.write_text(to_toml(config))
    first = child(path, whole, **QUICK)
    assert first.wait(300) == 0, first.stderr.read()
    moments, resume = random.Random(11), []
    for _ in range(3):
        run, target = child(path, out, *resume, **QUICK), len(lines(out)) + 2
        wait_until(lambda: len(lines(out)) >= target or run.poll() is not None, 120)  # noqa: B023
        time.sleep(moments.random() * 0.4)  # a round takes about that long
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGTERM)  # a machine that shuts down may send several
        _, said = run.communicate(timeout=60)
        assert run.returncode == 143 and "Traceback" not in said, said
        assert "preempted by SIGTERM; go on with" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
        saved = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
        assert saved == len(lines(out)) >= target
        resume = ["--resume"]
    last = child(path, out, *resume, **QUICK)
    assert last.wait(300) == 0, last.stderr.read()
    assert timeless(out) == timeless(whole)
    digests = [json.loads((f / "summary.json").read_text())["policy_digest"] for f in (out, whole)]
    assert digests[0] == digests[1]


def test_sigterm_before_the_run_stands_says_so(tmp_path):
    path, out = tmp_path / "config.toml", tmp_path / "out"
    path.write_text(to_toml(small()))
    code = "import sys; from cz_jax.cli.main import program; print('ready', file=sys.stderr, flush=True); program()"
    words = [sys.executable, "-c", code, "train", str(path), "--out", str(out)]
    run = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert run.stderr.readline() == "ready\n"
    time.sleep(0.2)  # JAX takes longer to load
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "cz-jax: preempted by SIGTERM; begin again with the same command"


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path):
    config = small(run={"rounds": 500}, checkpoint={"every": 400}, eval={"before_and_after": False})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    run = child(path, tmp_path / "run")
    read_until(run, "round 2/500")  # the third has just begun, so its update has not
    interrupted(run, signal.SIGINT, resumes=True)
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) >= 2


@pytest.mark.parametrize("stage, resumes", [("loading tiny", False), ("evaluating", True)])
def test_ctrl_c_before_the_first_round(tmp_path, stage, resumes):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(small()))
    run = child(path, tmp_path / "run")
    read_until(run, stage)
    interrupted(run, signal.SIGINT, resumes)
    assert (tmp_path / "run" / "config.toml").exists() == resumes
    if resumes:
        again = child(path, tmp_path / "run", "run.rounds=1", "eval.before_and_after=false", "--resume")
        assert again.wait(200) == 0, again.stderr.read()


@pytest.mark.parametrize("taken", [True, False], ids=["by the update", "by nobody"])
def test_a_save_that_fails_on_an_interrupt_is_told_unless_the_update_took_the_parameters(taken):
    state = {"w": jax.numpy.ones(3)}

    class Failing:
        def save(self, number, arrays, host, score):
            if taken:
                arrays["w"].delete()
            raise CheckpointError("the checkpoint of round 3 could not be written")

    learner = type("Learner", (), {"state": state})
    built = type("Built", (), {"learner": learner, "host_state": staticmethod(lambda position: {})})
    keeper = Keeper(built, None, Failing())
    keeper.mark(Position(3, LevelState(1)))
    with contextlib.nullcontext() if taken else pytest.raises(CheckpointError):
        keeper.save_interrupted(Preempted())
    assert keeper.saved is None


def read_until(run, text):
    for line in run.stderr:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said")


def interrupted(run, sent, resumes):
    begun = time.monotonic()
    run.send_signal(sent)
    _, err = run.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert run.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert "interrupted" in last and ("--resume" in last) == resumes and "Traceback" not in err, err


def test_two_trainers_on_one_folder(finished):
    from cz_jax.checkpoint import Checkpoints

    with (
        Checkpoints(finished[1] / "checkpoints", keep=1, keep_best=0),
        pytest.raises(CheckpointError, match="pid|process|another"),
    ):
        train(finished[0], finished[1], resume=True)


def test_the_export_is_the_run(finished, torch, tmp_path):
    import transformers

    _, out, summary = finished
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    exported = load_model(summary["export_dir"], None, "float32", mesh)
    ours = load_model(str(out), None, "float32", mesh)
    assert tree_digest(exported.params) == tree_digest(ours.params) == summary["policy_digest"]
    model = transformers.AutoModelForCausalLM.from_pretrained(summary["export_dir"], dtype=torch.float32)
    prompt = exported.tokenizer.encode_chat([{"role": "user", "content": "Write a function f."}])
    ids = torch.tensor([prompt])
    theirs = model.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))[
        0, len(prompt) :
    ]
    engine = exported.engine(mesh, "float32", 1)
    mine = engine.sample([prompt], [[0]], 24, SamplingMethod(temperature=0.0))[0][0]
    assert list(mine.tokens) == theirs.tolist()
    card = (out / "export" / f"round-{ROUNDS:06d}" / "README.md").read_text()
    assert finished[0].digest in card and "avg@2" in card and str(out) not in card


def test_export_refuses_what_is_no_run_and_a_taken_folder(finished, tmp_path):
    with pytest.raises(ModelFolderError, match="no run folder"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    with pytest.raises(ModelFolderError, match="not an empty folder"):
        export_run(finished[1], tmp_path / "taken")


def test_convert_and_export_give_back_every_bit(tmp_path):
    from safetensors.numpy import load_file

    from cz_jax.convert.folder import locate

    convert_model("tiny", tmp_path / "ours", None)
    export_run(tmp_path / "ours", tmp_path / "theirs")
    before, after = (load_file(f / "model.safetensors") for f in (locate("tiny"), tmp_path / "theirs"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.tobytes() == after[name].tobytes()


def test_adapters_kl_and_several_updates_train_and_export_merged(tmp_path):
    config = small(
        run={"rounds": 2}, lora={"rank": 4}, grpo={"kl": 0.01, "updates": 2, "loss": "dr_grpo", "divide_by_std": False},
        eval={"before_and_after": False}, solver={"compute_dtype": "bfloat16", "param_dtype": "bfloat16"},
        optimizer={"moments_dtype": "bfloat16", "learning_rate": 1e-2},
    )  # fmt: skip
    summary = train(config, tmp_path / "run")
    rows = list(RunLedger(tmp_path / "run").rounds())
    assert rows[0]["reference_kl"] >= 0 and rows[1]["reference_kl"] > 0 and rows[1]["policy_kl"] > 0
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    merged, base = (load_model(m, None, "bfloat16", mesh) for m in (summary["export_dir"], "tiny"))
    moved = {w.path for w in weights(base.arch) if changed(w, merged.params, base.params)}
    assert moved and all(path[-1] == "kernel" for path in moved)
    train(config.model_copy(update={"run": config.run.model_copy(update={"rounds": 3})}), tmp_path / "run", resume=True)
    assert len(list(RunLedger(tmp_path / "run").rounds())) == 3


def changed(w, a, b):
    from cz_jax.models.spec import leaf_of

    return not np.array_equal(np.asarray(leaf_of(a, w)), np.asarray(leaf_of(b, w)))


def test_roles_that_name_one_model_share_its_weights():
    pool = Pool(make_mesh(1, 1, 1, jax.devices()[:1]), "auto", lambda *a, **k: None)
    assert pool.get("tiny", None, "float32").params is pool.get("tiny", None, "float32").params
    assert pool.get("tiny", None, "float32").params is not pool.get("tiny", None, "bfloat16").params


def test_eval_by_name(finished):
    got = evaluate_model(str(finished[1]), "builtin@held_out", 2, "tiny", small(eval={"max_tasks": 3}))
    assert got["n_tasks"] + got["left_out"] == 3 and got["average_at_k"]["k"] == 2
    assert got["model_digest"] == finished[2]["policy_digest"]


@pytest.mark.parametrize("mode", ["direct", "reason", "generate"])
def test_judge_in_every_mode(tmp_path, mode):
    row = {"prompt": "Add one.", "entry_point": "f", "test_list": ["assert f(1) == 2"]}
    answers = [("def f(x):\n    return x + 1", 1), ("def f(x):\n    return x - 1", 0)] * 2
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row | {"solution": s, "label": l}) for s, l in answers))
    config = small(evaluator={"reason_tokens": 8, "generate_tokens": 8, "abstain_below": 0.0})
    got = judge_model("tiny", path, mode, config)
    assert got["n_pairs"] == 4 and got["failed"] == 0 and 0 <= got["accuracy"] <= 1
    assert (got["abstained"] == 0) == (mode != "generate")


WRONG_LABEL = '{"prompt": "x", "test_list": [1], "entry_point": "f", "solution": "s", "label": 2}'


@pytest.mark.parametrize(
    "text, told",
    [("", "no labelled answers"), ("{}", "line 1"), ("[1]", "line 1"), (WRONG_LABEL, "line 1")],
    ids=["empty", "no fields", "no object", "label 2"],
)
def test_pairs_that_are_none(tmp_path, text, told):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError, match=told):
        judge_model("tiny", path, "direct")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"solver": {"model": "random:nothing"}}, "known shape"),
        ({"solver": {"model": "no/such/folder"}}, "no/such/folder"),
        ({"mesh": {"data": 3}}, "does not divide the"),
        ({"tasks": {"sources": ["nowhere"]}}, "nowhere"),
        ({"sampling": {"max_new_tokens": 5000}}, "does not fit"),
    ],
    ids=["shape", "folder", "mesh", "source", "context"],
)
def test_what_cannot_be_built_is_told_in_a_line_and_leaves_no_run(tmp_path, settings, told):
    with pytest.raises(UserError, match=told) as e:
        train(small(**settings), tmp_path / "run")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()  # the corrected call may name the same folder


def test_bench_needs_no_tokenizer_and_gives_the_keys_that_are_promised():
    from golden_models import GOLDEN

    from cz_jax.bench import bench

    keys = {"seconds", "tokens_per_second", "compile_seconds", "peak_bytes", "flops", "matmul_peak_share"}
    for what in ("rollout", "train", "judge"):
        shape = {"prompts": 8, "group": 2, "prompt_tokens": 8, "new_tokens": 4}
        got = bench(what, model=str(GOLDEN / "tiny_qwen2"), **shape)
        assert keys <= set(got) and all(got[k] > 0 for k in keys - {"compile_seconds"})


TOGETHER = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=" + sys.argv[5]
from cz_jax.cli.main import main
flags = ["--coordinator", sys.argv[2], "--processes", sys.argv[3], "--process", sys.argv[4]]
flags = flags if sys.argv[3] != "1" else []
sys.exit(main(["train", sys.argv[1], "--out", sys.argv[6], *flags, *sys.argv[7:]]))
"""


def together(config, out, processes, devices, *more):
    """A run made by so many processes with so many devices each; what each said on stderr."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, config, address, str(processes), str(i), str(devices), str(out), *more],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    said = [c.communicate(timeout=300)[1] for c in children]
    assert [c.returncode for c in children] == [0] * processes, said
    return said


def test_two_processes_make_the_same_run_as_one(tmp_path):
    config = small(run={"rounds": 3}, eval={"before_and_after": False}, mesh={"data": 2, "fsdp": -1})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    one, two = tmp_path / "one", tmp_path / "two"
    together(path, one, 1, 4)
    said = together(path, two, 2, 2, "run.rounds=2")
    assert "round 2/2" in said[0] and "round" not in said[1]  # process 0 alone reports
    together(path, two, 1, 4, "--resume")  # saved by two, continued by one
    for a, b in zip(timeless(one), timeless(two), strict=True):
        for key in ("reward", "loss", "gradient_norm", "entropy"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)
        assert a["completion_tokens"] == b["completion_tokens"]
