"""tpu/: every command line that the scripts give to gcloud, told by a stand-in for it that records its calls."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
SCRIPTS = ("create", "setup", "run", "status", "ssh", "stop", "delete")
SHELL = [TPU / name for name in (*SCRIPTS, "on-host", "lib.sh")] + [ROOT / "scripts/plan_all.sh"]
WHERE = "--project=p --zone=z"
SLICE = f"gcloud compute tpus queued-resources describe cz {WHERE} --format=value(state.state)"

STAND_IN = """#!/usr/bin/env bash
# Records each call. `states` holds the answers to describe, `ssh_status` those of a training: a line a call, the last
# one for ever.
pop() {
  head -n 1 "$STAND_IN/$1" 2>/dev/null
  if [ "$(wc -l <"$STAND_IN/$1" 2>/dev/null)" -gt 1 ]; then sed -i 1d "$STAND_IN/$1"; fi
}
echo "gcloud $*" >>"$STAND_IN/calls"
case "$*" in
  "config get-value project"*) echo "$STAND_IN_PROJECT" ;;
  *" describe "*) state=$(pop states); [ "$state" != MISSING ] || exit 1; echo "$state" ;;
  *" create "*) if [ -f "$STAND_IN/create_error" ]; then cat "$STAND_IN/create_error" >&2; exit 1; fi ;;
  *on-host" train"*) echo "round 1"; exit "$(pop ssh_status)" ;;
