"""The round itself, on ports made of plain values: who is asked for what, what is left out, what stops a run."""

import pytest

from cz_jax.config import from_dict
from cz_jax.difficulty import LevelState
from cz_jax.errors import RunStopped
from cz_jax.evaluate import evaluate
from cz_jax.loop import Node, Position, play_round, run
from cz_jax.nouns import Group, Outcome, Rollout, Task, Verdict, from_json, to_json
from cz_jax.ports import Proposals
from cz_jax.swarm.alone import Alone

RIGHT = "```python\ndef f(x):\n    return x + 1\n```"
CORRECT, WRONG = Verdict(Outcome.CORRECT, 0.9), Verdict(Outcome.WRONG, 0.1)
FAILED, UNREADABLE = Verdict(Outcome.FAILED, None, "it broke"), Verdict(Outcome.UNREADABLE)


def task(name, level=2, source="builtin"):
    return Task(source, f"Write f for {name}", (f"assert f(1) == {len(name)}",), "f", level)


class Tasks:
    def __init__(self):
        self.given = 0

    def take(self, count):
        self.given += count
        return tuple(task(f"data {self.given - i}") for i in range(count))


class Proposer:
    def __init__(self, *tasks):
        self.tasks, self.asked = tasks, []

    def propose(self, level, count, number):
        self.asked.append((int(level), count, number))
        return Proposals(self.tasks[:count], count, {"not_json": count - len(self.tasks[:count])})


class Solver:
    """Answers rightly, with four tokens, as often as there are rollouts."""

    def __init__(self, size=4, text=RIGHT):
        self.size, self.text = size, text

    def roll_out(self, tasks, number, purpose="roll out", group_size=None):
        rows = [Rollout(self.text, True, i, (1, 2, 3, 4), (-1.0,) * 4) for i in range(group_size or self.size)]
        return tuple(Group(t, "me", "policy", number, tuple(rows)) for t in tasks)


class Evaluator:
    """Gives each group the verdicts of its turn."""

    def __init__(self, *rows):
        self.rows = rows

    def judge(self, groups, number):
        return tuple(tuple(self.rows[i % len(self.rows)][: len(g.rollouts)]) for i, g in enumerate(groups))


class Learner:
    def __init__(self):
        self.updates = []

    def update(self, groups, rewards, own):
        self.updates.append((list(groups), [list(r) for r in rewards], list(own)))
        return {"loss": 0.5}

    def policy_digest(self):
        return f"policy {len(self.updates)}"


def node(evaluator, proposer=None, fits=lambda t: True, **settings):
    config = from_dict({"run": {"rounds": 3}, "round": {"group_size": 4}} | settings)
    return Node(config, proposer, Tasks(), fits, Solver(), evaluator, Alone(), Learner())


def quiet(event, **fields):
    pass


HALF = (CORRECT, WRONG, CORRECT, WRONG)
START = Position(0, LevelState(2))


def test_a_round_is_a_value_that_survives_json():
    proposed = task("proposed", 2, "proposer")
    n = node(Evaluator(HALF), Proposer(proposed))
    round_, after = play_round(n, START, quiet)
    assert [g.task for g in round_.own] == [proposed, task("data 1")]
    assert (round_.policy_before, round_.policy_after) == ("policy 0", "policy 1")
    assert after.number == 1 and len(after.level.outcomes) == 8
    assert n.proposer.asked == [(2, 1, 1)]
    assert round_.metrics["success"] == 0.5 and round_.metrics["loss"] == 0.5
    assert round_.metrics["success_by_source"] == {"builtin": 0.5, "proposer": 0.5}
    assert round_.metrics["reward"] == pytest.approx(
        sum(round_.metrics[f"reward_{p}"] for p in ("structure", "format", "correctness"))
    )
    assert round_.metrics["completion_tokens"] == 32
    assert set(round_.metrics["seconds_by_phase"]) == {"propose", "roll_out", "share", "judge", "update"}
    assert from_json(type(round_), to_json(round_)) == round_


def test_data_sets_stand_in_for_proposals_that_did_not_come_or_do_not_fit():
    n = node(Evaluator(HALF), Proposer(), round={"proposed_tasks": 2, "dataset_tasks": 1, "group_size": 4})
    assert len(play_round(n, START, quiet)[0].own) == 3 and n.tasks.given == 3
    long = task("too long", 2, "proposer")
    n = node(Evaluator(HALF), Proposer(long), fits=lambda t: t is not long)
    round_, _ = play_round(n, START, quiet)
    assert [g.task.source for g in round_.own] == ["builtin", "builtin"]


