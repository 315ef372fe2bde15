"""The training order: mixed by weight, shuffled anew each epoch, held-out tasks kept out, resumed exactly."""

import collections
import json
import threading

import pytest

from cz_jax.errors import TaskError
from cz_jax.nouns import Task
from cz_jax.tasks import held_out_keys, load_tasks
from cz_jax.tasks.stream import MixedStream


def tasks(prefix, count):
    return tuple(Task("file", f"{prefix} number {i}", (f"assert f({i}) == {i}",), "f", 1 + i % 5) for i in range(count))


A, B = tasks("a", 40), tasks("b", 90)
MANY = tasks("many", 400)
NONE = frozenset()


def stream(seed=0, weights=(1, 3), sources=(A, B), held_out=NONE, **more):
    return MixedStream(sources, weights, seed, held_out, **more)


def ids(many):
    return [task.id for task in many]


def test_an_epoch_holds_every_task_once_and_the_next_is_in_another_order():
    s = stream(sources=(A,), weights=())
    epochs = [ids(s.take(len(A))) for _ in range(5)]
    assert all(sorted(epoch) == sorted(ids(A)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(ids(A))}) == 6


def test_the_order_depends_on_the_seed_and_the_source():
    orders = {tuple(ids(stream(seed=seed, sources=(A,), weights=()).take(40))) for seed in (0, 1, 2, 2**63 - 1)}
    assert len(orders) == 4
    assert ids(stream(seed=7).take(50)) == ids(stream(seed=7).take(50))
    # A seed is not another seed one epoch later, as adding the epoch to the seed alone would make it.
    one = stream(seed=0, sources=(A,), weights=())
    one.take(40)
    assert ids(one.take(40)) not in [ids(stream(seed=seed, sources=(A,), weights=()).take(40)) for seed in (1, 2)]
    places = [[A.index(t) for t in stream(sources=(A, tasks("c", 40)), weights=()).take(80) if t in A]]
    places.append([int(t.question.split()[-1]) for t in stream(sources=(A, tasks("c", 40)), weights=()).take(80)
                   if t not in A])  # fmt: skip
    assert places[0] != places[1]


@pytest.mark.parametrize(
    "weights, share", [((1, 3), 0.25), ((2.0, 2.0), 0.5), ((), 0.5), ((0.9, 0.1), 0.9), ((1, 200), 1 / 201)]
)
def test_the_mix_follows_the_weights(weights, share):
    many, more = set(ids(MANY)), tasks("more", 500)
    s = stream(sources=(MANY, more), weights=weights)
    drawn = [task.id in many for _ in range(200) for task in s.take(10)]
    assert abs(sum(drawn) - 2000 * share) <= 5
    assert abs(sum(drawn[:200]) - 200 * share) <= 5, "even from the start"


def test_every_task_of_a_source_comes_equally_often():
    s = stream(weights=(1, 1))
    counts = collections.Counter(ids(t for _ in range(90) for t in s.take(8)))  # 360 of each: 9 epochs of A, 4 of B
    assert {counts[t.id] for t in A} <= {8, 9, 10} and {counts[t.id] for t in B} <= {3, 4, 5}
    assert sum(counts[t.id] for t in A) in range(355, 366)