esac
"""


class Cloud:
    """A folder with a `gcloud` that records, and the scripts of a copy of tpu/ run against it."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.root = folder, folder / "checkout"
        (folder / "bin").mkdir()
        gcloud = folder / "bin/gcloud"
        gcloud.write_text(STAND_IN)
        gcloud.chmod(0o755)
        shutil.copytree(TPU, self.root / "tpu", ignore=lambda _, names: {"env"} & set(names))
        for name in ("cz_jax", "configs", "scripts"):
            (self.root / name).mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "configs/a.toml"):
            (self.root / name).write_text("")
        self.states("ACTIVE")
        self.ssh_status(0)

    def states(self, *words):
        (self.folder / "states").write_text("".join(f"{w}\n" for w in words))

    def ssh_status(self, *codes):
        (self.folder / "ssh_status").write_text("".join(f"{c}\n" for c in codes))

    def run(self, script: str, *words: str, path: str | None = None, **variables):
        variables = {"PROJECT": "p", "ZONE": "z", "POLL_SECONDS": "0"} | variables
        clean = {k: os.environ[k] for k in ("HOME", "LANG") if k in os.environ}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}" if path is None else path
        environment = clean | {"PATH": path, "STAND_IN": str(self.folder), "STAND_IN_PROJECT": ""} | variables
        call = ["bash", str(self.root / "tpu" / script), *words]
        return subprocess.run(
            call, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=60
        )

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def deeds(self) -> list[str]:
        """What the calls that change something do, in a word each."""
        words = ("create", "delete", "stop", "scp", "setup", "train")
        return [next(w for w in words if f" {w} " in c) for c in self.calls if any(f" {w} " in c for w in words)]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    told = subprocess.run([shellcheck, "-x", "-P", ROOT, *SHELL], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_asks_nobody(cloud, script):
    told = cloud.run(script, "--help", PROJECT="")
    assert told.returncode == 0 and f"Usage: tpu/{script}" in told.stdout and "Example:" in told.stdout
    assert "shellcheck" not in told.stdout and not cloud.calls


def test_every_setting_is_named_in_the_example():
    named = set(re.findall(r"^([A-Z_]+)=", (TPU / "env.example").read_text(), re.MULTILINE))
    listed = re.search(r"SETTINGS=\((.*?)\)", (TPU / "lib.sh").read_text(), re.DOTALL)[1].split()
    assert named == set(listed)


QUEUED = (
    f"compute tpus queued-resources create cz {WHERE} --node-id=cz --accelerator-type={{}} --runtime-version={{}} "
    "--valid-until-duration=6h --labels=made-by=cz-jax"
)
INSTANCE = (
    f"gcloud compute instances create cz {WHERE} --machine-type={{}} "
    "--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --image-project=ubuntu-os-accelerator-images "
    "--boot-disk-size=200GB --maintenance-policy=TERMINATE --scopes=cloud-platform --labels=made-by=cz-jax --async "
    "--max-run-duration=12h --instance-termination-action=DELETE"
)
FLEX = " --provisioning-model=flex-start --max-run-duration=12h"


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"MODE": "on-demand"}, "gcloud " + QUEUED.format("v5litepod-8", "v2-alpha-tpuv5-lite")),
        ({"MODE": "flex-start"}, "gcloud alpha " + QUEUED.format("v5litepod-8", "v2-alpha-tpuv5-lite") + FLEX),
        ({"MODE": "spot", "ACCELERATOR": "v6e-8"}, "gcloud " + QUEUED.format("v6e-8", "v2-alpha-tpuv6e") + " --spot"),
        ({"MODE": "on-demand", "ACCELERATOR": "v5p-8"}, "gcloud " + QUEUED.format("v5p-8", "v2-alpha-tpuv5")),
        ({"MODE": "on-demand", "ACCELERATOR": "v4-8"}, "gcloud " + QUEUED.format("v4-8", "tpu-ubuntu2204-base")),
        (
            {"MODE": "spot", "ACCELERATOR": "v5litepod-16"},
            "gcloud " + QUEUED.format("v5litepod-16", "v2-alpha-tpuv5-lite") + " --spot",
        ),
        (
            {"MODE": "on-demand", "ACCELERATOR": "v6e-4", "BACKEND": "compute-engine"},
            INSTANCE.format("ct6e-standard-4t"),
        ),
        (
            {"MODE": "flex-start", "ACCELERATOR": "v6e-8", "BACKEND": "compute-engine"},
            INSTANCE.format("ct6e-standard-8t") + " --provisioning-model=FLEX_START --request-valid-for-duration=2h",
        ),
        (
            {"MODE": "spot", "ACCELERATOR": "v6e-1", "BACKEND": "compute-engine"},
            INSTANCE.format("ct6e-standard-1t") + " --provisioning-model=SPOT",
        ),
    ],
)
def test_create_asks_for_exactly_this(cloud, settings, line):
    told = cloud.run("create", "--dry-run", **settings)
    assert (told.returncode, told.stdout) == (0, line + "\n") and not cloud.calls
    cloud.states("MISSING", "ACTIVE" if settings.get("BACKEND") is None else "RUNNING")
    assert cloud.run("create", **settings).returncode == 0
    assert [c for c in cloud.calls if " create " in c] == [line]


