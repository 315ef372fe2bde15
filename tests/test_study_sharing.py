"""The study of sharing: its settings, its rounds over a real relay without a model, and what it makes of results."""

import json
import pathlib
import sys
from types import SimpleNamespace

import pytest

from cz_jax.errors import ConfigError, RunStopped
from cz_jax.loop import Node
from cz_jax.nouns import Group, Outcome, Rollout, Task, Verdict
from cz_jax.swarm.client import SwarmExchange
from cz_jax.swarm.identity import new_identity
from cz_jax.swarm.link import Link, LinkOptions
from cz_jax.swarm.relay import RelayOptions, RelayThread

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))

import study_sharing as study

ANSWER = "```python\ndef f(x):\n    return x + 1\n```"


def quiet(event, **fields):
    pass


class Plain:
    """The ports of a node but for its exchange: half of its answers are right, and each group is another one."""

    def __init__(self, name):
        self.name, self.given, self.updates = name, 0, []

    def take(self, count):
        self.given += count
        numbers = range(self.given - count, self.given)
        return tuple(Task("builtin", f"Write f {i} for {self.name}", ("assert f(1) == 2",), "f", 2) for i in numbers)

    def roll_out(self, tasks, number, purpose="roll out", group_size=8):
        rows = [Rollout(f"{ANSWER}\n{i}", True, i, (1, 2), (-1.0, -1.0)) for i in range(group_size)]
        return tuple(Group(t, self.name, "ab" * 32, number, tuple(rows)) for t in tasks)

    def judge(self, groups, number):
        right, wrong = Verdict(Outcome.CORRECT, 0.9), Verdict(Outcome.WRONG, 0.1)
        return tuple(tuple((right, wrong)[i % 2] for i in range(len(g.rollouts))) for g in groups)

    def update(self, groups, rewards, own):
        self.updates.append(list(own))
        return {"groups_trained": len(groups)}

    def policy_digest(self):
        return "ab" * 32


def built(setting, place, address):
    config = study.node_config(setting, 0, place, 3, address)
    link = Link(LinkOptions(address, config.swarm.run), new_identity())
    exchange = SwarmExchange(link, config.swarm, config.round.group_size, config.run.seed, lambda t: t, quiet)
    p = Plain(link.peer)
    node = Node(config, None, p, lambda t: True, p, p, exchange, p)
    return SimpleNamespace(node=node, solver=p, evaluator=p, learner=p, link=link, held_out=p.take(2))


def test_settings_train_on_equally_many_groups():
    for setting in study.SAPO:
        for seed in study.SEEDS:
            configs = [study.node_config(setting, seed, place, 5, "127.0.0.1:1") for place in range(1, study.NODES + 1)]
            rounds = [c.round for c in configs]
            assert {r.dataset_tasks + r.external_groups for r in rounds} == {study.GROUPS}
            assert {f"{r.dataset_tasks}/{r.external_groups}" for r in rounds} == {setting}
            assert not any(r.proposed_tasks for r in rounds) and {r.group_size for r in rounds} == {8}
            assert {c.swarm.per_peer for c in configs} == {study.GROUPS}
            # nodes share one compiled step, which only float32 allows
            assert {(c.solver.param_dtype, c.optimizer.moments_dtype) for c in configs} == {("float32", "float32")}
            assert {c.optimizer.schedule for c in configs} == {"constant"}
    seeds = {study.node_config("8/0", s, place, 5).run.seed for s in study.SEEDS for place in range(1, 5)}
    assert len(seeds) == 12 and study.node_config("2/6", 1, 2, 5).run.seed in seeds