@pytest.mark.parametrize("size", [1, 3, 7, 39, 40])
def test_no_task_twice_in_one_take_even_across_epochs(size):
    s = stream(sources=(A,), weights=())
    drawn = []
    for _ in range(400 // size):
        batch = ids(s.take(size))
        assert len(set(batch)) == size
        drawn += batch
    counts = collections.Counter(drawn)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_fewer_tasks_than_a_batch_repeat_evenly():
    few = tasks("few", 3)
    s = stream(sources=(few,), weights=())
    s.take(2)
    counts = collections.Counter(ids(s.take(10)))
    assert sum(counts.values()) == 10 and sorted(counts.values()) == [3, 3, 4]
    mixed = collections.Counter(ids(stream(sources=(few, A), weights=(1, 1)).take(20)))
    assert sum(mixed[t.id] for t in few) == 10 and all(mixed[t.id] <= 1 for t in A)
    assert ids(stream(sources=(few[:1],), weights=()).take(3)) == [few[0].id] * 3
    assert stream().take(0) == ()


def test_resume_is_exact_at_every_position():
    """Takes of 7 over 36 and 30 tasks: epochs end within takes, so that some tasks wait for the next."""
    sources = (A[:36], B[:30])
    whole = stream(sources=sources)
    expected, states = [], []
    for _ in range(51):
        states.append(json.loads(json.dumps(whole.state())))
        expected.append(ids(whole.take(7)))
    assert any(state["deferred"] for state in states), "the test must pass through such a state"
    used = stream(sources=sources)
    used.take(5)
    for at in range(50):
        fresh = stream(sources=sources) if at % 2 else used
        fresh.restore(states[at])
        assert fresh.state() == states[at]
        assert [ids(fresh.take(7)) for _ in range(2)] == expected[at : at + 2], at
        if at == 25:
            assert [ids(fresh.take(7)) for _ in range(49 - at)] == expected[at + 2 :]


def test_reading_the_state_changes_nothing():
    a, b = stream(), stream()
    for _ in range(20):
        a.state()
        assert ids(a.take(3)) == ids(b.take(3))


@pytest.mark.parametrize(
    "other",
    [
        stream(sources=(A[1:], B)),
        stream(sources=(B, A)),
        stream(sources=(A, B), held_out=frozenset([B[5].id])),
        stream(weights=(1, 2)),
        stream(seed=1),
    ],
    ids=["a task less", "sources swapped", "one held out", "weights", "seed"],
)
def test_a_state_of_another_stream_is_refused(other):
    s = stream()
    s.take(11)
    before = s.state()
    other.take(3)
    with pytest.raises(TaskError, match="other tasks"):
        s.restore(other.state())
    assert s.state() == before


@pytest.mark.parametrize(
    "change",
    [
        *({"position": position} for position in (-1, 1.5, "3", True, 2**63)),
        *({"deferred": deferred} for deferred in (None, [[0, 40]], [[2, 0]], [[0]], [3], [[0, -1]])),
        {"more": 1},
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(change):
    s = stream()
    s.take(5)
    before = s.state()
    with pytest.raises(TaskError):
        s.restore(before | change)
    with pytest.raises(TaskError):
        s.restore([before])
    assert s.state() == before


def test_held_out_tasks_never_come():
    held = frozenset(t.id for t in A[:10] + B[80:])
    s = stream(held_out=held)
    assert s.excluded == 20 and s.size == 110
    assert held.isdisjoint(ids(s.take(400)))


def test_a_held_out_question_does_not_slip_in_with_other_tests():
    secret = A[3]
    twin = Task("mbpp", "  A  NUMBER\n3 ", ("assert g(1) == 1",), "g", 2)
    for held_out, sources in ((held_out_keys([secret]), (A, (twin, *B))), ({secret.id}, (A, (twin, *B)))):
        s = stream(sources=sources, held_out=frozenset(held_out))
        assert s.excluded == 2 and s.size == 129
        assert {secret.id, twin.id}.isdisjoint(ids(s.take(300)))


def test_held_out_builtin_tasks_stay_out_of_all():
    held = load_tasks("builtin@held_out").tasks
    s = MixedStream((load_tasks("builtin@all").tasks,), (), 0, held_out_keys(held))
    assert s.excluded == len(held) and s.size == len(load_tasks("builtin@train").tasks)
    assert set(ids(s.take(s.size))) == set(ids(load_tasks("builtin@train").tasks))


def test_tasks_of_an_earlier_source_and_with_long_prompts_are_left_out():
    s = stream(sources=(A, A[:5] + B), max_prompt=lambda task: not task.question.endswith("0"))
    assert (s.duplicates, s.too_long, s.excluded) == (5 - 1, 4 + 1 + 9, 0)
    assert s.size == 36 + 81
    assert not any(task.question.endswith("0") for task in s.take(300))


@pytest.mark.parametrize(
    "more, words",
    [
        ({"sources": (), "weights": ()}, "no task source"),
        ({"sources": ((),), "weights": ()}, "of the 0 tasks of task source 1"),
        ({"held_out": frozenset(ids(A + B))}, "task source 1: 40 are held out"),
        ({"sources": (A, A[:4])}, "task source 2: 0 are held out, 4 are in an earlier source"),
        ({"max_prompt": lambda task: False}, "40 have too long a prompt"),
        ({"weights": (1,)}, "1 weights for 2"),
        ({"weights": (1, 0)}, "not positive"),
        ({"weights": (1, float("nan"))}, "not positive"),
        ({"weights": (1, float("inf"))}, "not positive"),
        ({"weights": (1, 1e7)}, "within a factor"),
    ],
)
def test_streams_that_cannot_be(more, words):
    with pytest.raises(TaskError, match=words) as e:
        stream(**more)
    assert "\n" not in str(e.value)


def test_no_thread_is_left_behind():
    before = set(threading.enumerate())
    stream().take(50)
    assert set(threading.enumerate()) == before


def test_real_data_sets_mix(shared):
    mbpp = load_tasks(f"mbpp:{shared / 'data/mbpp'}").tasks
    contests = load_tasks(f"code_contests:{shared / 'data/code_contests'}").tasks
    held = load_tasks(f"mbpp:{shared / 'data/mbpp'}@validation").tasks
    s = MixedStream((mbpp, contests), (3, 1), 0, held_out_keys(held))
    assert s.excluded == 0 and s.size == 374 + 114
    drawn = s.take(400)
    assert len(set(ids(drawn))) == 400 and sum(t.is_program for t in drawn) in range(98, 103)
    later = MixedStream((mbpp, contests), (3, 1), 0, held_out_keys(held))
    later.restore(s.state())
    assert ids(later.take(20)) == ids(s.take(20))