def test_create_waits_and_says_what_is_up(cloud):
    cloud.states("MISSING", "MISSING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    told = cloud.run("create")
    assert told.returncode == 0 and cloud.deeds == ["create"]
    assert "cz is PROVISIONING" in told.stderr
    assert "STILL UP AND PAID FOR: cz (v5litepod-8, flex-start) in z, project p. Delete it: tpu/delete" in told.stderr


def test_create_finds_the_slice_that_is_there(cloud):
    told = cloud.run("create")
    assert told.returncode == 0 and "there already: ACTIVE" in told.stderr and cloud.deeds == []


@pytest.mark.parametrize(
    "states, said", [(["SUSPENDED"], "still holds its quota"), (["MISSING", "FAILED"], "became FAILED")]
)
def test_create_refuses_a_dead_slice(cloud, states, said):
    cloud.states(*states)
    told = cloud.run("create")
    assert told.returncode == 2 and said in told.stderr and "tpu/delete" in told.stderr


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"PROJECT": ""}, "no project is set. Try: PROJECT="),
        ({"ZONE": ""}, "no zone is set. Try: ZONE="),
        ({"MODE": "free"}, "MODE=free is not known"),
        ({"BACKEND": "cloud"}, "BACKEND=cloud is not known"),
        ({"ACCELERATOR": "v9-8"}, "ACCELERATOR=v9-8 is not known"),
        ({"ACCELERATOR": "v6e-16", "BACKEND": "compute-engine"}, "which Compute Engine makes one by one"),
        ({"BACKEND": "compute-engine"}, "no machine type for v5litepod-8"),
        ({"NAME": "../x"}, "NAME=../x is no name"),
        ({"BUCKET": "s3://x"}, "BUCKET=s3://x is no bucket"),
        ({"MAX_HOURS": "1; ls"}, "MAX_HOURS=1; ls is not a whole number"),
        ({"CZ_TPU_ENV": "/nowhere"}, "/nowhere (CZ_TPU_ENV) does not exist"),
    ],
)
@pytest.mark.parametrize("script", ["create", "delete"])
def test_a_setting_that_cannot_be(cloud, script, settings, said):
    told = cloud.run(script, **settings)
    assert told.returncode == 2 and said in told.stderr and "Try: " in told.stderr
    assert len(told.stderr.splitlines()) == 1 and cloud.deeds == []


def test_without_gcloud(cloud):
    (cloud.folder / "few").mkdir()
    for tool in ("bash", "dirname", "basename", "rm", "mktemp"):  # a gcloud of this machine must not be found
        (cloud.folder / "few" / tool).symlink_to(shutil.which(tool))
    for script in SCRIPTS:
        told = cloud.run(script, *(["configs/a.toml"] if script == "run" else []), path=str(cloud.folder / "few"))
        assert told.returncode == 2 and "gcloud is not installed. Try: https://" in told.stderr


def test_the_project_of_gcloud_is_taken(cloud):
    cloud.run("create", PROJECT="", STAND_IN_PROJECT="mine")
    assert "--project=mine" in cloud.calls[-1]


def test_a_settings_file_is_below_the_shell(cloud):
    (cloud.root / "tpu/env").write_text('PROJECT=file\nZONE=file\nMODELS="a b"\n')
    told = cloud.run("setup", "--dry-run", PROJECT="shell", ZONE="")
    assert "no zone is set" in told.stderr  # set to nothing in the shell
    clean = {"PATH": f"{cloud.folder / 'bin'}:{os.environ['PATH']}", "PROJECT": "shell"}
    call = ["bash", str(cloud.root / "tpu/setup"), "--dry-run"]
    told = subprocess.run(call, capture_output=True, text=True, env=clean, timeout=60)
    assert "--project=shell --zone=file" in told.stdout and r"setup\ a\\\ b" in told.stdout


@pytest.mark.parametrize(
    "message, said",
    [
        ("Quota 'TPUV5sLitepod' exhausted. Limit 0", "has no quota left for v5litepod-8 (flex-start) in z"),
        ("ERROR: SERVICE_DISABLED tpu.googleapis.com", "gcloud services enable tpu.googleapis.com"),
        ("PERMISSION_DENIED: tpu.nodes.create", "roles/tpu.admin"),
        ("There is no more capacity in the zone", "MODE=flex-start"),
        ("something else", "--dry-run"),
    ],
)
def test_a_refusal_is_explained(cloud, message, said):
    cloud.states("MISSING")
    (cloud.folder / "create_error").write_text(message + "\n")
    told = cloud.run("create")
    assert told.returncode == 2 and message in told.stderr and said in told.stderr


