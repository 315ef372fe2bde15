"""The demo: processes that are watched, stopped and reaped, and one whole swarm with Ctrl-C in between."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_run import wait_until

from cz_jax import local_swarm
from cz_jax.errors import ConfigError, RunStopped, UserError
from cz_jax.local_swarm import Household, Seat, node_config

# ---- children of the tests; a child process imports them by name


def tells(event: str, **fields) -> None:
    print(json.dumps({"event": event} | fields), file=sys.stderr, flush=True)


def plays(rounds: int, folder: pathlib.Path) -> None:
    print("a library's warning", file=sys.stderr)
    for number in range(1, rounds + 1):
        tells("round", number=number, of=rounds, metrics={"reward": 0.1})


def plays_slowly(rounds: int, folder: pathlib.Path) -> None:
    for number in range(1, rounds + 1):
        tells("round", number=number, of=rounds, metrics={"reward": 0.1})
        time.sleep(1.0)


def fails(folder: pathlib.Path) -> None:
    tells("phase", name="loading")
    raise UserError("the relay's port is taken", "another relay?")


def breaks(folder: pathlib.Path) -> None:
    raise ZeroDivisionError("a defect")


def waits(folder: pathlib.Path) -> None:
    tells("serving", address="here")
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise


def deaf(folder: pathlib.Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tells("serving", address="here")
    time.sleep(60)


# ---- the household


def test_events_are_passed_on_with_their_source(tmp_path):
    said = []
    with Household(tmp_path, lambda event, **fields: said.append((event, fields))) as household:
        seats = [household.start(f"node-{i}", plays, i, tmp_path) for i in (1, 2)]
        household.watch(seats, needed=[])
    rounds = [(fields["source"], fields["number"]) for event, fields in said if event == "round"]
    assert sorted(rounds) == [("node-1", 1), ("node-2", 1), ("node-2", 2)]
    assert "a library's warning" in (tmp_path / "logs" / "node-1.log").read_text()


def test_watching_ends_with_an_event(tmp_path):
    heard = []
    with Household(tmp_path, lambda event, **fields: heard.append((event, fields.get("number")))) as household:
        seat = household.start("node-1", plays_slowly, 3, tmp_path)
        household.watch([seat], needed=[], until=("round",))
        assert ("round", 1) in heard and ("round", 3) not in heard and seat.process.is_alive()
        household.watch([seat], needed=[])
    assert [number for event, number in heard if event == "round"] == [1, 2, 3]


@pytest.mark.parametrize("work, words", [(fails, "the relay's port is taken"), (breaks, "ZeroDivisionError: a defect")])
def test_a_process_that_ends_is_named_with_its_last_words(work, words, tmp_path):
    with pytest.raises(RunStopped, match=f"node-1 ended: .*{words}.* see .*node-1.log"):
        with Household(tmp_path, local_swarm.quiet) as household:
            needed = household.start("relay", waits, tmp_path)
            household.wait_for(needed, "serving", 30)
            household.watch([household.start("node-1", work, tmp_path)], needed=[needed])
    assert not needed.process.is_alive()


def test_a_needed_process_that_ends_stops_the_others(tmp_path):
    with pytest.raises(RunStopped, match="relay ended"):
        with Household(tmp_path, local_swarm.quiet) as household:
            relay, node = household.start("relay", plays, 0, tmp_path), household.start("node-1", waits, tmp_path)
            household.wait_for(node, "serving", 30)
            household.watch([node], needed=[relay])
    assert not node.process.is_alive()


def test_an_interrupt_reaches_every_process_once_and_nobody_outstays(tmp_path, monkeypatch):
    monkeypatch.setattr(local_swarm, "LEAVE_SECONDS", 1.0)
    with pytest.raises(KeyboardInterrupt):
        with Household(tmp_path, local_swarm.quiet) as household:
            seats = [household.start("node-1", waits, tmp_path), household.start("node-2", deaf, tmp_path)]
            for seat in seats:
                household.wait_for(seat, "serving", 30)
            raise KeyboardInterrupt
    assert (tmp_path / "saved").exists()
    assert [s.process.exitcode for s in seats] == [130, -signal.SIGKILL]


def test_processes_leave_when_the_parent_is_killed(tmp_path):
    script = (
        "import pathlib, sys, time, test_local_swarm as t; from cz_jax.local_swarm import Household, quiet\n"
        "if __name__ == '__main__':\n"
        "    here = pathlib.Path(sys.argv[1])\n"
        "    h = Household(here, quiet).__enter__(); s = h.start('n', t.waits, here)\n"
        "    h.wait_for(s, 'serving', 30); print(s.process.pid, flush=True); time.sleep(60)\n"
    )
    path = tmp_path / "parent.py"
    path.write_text(script)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    }
    parent = subprocess.Popen([sys.executable, path, tmp_path], stdout=subprocess.PIPE, text=True, env=env)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while pathlib.Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "saved").exists() and not pathlib.Path(f"/proc/{child}").exists()


def test_a_log_is_read_in_pieces(tmp_path):
    log = tmp_path / "log"
    log.write_text('{"event": "old"}\n')
    seat = Seat("node-1", None, log, tmp_path)
    with log.open("a") as file:
        for text, events in (('{"event": "a"}\n{"ev', ["a"]), ('ent": "b"}\nplain\n[1]\n{"x": 1}\n', ["b"]), ("", [])):
            file.write(text)
            file.flush()
            assert [e["event"] for e in seat.news()] == events
    assert list(seat.last_lines) == ["plain", "[1]", '{"x": 1}']


# ---- what is played


def test_what_a_folder_holds_decides(tmp_path):
    out = tmp_path / "demo"
    setup = local_swarm._set_up(out, 5, None, None)
    assert setup == {"rounds": 5, "nodes": local_swarm.NODES, "seed": 0}
    assert local_swarm._set_up(out, None, None, None) == local_swarm._set_up(out, 5, None, 0) == setup
    with pytest.raises(ConfigError, match="holds a demo with --rounds 5"):
        local_swarm._set_up(out, 6, None, None)
    (out / "summary.json").touch()
    with pytest.raises(ConfigError, match="finished demo.*--out .*demo-2"):
        local_swarm._set_up(out, None, None, None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for taken in (tmp_path / "other", tmp_path / "other" / "file"):
        with pytest.raises(ConfigError, match="is not empty"):
            local_swarm._set_up(taken, None, None, None)


def test_nodes_differ_in_their_seed_and_the_proposer_alone_proposes():
    setup = {"rounds": 7, "nodes": 2, "seed": 3}
    configs = [node_config(setup, place, "127.0.0.1:7443") for place in range(3)]
    assert [c.run.seed for c in configs] == [3000, 3001, 3002] and {c.run.rounds for c in configs} == {7}
    assert [c.proposer.model for c in configs] == ["tiny", "none", "none"]
    assert {(c.swarm.relay, c.evaluator.model) for c in configs} == {
        ("127.0.0.1:7443", local_swarm.DEMO["evaluator"]["model"])
    }


# ---- the whole of it


def timed_lines(process) -> list[tuple[float, str]]:
    """A list that a thread fills with (time, line) as `process` writes to its standard error."""
    lines = []
    threading.Thread(target=lambda: lines.extend((time.monotonic(), l) for l in process.stderr), daemon=True).start()
    return lines


def wait_for(lines, words: str, seconds: float) -> float:
    """The time of the first line that holds `words`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for at, line in list(lines):
            if words in line:
                return at
        time.sleep(0.05)
    raise AssertionError(f"no {words!r} within {seconds} s:\n" + "".join(line for _, line in lines))


