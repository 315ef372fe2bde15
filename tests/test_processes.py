"""Several processes of one run: how they meet, what the others do when one is killed, preempted, stopped or wrong, and
that the run goes on exactly."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_run import QUICK, lines, small, timeless, wait_until

from cz_jax.config import to_toml
from cz_jax.errors import ConfigError
from cz_jax.processes import LOST, place

WATCHER = """
import os, sys, time
from cz_jax import processes
from cz_jax.errors import UserError
address, count, number, silent, script = sys.argv[1:]
processes.ALIVE_SECONDS, processes.SILENT_SECONDS, processes.PATIENCE_SECONDS = 0.2, float(silent), 0.5

def ended(text, status):
    print(text, flush=True)
    os._exit(status)

try:
    watch = processes.Watch(address, int(count), int(number), ended)
    watch.meet(5)
except UserError as e:
    print(e, flush=True)
    os._exit(2)
print("met", flush=True)
if script == "wait":
    time.sleep(30)
watch.leave(int(script))
time.sleep(0.5)
os._exit(int(script))
"""


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


class Watchers:
    """Processes that hold a Watch and nothing else. `scripts`: "wait", or the status with which each leaves."""

    def __init__(self, scripts, silent=20.0, address=None):
        self.address = address or free_address()
        self.all = [self.start(len(scripts), i, s, silent) for i, s in enumerate(scripts) if s is not None]

    def start(self, count, number, script="wait", silent=20.0):
        words = [sys.executable, "-c", WATCHER, self.address, str(count), str(number), str(silent), script]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for p in self.all:
            if p.poll() is None:
                p.kill()
            p.communicate()

    def met(self):
        for p in self.all:
            assert p.stdout.readline() == "met\n"

    def end(self, which, status, *said):
        """All of `which` end with this status and one line that holds these words."""
        for i in which:
            out, _ = self.all[i].communicate(timeout=20)
            assert self.all[i].returncode == status, out
            assert len(out.splitlines()) == bool(said) and all(word in out for word in said), out


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_others_name_the_one_that_was_killed(victim):
    with Watchers(["wait"] * 3) as run:
        run.met()
        run.all[victim].kill()
        begun = time.monotonic()
        run.end({0, 1, 2} - {victim}, LOST, f"process {victim} of 3 is gone: it was killed")
        assert time.monotonic() - begun < 10


def test_one_that_falls_silent_is_gone_too():
    with Watchers(["wait"] * 3, silent=2.0) as run:
        run.met()
        run.all[1].send_signal(signal.SIGSTOP)
        run.end((0, 2), LOST, "process 1 of 3 is gone: nothing was heard of it for 2 s")


def test_ends_that_are_told_are_no_loss():
    with Watchers(["0"] * 3) as run:
        run.met()
        run.end((0, 1, 2), 0)
    with Watchers(["wait", "2", "wait"]) as run:
        run.met()
        run.end((1,), 2)
        run.end((0,), 2, "process 1 ended with status 2; its own output says why")
    with Watchers(["1", "wait"]) as run:
        run.met()
        run.end((1,), 1, "process 0 ended with status 1")


def test_who_does_not_belong_is_refused_and_disturbs_nobody():
    with Watchers(["wait", "wait"]) as run:
        run.met()
        for count, number, why in (
            (3, 1, "it has --processes 2, this one 3"),
            (2, 1, "it has another process 1 already"),
        ):
            out, _ = run.start(count, number).communicate(timeout=20)
            assert f"process 0 at {run.address} refuses this process: {why}" in out
        host, _, port = run.address.rpartition(":")
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100_000, b"cz-jax/1 alive -1 2\n"):
            with socket.create_connection((host, int(port))) as stray:
                stray.sendall(text)
        out, _ = run.start(2, 0).communicate(timeout=20)
        assert f"process 0 cannot listen at {run.address}" in out and "Try: --coordinator" in out
        assert [p.poll() for p in run.all] == [None, None]


def test_one_that_never_comes_is_named():
    with Watchers(["wait", "wait", None]) as run:
        lone = Watchers([None, "wait"])
        run.end((0,), 2, "process 2 did not come within 5 s")
        assert "nobody answers at 127.0.0.1" in lone.all[0].communicate(timeout=20)[0]


def test_where_a_process_is_placed(monkeypatch):
    assert place("a:1", 2, 1) == ("a:1", 2, 1) and place(None, None, None) is None
    for told in (("a:1", None, None), ("a:1", 2, 2), (None, 2, 0)):
        with pytest.raises(ConfigError, match="--process"):
            place(*told)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert place(None, None, None) is None  # a slice of one host
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t-0,t-1,t-2")
    with pytest.raises(ConfigError, match="TPU_WORKER_ID is ''"):
        place(None, None, None)
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert place(None, None, None) == ("t-0:8476", 3, 2)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    with pytest.raises(ConfigError, match="counted over all slices"):
        place(None, None, None)


def launch(config, out, cache, *more, processes=2):
    """The processes of one run, one device each."""
    address = free_address()
    words = [sys.executable, "-c", "from cz_jax.cli.main import program; program()", "train", str(config)]
    words += [f"run.compile_cache={cache}", "--out", str(out), *more]
    together = ["--coordinator", address, "--processes", str(processes), "--process"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*words, *together, str(i)], env=os.environ | QUICK, **quiet) for i in range(processes)]


def test_a_killed_and_a_preempted_process_change_nothing(tmp_path):
    config = small(
        run={"rounds": 8}, eval={"before_and_after": False}, checkpoint={"every": 3}, mesh={"data": 2, "fsdp": -1},
        proposer={"model": "none"},
    )  # fmt: skip
    path, whole, out, cache = (tmp_path / n for n in ("config.toml", "whole", "out", "cache"))
    path.write_text(to_toml(config))
    for p in launch(path, whole, cache):
        _, said = p.communicate(timeout=300)
        assert p.returncode == 0, said
    moments, resume = random.Random(5), []
    for sent, victims, target in ((signal.SIGKILL, [moments.randrange(2)], 2), (signal.SIGTERM, [1], 5)):
        run = launch(path, out, cache, *resume)
        wait_until(lambda: len(lines(out)) >= target or run[0].poll() is not None, 200)  # noqa: B023
        time.sleep(moments.random() * 0.3)
        for i in victims:
            run[i].send_signal(sent)
        begun, status = time.monotonic(), LOST if sent == signal.SIGKILL else 143
        for i, p in enumerate(run):
            _, said = p.communicate(timeout=60)
            last = said.splitlines()[-1]
            if sent == signal.SIGKILL and i in victims:
                continue
            assert p.returncode == status and "Traceback" not in said and "stack trace" not in said, said
            assert ("is gone: it was killed" if status == LOST else "preempted by SIGTERM; go on with") in last, said
        assert time.monotonic() - begun < 30
        resume = ["--resume"]
    saved = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == len(lines(out)) >= 5  # SIGTERM lost no round
    for p in launch(path, out, cache, *resume):
        _, said = p.communicate(timeout=300)
        assert p.returncode == 0, said
    assert timeless(out) == timeless(whole)