def test_setup_brings_the_checkout(cloud):
    told = cloud.run("setup")
    assert told.returncode == 0, told.stderr
    copy, install = [c for c in cloud.calls if " scp " in c or " ssh " in c]
    assert re.fullmatch(rf"gcloud compute tpus tpu-vm scp \S+/cz-jax.tar.gz cz: {WHERE} --worker=all", copy)
    assert install.startswith(
        f"gcloud compute tpus tpu-vm ssh cz {WHERE} --worker=all --command=mkdir -p cz-jax && tar "
    )
    assert "on-host setup Qwen/Qwen2.5-Coder-0.5B-Instruct\\ Qwen" in install and "STILL UP" in told.stderr


TRAIN = (
    f"gcloud compute tpus tpu-vm ssh cz {WHERE} --worker=all --command=BUCKET={{}} SYNC_SECONDS=120 "
    "bash cz-jax/tpu/on-host train first configs/a.toml run.rounds=3 "
)


def test_run_trains_and_brings_the_run_home(cloud):
    told = cloud.run("run", "--id", "first", "configs/a.toml", "run.rounds=3")
    assert told.returncode == 0, told.stderr
    assert [c for c in cloud.calls if "describe" not in c] == [
        TRAIN.format("''"),
        f"gcloud compute tpus tpu-vm scp --recurse cz:cz-jax/runs/first {cloud.root}/runs/ {WHERE} --worker=0",
    ]
    assert "STILL UP AND PAID FOR" in told.stderr.splitlines()[-1]
    assert "round 1" in told.stdout and (cloud.root / "runs/tpu/first.log").read_text() == "round 1\n"


def test_run_resumes_after_a_preemption_on_a_new_slice(cloud):
    #            want_ready, after the loss, delete (twice), create (twice), its end, setup (twice), the run's end
    cloud.states("ACTIVE", "SUSPENDED", "SUSPENDED", "MISSING", "MISSING", "ACTIVE")
    cloud.ssh_status(255, 0)
    told = cloud.run("run", "--id", "first", "configs/a.toml", BUCKET="gs://b/cz", MODE="spot")
    assert told.returncode == 0, told.stderr
    assert cloud.deeds == ["train", "delete", "create", "scp", "setup", "train", "scp"]
    assert "making it again, then resuming (1 of 20)" in told.stderr
    assert any(f"queued-resources delete cz {WHERE} --force --quiet" in c for c in cloud.calls)


@pytest.mark.parametrize("status", [75, 143, 255])
def test_run_resumes_on_the_slice_that_is_up(cloud, status):
    cloud.ssh_status(status, status, 0)
    told = cloud.run("run", "--id", "first", "configs/a.toml")
    assert told.returncode == 0 and cloud.deeds == ["train", "train", "train", "scp"]


def test_a_slice_that_cannot_be_made_again_is_tried_again_and_reported(cloud):
    #            want_ready, loss; then delete (twice), create, POLL and state, for ever
    cloud.states("ACTIVE", "SUSPENDED", "SUSPENDED", "MISSING")
    cloud.ssh_status(143)
    (cloud.folder / "create_error").write_text("There is no more capacity in the zone\n")
    told = cloud.run("run", "--id", "first", "configs/a.toml", BUCKET="gs://b/cz", MODE="spot", RESTARTS="3")
    assert told.returncode == 255 and cloud.deeds == ["train", "delete", "create", "create", "create"]
    assert told.stderr.count("cz could not be made again") == 3 and "RESTARTS=3 allows no more" in told.stderr
    assert "no v5litepod-8 free" in told.stderr and "nothing is up" in told.stderr.splitlines()[-1]


def test_run_ends_on_any_other_status_and_after_enough_restarts(cloud):
    for tries, status in enumerate((1, 2, 130), 1):  # 130: stopped by somebody, not taken away
        cloud.ssh_status(status)
        told = cloud.run("run", "--id", "first", "configs/a.toml")
        assert told.returncode == status and cloud.deeds == ["train"] * tries and "STILL UP" in told.stderr
    cloud.ssh_status(255)
    told = cloud.run("run", "--id", "first", "configs/a.toml", RESTARTS="2")
    assert told.returncode == 255 and cloud.deeds == ["train"] * 6 and "RESTARTS=2 allows no more" in told.stderr