def test_a_demo_ends_its_processes_on_sigterm(tmp_path):
    words = [pathlib.Path(sys.executable).with_name("cz-jax"), "demo", "--out", tmp_path / "demo", "--rounds", "3"]
    run = subprocess.Popen(
        words, env=os.environ | {"TERM": "dumb"}, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True
    )
    try:
        lines = timed_lines(run)
        wait_for(lines, "ssh -L", 60)
        assert alive(tmp_path)
        run.send_signal(signal.SIGTERM)
        wait_for(lines, f"preempted by SIGTERM; go on with: cz-jax demo --out {tmp_path / 'demo'}", 30)
        assert run.wait(timeout=30) == 143
    finally:
        run.kill()
    wait_until(lambda: not alive(tmp_path), 20)


def alive(folder) -> list[str]:
    """The processes that hold a file in `folder` open, as each of a demo's holds its log."""
    found = []
    for at in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            names = [os.readlink(f) for f in (at / "fd").iterdir()]
        except OSError:
            continue
        found += [at.name] if any(str(folder) in name for name in names) else []
    return found


def test_a_demo_that_is_interrupted_goes_on_and_ends_with_everything(tmp_path):
    """On a dumb terminal, with standard input closed, without an account, and with every way to the network a dead
    end; the first minute as DESIGN wants it."""
    out, home = tmp_path / "demo", tmp_path / "home"
    home.mkdir()
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | dead | {"TERM": "dumb", "HOME": str(home), "no_proxy": "127.0.0.1,localhost"}
    del environment["XLA_FLAGS"]  # the eight devices of tests/conftest.py: a user's machine has one
    words = [pathlib.Path(sys.executable).with_name("cz-jax"), "demo", "--out", out]
    begun = time.monotonic()
    first = subprocess.Popen(
        [*words, "--rounds", "3"], env=environment, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True
    )
    lines = timed_lines(first)
    try:
        assert wait_for(lines, "starting the relay", 30) - begun < 2
        assert wait_for(lines, "before (60 held-out tasks)", 120) - begun < 60  # the first point of a curve
        wait_for(lines, "ssh -L", 1)
        wait_for(lines, "round 1/3", 120)
        asked = time.monotonic()
        first.send_signal(signal.SIGINT)
        assert wait_for(lines, f"interrupted; go on with: cz-jax demo --out {out}", 30) - asked < 5
        told = first.stdout.read()
        assert (first.wait(timeout=30), told) == (130, "")
    finally:
        first.kill()
    times = [begun, *(at for at, _ in lines)]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) < 6  # a silence over 5 s is broken by a line
    assert not any("Traceback" in line or "\x1b" in line for _, line in lines)

    again = subprocess.run(
        [*words, "--json"], env=environment, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL
    )
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert (summary["rounds"], summary["nodes"], summary["seed"]) == (3, 2, 0)
    for key in ("avg_at_k_before", "avg_at_k_after", "pass_at_k_before", "pass_at_k_after"):
        assert summary[key]["low"] <= summary[key]["value"] <= summary[key]["high"] and summary[key]["k"] == 8
    gain = summary["reward_gain"]
    assert gain["low"] <= gain["value"] == pytest.approx(summary["reward_mean_last10"] - summary["reward_mean_first10"])
    assert summary["groups_shared"] >= 12 and set(summary["by_node"]) == {"node-1", "node-2"}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "report.html").read_bytes() == (out / summary["better_node"] / "report.html").read_bytes()
    assert {"model.safetensors", "README.md"} <= {p.name for p in pathlib.Path(summary["export_dir"]).iterdir()}
    assert len(summary["next"]) == 3 and all(line.startswith("cz-jax ") for line in summary["next"])
    for node in summary["by_node"]:
        lines = (out / node / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]