def test_a_failed_verdict_leaves_its_group_out_and_is_never_a_number():
    rows = [(FAILED, CORRECT, CORRECT, WRONG)] + [HALF] * 19
    n = node(Evaluator(*rows), round={"dataset_tasks": 20, "group_size": 4})
    round_, after = play_round(n, START, quiet)
    assert round_.rewards[0] is None and round_.metrics["groups_failed"] == 1
    assert len(n.learner.updates[0][0]) == 19 and round_.own[0] not in n.learner.updates[0][0]
    assert round_.own[0].id not in round_.trained
    assert len(after.level.outcomes) == 48  # the window; none of the failed group
    assert round_.metrics["verdicts"] == {"correct": 40, "failed": 1, "wrong": 39}


def test_too_many_failures_stop_the_run_before_the_update():
    n = node(Evaluator((FAILED, CORRECT, CORRECT, WRONG)))
    with pytest.raises(RunStopped, match="25% of the round's verdicts failed.*it broke"):
        play_round(n, START, quiet)
    assert not n.learner.updates


def test_unreadable_verdicts_earn_nothing_and_say_nothing_about_the_level():
    n = node(Evaluator((UNREADABLE, UNREADABLE, CORRECT, WRONG)))
    round_, after = play_round(n, START, quiet)
    assert [r.parts["correctness"] for r in round_.rewards[0]] == [0, 0, 1, 0]
    assert after.level.outcomes == (1.0, 0.0)


def test_only_tasks_of_the_present_level_move_it():
    n = node(Evaluator(HALF), Proposer(task("hard", 5, "proposer")))
    _, after = play_round(n, START, quiet)
    assert len(after.level.outcomes) == 4


@pytest.mark.parametrize("verdict, level", [(CORRECT, 5), (WRONG, 1)])
def test_the_level_reaches_its_end_and_tasks_follow_it(verdict, level):
    class Follows(Proposer):
        def propose(self, level, count, number):
            return Proposals((task(f"{number}", int(level), "proposer"),), count, {})

    n = node(Evaluator((verdict,) * 6), Follows(), round={"dataset_tasks": 0, "proposed_tasks": 1, "group_size": 6},
             run={"rounds": 60})  # fmt: skip
    n = Node(n.config, n.proposer, n.tasks, n.fits, Solver(6), n.evaluator, n.exchange, n.learner)
    played = []
    end = run(n, START, lambda r, p: played.append(r), quiet)
    assert end.level.level == level and len(played) == 60
    moves = [r.level_after - r.level_before for r in played]
    assert set(moves) <= {-1, 0, 1}


def test_groups_of_equal_reward_are_not_called_trained():
    n = node(Evaluator((CORRECT,) * 4, HALF), round={"dataset_tasks": 2, "group_size": 4})
    round_, _ = play_round(n, START, quiet)
    assert round_.trained == (round_.own[1].id,)


def test_run_keeps_each_round_before_the_next_begins():
    n, seen = node(Evaluator(HALF)), []
    run(
        n,
        Position(1, LevelState(2)),
        lambda r, p: seen.append(("kept", r.number)),
        lambda e, **f: seen.append((e, f.get("number"))),
    )
    assert [s for s in seen if s[0] in ("kept", "round")] == [("kept", 2), ("round", 2), ("kept", 3), ("round", 3)]


def test_evaluation_counts_by_level_and_source_and_leaves_failures_out():
    tasks = [task("a", 1), task("bb", 3), task("ccc", 3, "mbpp")]
    evaluator = Evaluator((CORRECT, WRONG), (CORRECT, CORRECT), (FAILED, CORRECT))
    got = evaluate(Solver(), evaluator, tasks, 2, 0.5, quiet)
    assert got["n_tasks"] == 2 and got["left_out"] == 1
    assert got["average_at_k"]["value"] == 0.75 and got["pass_at_k"]["value"] == 1.0
    assert got["by_level"]["1"]["average_at_k"]["value"] == 0.5 and set(got["by_source"]) == {"builtin"}
    with pytest.raises(RunStopped):
        evaluate(Solver(), evaluator, tasks, 2, 0.05, quiet)