@pytest.mark.parametrize(
    "words, settings, said",
    [
        (["configs/a.toml"], {"MODE": "spot"}, "MODE=spot without BUCKET would lose the run"),
        (["configs/none.toml"], {}, "is not a file of this checkout"),
        (["--id", "a/../b", "configs/a.toml"], {}, "is no name of a run"),
        ([], {}, "no configuration is named"),
        (["--fast"], {}, "--fast is not known"),
        (["configs/a.toml"], {"ACCELERATOR": "v6e-16"}, "several hosts, which need BUCKET for their checkpoints"),
    ],
)
def test_run_refuses(cloud, words, settings, said):
    told = cloud.run("run", *words, **settings)
    assert told.returncode == 2 and said in told.stderr and cloud.deeds == []


def test_run_of_any_command_on_all_hosts(cloud):
    told = cloud.run("run", "--", "echo", "a b")
    assert told.returncode == 0 and "STILL UP" in told.stderr
    assert r"--worker=all --command=cd cz-jax && echo a\ b" in "\n".join(cloud.calls)


def test_ctrl_c_asks_the_run_to_stop_and_says_what_is_up(cloud):
    gcloud = cloud.folder / "bin/gcloud"
    gcloud.write_text(STAND_IN.replace('echo "round 1"; exit', "exec sleep 30"))
    environment = os.environ | {"PATH": f"{cloud.folder / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(cloud.folder)}
    environment |= {"PROJECT": "p", "ZONE": "z"}
    call = ["bash", str(cloud.root / "tpu/run"), "--id", "first", "configs/a.toml"]
    running = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for _ in range(200):
            if "train" in cloud.deeds:
                break
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=20)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130 and "STILL UP" in said and "tpu/run --id first configs/a.toml" in said
    assert "bash cz-jax/tpu/on-host stop first" in "\n".join(cloud.calls)


def test_delete(cloud):
    cloud.states("ACTIVE", "MISSING")
    told = cloud.run("delete", "--yes")
    assert told.returncode == 0 and "cz is gone" in told.stderr and cloud.deeds == ["delete"]
    assert cloud.run("delete", "--yes").returncode == 0 and cloud.deeds == ["delete"]  # nothing there: nothing asked
    cloud.states("ACTIVE")
    assert "nobody is there to confirm" in cloud.run("delete").stderr
    line = cloud.run("delete", "--dry-run", BACKEND="compute-engine", ACCELERATOR="v6e-8").stdout
    assert line == f"gcloud compute instances delete cz {WHERE} --quiet\n"


def test_stop_is_for_on_demand_slices(cloud):
    assert "cannot be stopped and started again" in cloud.run("stop", MODE="spot").stderr and cloud.deeds == []
    assert cloud.run("stop", MODE="on-demand").returncode == 0 and cloud.deeds == ["stop"]
    cloud.states("STOPPED")
    assert cloud.run("stop", MODE="on-demand").returncode == 0 and cloud.deeds == ["stop"]


def test_status_and_ssh(cloud):
    told = cloud.run("status")
    assert "STILL UP" in told.stderr and "on-host status" in cloud.calls[-1]
    assert "tpu-vm ssh cz" in cloud.run("ssh", "--worker", "0", "--dry-run").stdout
    cloud.states("MISSING")
    assert "nothing is up" in cloud.run("status").stderr
    assert "there is no slice cz in z. Try: tpu/create" in cloud.run("ssh").stderr


# ---- what runs on the host


@pytest.fixture
def host(tmp_path):
    """A host's checkout with a stand-in for cz-jax that records its arguments and saves on SIGTERM."""
    (tmp_path / "tpu").mkdir()
    shutil.copy(TPU / "on-host", tmp_path / "tpu/on-host")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    trainer = tmp_path / ".venv/bin/cz-jax"
    trainer.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" >>"{tmp_path}/calls"\n'
        "trap 'echo saved; exit 143' TERM\n"
        "mkdir -p runs/first; touch runs/first/config.toml\nif [ -f slow ]; then while true; do sleep 0.1; done; fi\n"
    )
    trainer.chmod(0o755)
    return tmp_path