def test_rounds_over_a_relay(tmp_path):
    with RelayThread(RelayOptions("127.0.0.1:0", tmp_path / "relay")) as relay:
        nodes, told = [built("2/6", place, relay.address) for place in range(1, 5)], []
        try:
            results = study._play_nodes(nodes, 3, lambda number, reward: told.append(number))
        finally:
            for b in nodes:
                b.link.close(0)
    external = [[own.count(False) for own in b.learner.updates] for b in nodes]
    assert external == [[0, 6, 6], [2, 6, 6], [4, 6, 6], [6, 6, 6]]  # every group of a peer is seen in the next turn
    assert all(own.count(True) == 2 for b in nodes for own in b.learner.updates)
    assert told == [1, 2, 3] and [r["external"] for r in results] == [sum(row) / 3 for row in external]
    assert all(len(r["rewards"]) == 3 and r["average_at_k_after"] == 0.5 for r in results)


def test_a_relay_that_is_gone_ends_the_run(tmp_path):
    with RelayThread(RelayOptions("127.0.0.1:0", tmp_path / "relay")) as relay:
        node = built("4/4", 1, relay.address)
    try:
        with pytest.raises(RunStopped, match="relay"):
            study._play_nodes([node], 2, lambda number, reward: None)
    finally:
        node.link.close(0)


def result(setting, seed, reward, rounds=4):
    node = {"trained": 7.0, "external": 3.5, "seconds_a_round": 1.0, "average_at_k_before": 0.3}
    rewards = [[reward + 0.01 * i] * rounds for i in range(study.NODES)]
    return {
        "setting": setting, "seed": seed, "rounds": rounds, "configs": study.configs_digest(setting, seed, rounds),
        "nodes": [node | {"rewards": r, "average_at_k_after": r[0]} for r in rewards], "seconds": 9.0,
    }  # fmt: skip


def put(out, *results):
    for r in results:
        study.result_path(out, r["setting"], r["seed"]).write_text(json.dumps(r))


def test_the_table(tmp_path):
    put(tmp_path, *(result("8/0", s, 0.5 + 0.1 * s) for s in (0, 1)), *(result("4/4", s, 1.0) for s in (0, 1)))
    text = study.study(tmp_path, 4, ["8/0", "4/4"], [0, 1])  # all are there: nothing is played
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    assert [line[0] for line in lines] == ["own/external", "---", "8/0", "4/4"] and len({len(x) for x in lines}) == 1
    assert lines[2][2].startswith("2.26 (") and lines[2][3:5] == ["1.000 (1.000 to 1.000)", "2.06 / 2.46"]
    assert (
        lines[3][2].startswith("4.06 (") and lines[3][3].startswith("1.796 (") and lines[3][-2:] == ["1093.3", "1.95"]
    )
    told = json.loads((tmp_path / "study.json").read_text())["settings"][1]
    assert told["ratio"]["low"] < told["ratio"]["value"] < told["ratio"]["high"] and told["seeds"] == [0, 1]
    assert (tmp_path / "study.md").read_text() == text


def test_a_ratio_is_of_the_same_seeds_and_needs_the_nodes_alone(tmp_path):
    rows = study.summarise([result("8/0", 0, 0.5), result("4/4", 0, 1.0), result("4/4", 1, 9.0)])
    assert abs(rows[1]["ratio"]["value"] - (4 * 1.015) / (4 * 0.515)) < 1e-9
    alone = study.summarise([result("2/6", 0, 0.5)])
    assert alone[0]["ratio"] is None and "| - |" in study.table(alone)


def test_pairs_narrow_a_ratio():
    base = [1.0, 2.0, 3.0, 4.0]
    paired = study.interval([2 * x for x in base], base)
    assert (paired["value"], paired["low"], paired["high"]) == (2.0, 2.0, 2.0)
    assert study.interval(base)["low"] < 2.5 < study.interval(base)["high"]


def test_runs_that_differ_are_not_mixed(tmp_path):
    put(tmp_path, result("8/0", 0, 0.5, rounds=4))
    with pytest.raises(ConfigError, match="4 rounds"):
        study.study(tmp_path, 5, ["8/0"], [0])
