"""The command line: help, exit statuses, what goes to stdout and what to stderr, and careless use of a terminal."""

import io
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import types

import pytest

import cz_jax
from cz_jax import doctor, local_swarm
from cz_jax.cli import live, show
from cz_jax.cli.main import command, main
from cz_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = [
    *(["demo"], ["train"], ["propose"], ["relay"], ["eval"], ["judge"], ["convert"], ["export"], ["bench"]),
    *(["plan"], ["report"], ["doctor"]),
    *(["identity"], ["identity", "new"], ["identity", "show"], ["config"], ["config", "show"]),
]
HEAVY = (
    "jax",
    "jaxlib",
    "flax",
    "orbax",
    "transformers",
    "datasets",
    "numpy",
    "torch",
    "cryptography",
    "cz_jax.config",
)


def run(*args, **more):
    """`cz-jax args` in a process of its own."""
    call = [sys.executable, "-c", "import sys; from cz_jax.cli.main import main; sys.exit(main())", *args]
    return subprocess.run(call, capture_output=True, text=True, cwd=more.pop("cwd", ROOT), timeout=60, **more)


@pytest.fixture
def build(monkeypatch):
    """A stand-in for cz_jax.build: every verb returns or raises `build.result`; `build.calls` keeps the calls."""
    fake = types.ModuleType("cz_jax.build")
    fake.result, fake.calls = {"value": 1}, []

    def verb(name):
        def called(*args, **named):
            fake.calls.append((name, args, named))
            print("a library prints this")
            if isinstance(fake.result, BaseException):
                raise fake.result
            return fake.result

        return called

    for name in ("demo", "train", "evaluate_model", "judge_model", "convert_model", "export_run", "bench"):
        setattr(fake, name, verb(name))
    monkeypatch.setitem(sys.modules, "cz_jax.build", fake)
    monkeypatch.setattr(cz_jax, "build", fake, raising=False)
    monkeypatch.setattr(local_swarm, "demo", fake.demo)
    monkeypatch.setitem(sys.modules, "cz_jax.bench", fake)
    return fake


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text("[run]\nrounds = 3\n")
    return str(path)


# ---- help


def test_the_table_of_commands():
    at = {name: sorted(getattr(c, "commands", {})) for name, c in command.commands.items()}
    plain = (
        *(
            "demo",
            "train",
            "propose",
            "relay",
            "eval",
            "judge",
            "convert",
            "export",
            "bench",
            "plan",
            "report",
            "doctor",
        ),
    )
    assert at == {**{name: [] for name in plain}, "identity": ["new", "show"], "config": ["show"]}