def on_host(folder, *words):
    return [*("bash", str(folder / "tpu/on-host")), *words], {"PATH": os.environ["PATH"], "HOME": str(folder)}


def test_a_run_that_is_there_is_resumed(host):
    for _ in range(2):
        call, environment = on_host(host, "train", "first", "configs/a.toml", "run.rounds=3")
        assert subprocess.run(call, env=environment, timeout=60).returncode == 0
    began, resumed = (host / "calls").read_text().splitlines()
    assert began == "train configs/a.toml run.rounds=3 --out runs/first" and resumed == began + " --resume"


HOSTS = "t1v-0:0:10.0.0.2,t1v-1:1:10.0.0.3"


@pytest.mark.parametrize(
    "number, hosts", [(0, HOSTS), (1, HOSTS), (1, "10.0.0.2,10.0.0.3"), (0, "10.0.0.2"), (0, None)]
)
def test_hosts_find_each_other_and_the_first_keeps_the_run(host, number, hosts):
    """By a metadata server and a bucket whose stand-ins record what they are asked for."""
    (host / "bin").mkdir()
    attributes = {"worker-network-endpoints": hosts, "agent-worker-number": number}
    known = "".join(f"  */{name}) echo {value} ;;\n" for name, value in attributes.items() if hosts)
    for name, text in {
        "curl": f'case "$*" in\n{known}  *) exit 22 ;;\nesac\n',
        "gcloud": f'echo "$*" >>"{host}/asked"\ncase "$*" in *" ls "*) [ -f "{host}/kept" ] ;; esac\n',
    }.items():
        (host / "bin" / name).write_text("#!/usr/bin/env bash\n" + text)
        (host / "bin" / name).chmod(0o755)
    call, environment = on_host(host, "train", "first", "configs/a.toml")
    environment |= {"PATH": f"{host / 'bin'}:{environment['PATH']}", "BUCKET": "gs://b/cz"}
    for _ in range(2):
        assert subprocess.run(call, env=environment, timeout=60).returncode == 0
        (host / "kept").touch()
        shutil.rmtree(host / "runs/first")  # a new slice
    meeting = f"--coordinator 10.0.0.2:8476 --processes 2 --process {number}"
    together = f"checkpoint.folder=gs://b/cz/checkpoints/first {meeting}"
    first = "train configs/a.toml --out runs/first" + (f" {together}" if hosts and "," in hosts else "")
    assert (host / "calls").read_text().splitlines() == [first, first]
    asked = (host / "asked").read_text().splitlines() if (host / "asked").exists() else []
    copied = "storage rsync --recursive --delete-unmatched-destination-objects runs/first gs://b/cz/runs/first"
    fetched = "storage rsync --recursive gs://b/cz/runs/first runs/first"
    assert (asked.count(copied), asked.count(fetched)) == ((2, 1) if number == 0 else (0, 0))


@pytest.mark.parametrize("asked, status", [(True, 130), (False, 143)], ids=["stopped", "preempted"])
def test_sigterm_reaches_the_trainer_and_its_status_comes_back(host, asked, status):
    (host / "slow").touch()
    call, environment = on_host(host, "train", "first", "configs/a.toml")
    running = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for _ in range(200):
            if (host / "runs/first/config.toml").exists():
                break
            time.sleep(0.05)
        if asked:
            call, environment = on_host(host, "stop", "first")
            subprocess.run(call, env=environment, timeout=60)
        else:
            os.kill(running.pid, signal.SIGTERM)
        said, _ = running.communicate(timeout=20)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == status and said == "saved\n" and not (host / "runs-first.pid").exists()
