"""The scripts that measure and torture a relay: small runs of them, and that they see what is wrong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import relay_load  # noqa: E402
import relay_torture  # noqa: E402
import three_hosts  # noqa: E402


def told_by(script, *words):
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *words], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout, run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def test_load():
    told = told_by("relay_load.py", "publish", "--publishers", "2", "--calls", "4", "--batch", "8")
    assert told["groups_per_second"] > 0 and 0 < told["publish_p50"] <= told["publish_p99"] and told["failed"] == {}


def test_readers():
    told = told_by("relay_load.py", "readers", "--idle", "20", "--active", "3", "--seconds", "4", "--publishers", "1")
    assert told["readers_with_all"] == 3 and told["groups"] >= 32 and told["resident_mib"] < 512


def test_one_peer_beyond_its_quota():
    told = told_by("relay_load.py", "quota", "--publishers", "1", "--seconds", "3", "--peer-rate", "50")
    assert told["greedy"].keys() == {"RESOURCE_EXHAUSTED"}
    assert told["greedy_taken_per_second"] < told["greedy_asked_per_second"] / 1.5


@pytest.mark.parametrize("store", ["folder", "redis"])
def test_kills(store, request):
    more = [request.getfixturevalue("redis_program") and "--redis"] if store == "redis" else []
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "relay_torture.py"), "--kills", "2", "--publishers", "2", "--seconds", "0.3",
         "--batch", "4", "--bytes", "100", *more], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
    )  # fmt: skip
    told = json.loads(run.stdout.splitlines()[-1])  # the status also tells of slow starts, which a busy machine has
    assert (told["store"], told["lost"], told["doubled"]) == (store, 0, 0) and told["acknowledged"] > 0, run.stderr


def test_what_was_lost_or_moved_is_counted():
    lines = [[0.1, [["a", 1], ["b", 2]]], [0.3, [["c", 3]]]]
    told = relay_torture.judge(lines, {"a": 1, "b": 4}, [0.5, 2.5, 0.1], 2.0)
    assert (told["acknowledged"], told["stored"], told["lost"], told["starts_over_2_s"]) == (3, 2, 2, 1)


def test_figures():
    assert relay_load.quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and relay_load.quantile([1.0], 0.99) == 1.0
    assert abs(relay_load.slope([(0.0, 10.0), (1.0, 12.0), (2.0, 14.0)]) - 2.0) < 1e-9
    calls = [[(0.0, 1.0, ""), (1.0, 4.0, "UNAVAILABLE")], [(0.0, 2.0, "UNAVAILABLE")]]
    assert relay_load.taken(calls[0]) == [1.0] and relay_load.statuses(calls) == {"UNAVAILABLE": 2}


def turn(number, came=(), kept=0, down=False):
    return {
        "turn": number,
        "at": float(number),
        "took": 0.1,
        "down": down,
        "came": list(came),
        "kept": kept,
        "said": [],
    }


def test_a_group_that_never_arrived_is_counted():
    cut_off = [turn(1), turn(2), turn(3, kept=1, down=True), turn(4, kept=2, down=True), turn(5, [4, 5]), turn(6, [6])]
    cut_off += [turn(n, [n]) for n in range(7, 11)]
    calm = [turn(n, [n]) for n in (1, 2, 4, 5, 6, 7, 8, 9, 10)]
    told = three_hosts.judge({"left": calm, "right": cut_off}, 2.5, 4.5)
    assert told["groups_lost"] == 1 and told["seconds_until_healed"] == 0.5 and told["came_while_cut_off"] == 0
    calm.append(turn(11, [3]))
    assert three_hosts.judge({"left": calm, "right": cut_off}, 2.5, 4.5)["groups_lost"] == 0
