"""The timeline of a recorded round: what the profiler saw, how it is added up, how the report draws it."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cz_jax.config import Config, to_toml
from cz_jax.report import write_report
from cz_jax.timeline import BINS, FOLDER, TIMELINE, Recorder, _busy_until


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12),
    st.lists(st.integers(-5, 90), min_size=1, max_size=8),
)
def test_busy_time_is_that_of_the_union(spans, times):
    until = _busy_until([(start, start + length) for start, length in spans])
    for t in times:
        units = {u for start, length in spans for u in range(start, start + length) if u < t}
        assert until(t) == pytest.approx(len(units))


# One call takes about a tenth of a second, so that what other processes take between two calls does not count.
WORK = jax.jit(lambda a: jax.lax.fori_loop(0, 250, lambda _, b: jnp.tanh(b @ b), a))


def busy_for(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        WORK(jnp.eye(400)).block_until_ready()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(folder, timeline, events) of a round that idles while it proposes and computes while it updates; the rounds
    before and after it compute in every phase."""
    busy_for(0.01)
    out, events = tmp_path_factory.mktemp("recorded"), []
    with Recorder(lambda event, **fields: events.append((event, fields)), out, 2) as say:
        for number in (7, 8, 9):
            say("phase", name="propose")
            time.sleep(0.4) if number == 8 else busy_for(0.1)
            say("phase", name="update")
            busy_for(0.4)
            say("round", number=number, of=9, metrics={})
    return out, json.loads((out / FOLDER / TIMELINE).read_text()), events


def test_a_round_that_idles_and_computes_is_seen_to_do_so(recorded):
    _, timeline, _ = recorded
    propose, update = timeline["phases"]
    assert (timeline["round"], propose["name"], update["name"]) == (8, "propose", "update")
    assert 0.79 < timeline["seconds"] < 5 and propose["end"] == pytest.approx(update["begin"], abs=0.05)
    assert propose["busy"] < 0.05 and update["busy"] > 0.6, timeline["phases"]
    (device,) = timeline["devices"]
    assert device["name"] == "CPU" and len(device["bins"]) == BINS
    assert np.mean(device["bins"]) == pytest.approx(device["busy"], abs=0.01)
    assert np.mean(device["bins"][: BINS // 4]) < 0.05 < 0.5 < np.mean(device["bins"][-BINS // 4 :])


def test_every_event_is_handed_on_and_the_result_is_told(recorded):
    out, _, events = recorded
    played = [(event, fields.get("name") or fields.get("number")) for event, fields in events if event != "note"]
    assert played == [e for n in (7, 8, 9) for e in (("phase", "propose"), ("phase", "update"), ("round", n))]
    (note,) = [fields["text"] for event, fields in events if event == "note"]
    assert note.startswith("round 8: busy for CPU ") and str(out / FOLDER) in note


def test_a_run_that_is_too_short_says_so_and_an_error_does_not(tmp_path):
    events = []
    with Recorder(lambda event, **fields: events.append(fields.get("text")), tmp_path, 3) as say:
        say("round", number=1, of=1, metrics={})
    assert events == [None, "no timeline: 1 rounds were played, not 3"]
    with pytest.raises(KeyboardInterrupt), Recorder(lambda event, **fields: events.append(fields), tmp_path, 1) as say:
        say("phase", name="propose")
        raise KeyboardInterrupt
    with Recorder(lambda *_, **__: None, tmp_path, 1) as say:  # the recording that was under way has ended
        say("phase", name="propose")
        busy_for(0.01)
        say("round", number=1, of=1, metrics={})
    assert json.loads((tmp_path / FOLDER / TIMELINE).read_text())["round"] == 1


def test_the_report_draws_it(recorded):
    out, timeline, _ = recorded
    (out / "config.toml").write_text(to_toml(Config()))
    (out / "metrics.jsonl").write_text(json.dumps({"round": 8, "seconds": timeline["seconds"]}) + "\n")
    page = write_report(out).read_text()
    assert "One round on the devices" in page and "update: " in page and ">CPU</text>" in page
    for damaged in (
        {"phases": 3},
        {"devices": [{"bins": ["x", None, 1e400]}]},
        {"seconds": 0},
        {"phases": [{"begin": -1}]},
    ):
        (out / FOLDER / TIMELINE).write_text(json.dumps(timeline | damaged))
        write_report(out)