def child_seconds():
    """Processor time of all children so far: unlike a clock on the wall it does not depend on who else is at work."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_help_has_an_example_and_loads_nothing_heavy(words):
    script = (
        "import sys; from cz_jax.cli.main import main; status = main(sys.argv[1:]);"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    call = [sys.executable, "-c", script, *words, "--help"]
    seconds = math.inf
    for _ in range(3):
        begun = child_seconds()
        told = subprocess.run(call, capture_output=True, text=True, timeout=60)
        seconds = min(seconds, child_seconds() - begun)
        if seconds < 0.5:
            break
    assert told.returncode == 0 and told.stderr == "[]\n"
    assert "Example:\n" in told.stdout and f"cz-jax {' '.join(words)}" in told.stdout
    assert seconds < 0.5


def test_importing_the_package_is_light_too():
    script = f"import cz_jax, sys; print([m for m in {HEAVY!r} if m in sys.modules], cz_jax.__version__)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert told.stdout.startswith("[] 0.")


def test_the_package_offers_the_verbs(build):
    assert cz_jax.train is build.train and cz_jax.demo is local_swarm.demo
    from cz_jax.config import Config, load

    assert cz_jax.load_config is load and cz_jax.Config is Config
    assert set(cz_jax.__all__) <= set(dir(cz_jax))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cz_jax.trian  # noqa: B018


def test_no_arguments():
    told = run()
    assert told.returncode == 2 and "Commands:" in told.stdout and told.stderr == ""


def test_version():
    assert run("--version").stdout.startswith("cz-jax 0.")


# ---- usage errors


@pytest.mark.parametrize(
    "words, says",
    [
        (["tarin"], "Did you mean 'train'?"),
        (["identity", "nwe"], "Did you mean 'new'?"),
        (["identity"], "cz-jax identity --help"),
        (["train"], "Missing argument 'CONFIG.toml'"),
        (["eval", "--modle", "x"], "--model"),
        (["eval", "--model", "tiny"], "--tasks"),
        (["eval", "--model", "tiny", "--tasks", "builtin", "-k", "0"], "-k"),
        (["bench", "fly"], "fly"),
        (["bench", "rollout", "--prompts", "many"], "--prompts"),
        (["judge", "--model", "tiny", "--pairs", "x", "--mode", "guess"], "guess"),
        (["demo", "--rounds", "-1"], "--rounds"),
        (["demo", "extra\x1b[31m\nword"], "\\x1b[31m"),
        (["propos", "x.toml"], "No such command"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_usage_errors_are_one_line(words, says, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cz-jax: ") and err.count("\n") == 1 and says in err


# ---- exit statuses


def test_user_error(build, capsys):
    build.result = UserError("the model folder x holds only *.bin", "an old download", "cz-jax demo")
    assert main(["demo", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "cz-jax: the model folder x holds only *.bin. an old download. Try: cz-jax demo"


def test_a_defect_is_loud(build, capsys):
    build.result = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        main(["demo"])
    script = (
        "import sys; from cz_jax import local_swarm; local_swarm.demo = lambda **k: 1 / 0;"
        "from cz_jax.cli.main import main; sys.exit(main())"
    )
    told = subprocess.run([sys.executable, "-c", script, "demo", "--json"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 1 and "ZeroDivisionError" in told.stderr and told.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--out", "gs://bucket/x"],
        ["train", str(ROOT / "configs/cpu.toml"), "--out", "gs://bucket/x", "--resume"],
        ["propose", str(ROOT / "configs/cpu.toml"), "swarm.relay=127.0.0.1:1", "--out", "s3://bucket/x"],
        ["export", "runs/none", "gs://bucket/x"],
        ["convert", "tiny", "gs://bucket/x"],
        ["demo", "--out", "file:///tmp/x"],
    ],
    ids=" ".join,
)
def test_a_url_is_no_folder_to_write_to(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    complaint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cz-jax: ")]
    assert len(complaint) == 1 and "://" in complaint[0] and "is no folder of this machine" in complaint[0]
    assert "Try: runs/x" in complaint[0] and not list(tmp_path.iterdir())
    assert main(["relay", "--listen", "127.0.0.1:0", "--data", "gs://bucket/x"]) == 2
    assert "neither a folder nor the address of a Redis" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["demo"], ["export", "a", "b"], ["bench", "rollout"]], ids=" ".join)
def test_ctrl_c(build, capsys, words):
    build.result = KeyboardInterrupt()
    assert main(words) == 130
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.splitlines()[-1].startswith("cz-jax: interrupted")


def test_ctrl_c_in_training_prints_the_command_that_goes_on(build, capsys, config):
    build.result = KeyboardInterrupt()
    words = ["train", config, "run.seed=4", "--out", "runs/a b"]
    assert main(words) == 130
    assert f"begin again with: cz-jax train {config} run.seed=4 --out 'runs/a b'\n" in capsys.readouterr().err
    pathlib.Path("runs/a b").mkdir(parents=True)
    pathlib.Path("runs/a b/config.toml").write_text("[run]\n")
    assert main(words) == 130
    assert f"go on with: cz-jax train {config} run.seed=4 --out 'runs/a b' --resume\n" in capsys.readouterr().err


def test_a_real_sigint_ends_a_command_with_130(tmp_path):
    script = (
        "import sys, time; from cz_jax import local_swarm;"
        "local_swarm.demo = lambda say, **k: (say('note', text='ready'), time.sleep(60));"
        "from cz_jax.cli.main import main; sys.exit(main())"
    )
    child = subprocess.Popen([sys.executable, "-c", script, "demo"], stdout=-1, stderr=-1, text=True)
    while "ready" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=5)
    assert child.returncode == 130 and out == "" and "Traceback" not in err and "interrupted" in err


def test_no_handler_outlives_a_command():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- what is called with what


def test_train_calls_build(build, config, capsys):
    assert main(["train", config, "run.rounds=5", "mesh.fsdp=-1", "--resume", "--json"]) == 0
    (name, args, named), *_ = build.calls
    assert (name, args, set(named)) == ("train", (), {"config", "out", "resume", "say", "trace"})
    assert named["config"].run.rounds == 5 and named["resume"] is True
    assert named["out"] == pathlib.Path("runs/small")
    out, err = capsys.readouterr()
    assert out == '{"value": 1}\n' and "a library prints this" in err


def test_eval_and_judge_take_settings(build, capsys):
    sets = ["--set", "sampling.max_new_tokens=7", "--set", "eval.k=3", "--set", "evaluator.mode=reason"]
    assert main(["eval", "--model", "tiny", "--tasks", "builtin", *sets, "--json"]) == 0
    named = build.calls[-1][2]
    assert (named["model"], named["tasks"], named["k"], named["evaluator"]) == ("tiny", "builtin", 3, None)
    assert named["config"].sampling.max_new_tokens == 7
    assert main(["eval", "--model", "tiny", "--tasks", "builtin", "-k", "2", "--evaluator", "m", "--json"]) == 0
    assert (build.calls[-1][2]["k"], build.calls[-1][2]["evaluator"]) == (2, "m")
    assert main(["judge", "--model", "tiny", "--pairs", "p.jsonl", *sets, "--limit", "4", "--json"]) == 0
    named = build.calls[-1][2]
    assert (named["mode"], named["limit"], named["pairs"]) == ("reason", 4, pathlib.Path("p.jsonl"))
    assert main(["judge", "--model", "tiny", "--pairs", "p.jsonl", "--mode", "generate", *sets]) == 0
    assert build.calls[-1][2]["mode"] == "generate"
    assert main(["eval", "--model", "tiny", "--tasks", "builtin", "--set", "eval.kk=3"]) == 2
    assert "did you mean eval.k?" in capsys.readouterr().err


def test_the_other_verbs(build, capsys):
    assert main(["demo", "--out", "d", "--rounds", "3", "--nodes", "2", "--seed", "5", "--json"]) == 0
    named = build.calls[-1][2]
    del named["say"]
    assert named == {"out": pathlib.Path("d"), "rounds": 3, "nodes": 2, "seed": 5}
    assert main(["convert", "hf", "out", "--dtype", "bfloat16", "--json"]) == 0
    assert build.calls[-1] == ("convert_model", (), {"hf_dir": "hf", "out": pathlib.Path("out"), "dtype": "bfloat16"})
    assert main(["export", "run", "out", "--json"]) == 0
    assert build.calls[-1] == ("export_run", (), {"run": pathlib.Path("run"), "out": pathlib.Path("out")})
    words = "--model m --prompts 2 --group 3 --prompt-tokens 5 --new-tokens 7 --dtype bfloat16 --mode reason --json"
    assert main(["bench", "judge", *words.split()]) == 0
    name, args, named = build.calls[-1]
    sizes = {"prompts": 2, "group": 3, "prompt_tokens": 5, "new_tokens": 7}
    del named["say"]
    assert (name, args) == ("bench", ("judge",))
    assert named == {"model": "m", **sizes, "dtype": "bfloat16", "mode": "reason"}
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"value": 1}] * 4


def test_plain_results(build, capsys):
    build.result = {"reward": {"first": 0.12345, "last": math.nan}, "out": pathlib.Path("x"), "next": ["cz-jax doctor"]}
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["reward.first  0.123", "reward.last   -", "out           x", "", "Next:", "  cz-jax doctor"]


# ---- terminals


def test_a_reader_that_leaves_early_is_quiet(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[run]\nseed = 5\n")
    long = f"run.peer={'x' * 100_000}"  # more than a pipe holds
    main_call = f"{sys.executable} -c 'import sys; from cz_jax.cli.main import main; sys.exit(main())'"
    for words in (f"config show {path} {long}", f"config show {path} {long} --json", "--help", "train --help"):
        line = f"set -o pipefail; {main_call} {words} | head -c 1 >/dev/null"
        told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert (told.returncode, told.stderr) == (0, ""), words


def test_progress_that_nobody_reads_ends_the_command_quietly():
    script = (
        "import sys, time; from cz_jax import local_swarm;"
        "local_swarm.demo = lambda say, **k: [(say('note', text='x' * 9999), time.sleep(0.01)) for _ in range(3000)];"
        "from cz_jax.cli.main import main; sys.exit(main())"
    )
    line = f'{sys.executable} -c "{script}" demo 2>&1 | head -c 100 >/dev/null; echo ${{PIPESTATUS[0]}}'
    told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=25)
    assert (told.stdout, told.stderr) == ("1\n", "")


def test_home_unset_and_stdin_closed(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    path = tmp_path / "c.toml"
    path.write_text("[run]\nseed = 5\n")
    told = run("config", "show", str(path), "--json", env=environment, stdin=subprocess.DEVNULL)
    assert told.returncode == 0 and json.loads(told.stdout)["run"]["seed"] == 5
    closed = (
        f"{sys.executable} -c 'import sys; from cz_jax.cli.main import main; sys.exit(main())' config show {path} <&-"
    )
    told = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, timeout=60, env=environment)
    assert told.returncode == 0 and "seed = 5" in told.stdout and told.stderr == ""


def test_config_show(config, capsys):
    assert main(["config", "show", config, "run.seed=9"]) == 0
    out, err = capsys.readouterr()
    assert "rounds = 3" in out and "seed = 9" in out and err == ""
    pathlib.Path("again.toml").write_text(out)
    assert main(["config", "show", "again.toml"]) == 0
    assert capsys.readouterr().out == out
    assert main(["config", "show", "absent.toml"]) == 2
    assert "absent.toml does not exist" in capsys.readouterr().err


def test_identity_commands(tmp_path, capsys):
    path = str(tmp_path / "peer.key")
    assert main(["identity", "new", path, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["identity", "show", path, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {k: made[k] for k in ("peer_id", "name", "type")} and err == ""
    assert main(["identity", "new", path]) == 2
    assert "never overwritten" in capsys.readouterr().err
    os.chmod(path, 0o644)
    assert main(["identity", "show", path]) == 0
    out, err = capsys.readouterr()
    assert "chmod 400" in err and made["peer_id"] in out
    secret = pathlib.Path(path).read_bytes()[4:36].hex()
    assert secret not in out + err
    assert main(["identity", "show", str(tmp_path / "absent")]) == 2


# ---- progress


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def plain(clock):
    stream = io.StringIO()
    return show.Progress(stream, live=False, now=clock), lambda: stream.getvalue().splitlines()


def test_a_silence_says_what_how_long_and_how_long_expected():
    clock = Clock()
    say, lines = plain(clock)
    say("phase", name="compiling", expected=40)
    for second in range(1, 12):
        clock.time = second
        say.tick()
    assert lines() == [
        "compiling (about 40 s) ...",
        "compiling: 5 s so far, about 40 s expected",
        "compiling: 10 s so far, about 40 s expected",
    ]
    say("done", summary={})
    clock.time = 100.0
    say.tick()
    assert lines()[-1] == "done in 11 s"


def test_rounds_are_one_line_each_and_quick_phases_between_them_none():
    say, lines = plain(Clock())
    metrics = {"reward": 0.51234, "reward_structure": 0.3, "reward_correctness": 0.25, "level": 2, "success": 0.5}
    metrics |= {"tokens_per_second": 1234.5, "seconds": 2.25, "unknown": {"a": 1}}
    say("round", number=3, of=20, metrics=metrics, more="unknown")
    say("phase", name="rolling out", extra=1)
    say("something", a=1.5, b=None)
    assert lines() == [
        "round 3/20  reward 0.512 (structure 0.3 correctness 0.25)  level 2  success 0.5  1234 tok/s  2.25 s",
        "something a=1.5 b=-",
    ]
    say("round", number=1)
    say("round")
    say("note")
    assert len(lines()) == 5


def test_a_terminal_gets_a_live_line_and_a_dumb_one_does_not(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert show.can_animate(Terminal()) and not show.can_animate(io.StringIO())
    for dumb in ("dumb", "unknown", ""):
        monkeypatch.setenv("TERM", dumb)
        assert not show.can_animate(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with show.Progress(stream) as say:
        say("phase", name="compiling [bold]", expected=9)
        say("round", number=1, of=2, metrics={"reward": 0.5})
        say.tick()
    assert "round 1/2  reward 0.5" in stream.getvalue() and "compiling" in stream.getvalue()


def test_json_values():
    import numpy as np

    from cz_jax.nouns import Reward

    value = {
        "a": np.float32(0.5),
        "b": math.inf,
        "c": (np.int64(3), pathlib.Path("x")),
        "d": Reward(1.0, {"x": 1.0}),
        5: None,
    }
    told = show.plain_json(value)
    assert told == {"a": 0.5, "b": None, "c": [3, "x"], "d": {"total": 1.0, "parts": {"x": 1.0}}, "5": None}
    assert [show.duration(s) for s in (0, 59.9, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 05 min"]


# ---- doctor


def test_doctor_tells_no_secret_and_no_name(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/data/somebody/hf")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/scratch/somebody/dump")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "somebody" not in out + err and "hf_secret" not in out + err
    assert told["compile_cache"].startswith("~/.cache/cz-jax") and told["hugging_face_cache"].startswith(
        "/data/<user>/hf"
    )
    assert told["ok"] and told["versions"]["jax"] and told["cores"] >= 1 and told["devices"][0]["kind"] == "cpu"
    assert main(["doctor"]) == 0
    assert "versions.jax " in capsys.readouterr().out


def test_doctor_says_what_computes_attention(config, capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "plain: jax.numpy, compiled by XLA"
    path = pathlib.Path(config)
    path.write_text('[run]\nattention = "splash"\n')
    assert main(["doctor", config, "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["attention"] is None and "run.attention=splash is a kernel for TPUs" in told.err
    assert main(["train", config, "--out", str(path.parent / "run")]) == 2
    assert "run.attention=splash is a kernel for TPUs, and this is a cpu" in capsys.readouterr().err


def test_doctor_holds_a_config_against_the_devices(config, capsys):
    pathlib.Path(config).write_text("[mesh]\ndata = 3\nfsdp = 3\n")
    assert main(["doctor", config, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is False and "does not divide" in err and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    "hardware, platforms, environment, says",
    [
        (["nvidia: nvidia0"], {"cpu"}, {}, "cuda13"),
        (["tpu: accel0"], {"cpu"}, {}, '".[tpu]"'),
        (["nvidia: nvidia0"], {"cpu"}, {"JAX_PLATFORMS": "cpu"}, None),
        (["nvidia: nvidia0"], {"cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, None),
        (["nvidia: nvidia0"], {"gpu"}, {}, None),
        (["tpu: accel0"], {"tpu"}, {}, None),
        ([], {"cpu"}, {}, None),
    ],
)
def test_silent_fall_back_to_cpu(hardware, platforms, environment, says, monkeypatch):
    monkeypatch.setattr(doctor, "_versions", dict)
    told = doctor.silent_fallback(hardware, platforms, environment)
    assert (told is None) if says is None else says in told


def test_a_plugin_that_does_not_start_is_told_apart(monkeypatch):
    monkeypatch.setattr(doctor, "_versions", lambda: {"jax-cuda12-plugin": "0.10.2"})
    assert "did not start" in doctor.silent_fallback(["nvidia: nvidia0"], {"cpu"}, {})


def test_doctor_fails_on_a_silent_fall_back(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "accelerators", lambda: ["nvidia: nvidia0"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["problems"] and "JAX uses only the CPU" in err.splitlines()[-1]


def test_signs_of_accelerators(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("dev/nvidia0", "dev/nvidiactl", "dev/accel1", "dev/accel/accel0", "dev/vfio/3", "dev/vfio/vfio"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert doctor.accelerators(tmp_path) == ["nvidia: nvidia0", "tpu: accel1"]
    (tmp_path / "sys/bus/pci/devices/0").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0/vendor").write_text("0x1ae0\n")
    assert doctor.accelerators(tmp_path) == ["nvidia: nvidia0", "tpu: accel1", "tpu: vfio/3"]


def test_a_tpu_that_another_process_holds(tmp_path):
    assert doctor.tpu_holder(tmp_path) is None
    for path in ("dev/accel0", "dev/null", "proc/41/cmdline", "proc/42/cmdline"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"python\0train.py\0")
    for process, device in ((41, "/dev/null"), (42, "/dev/accel0"), (os.getpid(), "/dev/accel0")):
        (tmp_path / f"proc/{process}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{process}/fd/5").symlink_to(device)
    assert doctor.tpu_holder(tmp_path) == "process 42 (python train.py)"


def test_jax_is_not_asked_for_a_tpu_that_is_held(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "accelerators", lambda: ["tpu: accel0"])
    monkeypatch.setattr(doctor, "tpu_holder", lambda: "process 42 (python train.py)")
    monkeypatch.setattr(doctor, "_devices", lambda: pytest.fail("JAX would wait for it"))
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["devices"] == [] and "process 42 (python train.py) holds the TPU" in err.splitlines()[-1]


def test_compile_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert doctor.compile_cache_folder("off") is None
    assert doctor.compile_cache_folder("auto") == pathlib.Path("/caches/cz-jax/xla")
    assert doctor.compile_cache_folder("here") == pathlib.Path("here")


# ---- the view of a swarm

ROUND = {"reward": 0.75, "reward_structure": 0.25, "reward_format": 0.2, "reward_correctness": 0.3, "level": 3}


def swarm_events(say):
    say("phase", source="node-1", name="roll_out")
    for number, reward in ((1, 0.25), (2, 0.75)):
        metrics = ROUND | {"reward": reward, "groups_external": 1, "tokens_per_second": 812.3}
        say("round", source="node-1", number=number, of=60, metrics=metrics)
    before = {"k": 8, "value": 0.25, "low": 0.2, "high": 0.3}
    say("evaluated", source="node-1", when="before", n_tasks=40, average_at_k=before, pass_at_k=before | {"value": 0.5})
    say("round", source="proposer", number=1, of=None, metrics={"level": 2, "proposals": 3})
    say("phase", source="node-1", name="judge")


def test_a_swarm_on_a_plain_terminal_is_a_line_a_round():
    out, clock = io.StringIO(), [0.0]
    say = live.SwarmProgress(out, live=False, now=lambda: clock[0])
    swarm_events(say)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("node-1  round 1/60  reward 0.25 (structure 0.25 format 0.2 correctness 0.3)  level 3")
    assert lines[2] == (
        "node-1  before (40 held-out tasks):  average@8 25.0% (20.0% to 30.0%)  pass@8 50.0% (20.0% to 30.0%)"
    )
    assert len(lines) == 3
    clock[0] = 7.0
    say.tick()
    assert out.getvalue().splitlines()[3] == "node-1 judge 7 s"


def test_a_swarm_on_a_terminal_is_a_table():
    from rich.console import Console

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    say = live.SwarmProgress(Terminal(), live=True)
    swarm_events(say)
    console = Console(file=io.StringIO(), width=140)
    console.print(say._table())
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if "node-1" in line).split()
    assert row == ["node-1", "2/60", "0.75", "▁█", "0.25", "0.2", "0.3", "3", "25%", "812", "2", "judge"]


def test_a_curve_has_its_least_and_greatest():
    assert live.curve([0.0, 1.0, 0.5]) == "▁█▄" and live.curve([2.0, 2.0]) == "▁▁" and live.curve([1.0]) == ""
