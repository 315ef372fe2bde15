"""report.html and the optional trackers: self-contained, well-formed, honest, safe against what texts hold."""

import dataclasses
import gzip
import html.parser
import json
import math
import random
import re
import shutil
import sys
import threading
import time
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cz_jax import report
from cz_jax.build import verbs
from cz_jax.config import Config, from_dict, to_toml
from cz_jax.difficulty import LevelState
from cz_jax.errors import CheckpointError, ConfigError, RunStopped
from cz_jax.ledger import RunLedger
from cz_jax.loop import Position
from cz_jax.nouns import Group, Outcome, Reward, Rollout, Round, Task, Verdict, digest, from_json, to_json
from cz_jax.report import charts, learned, load_sinks, markup, page, samples, sinks, write_report
from cz_jax.report.read import read_run, spread

HOSTILE = [
    "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>",
    "\u202eevil\u2066 right to left\u2069 \u200b\u200b\u200bhidden \ufeff\x00\x1b[31m \ud800",
    '" onmouseover="alert(1)" x=\'&amp;<!-- ]]> -->',
    "javascript:alert(1) https://example.org/x.js //cdn.example.org",
    "x" * 200_000,
    "a\r\nb\rc\n\n\ttabbed",
]
ANSWER = (
    "```python\ndef add_{n}(values):\n    total = 0\n    for value in values:\n        total {op}= value\n"
    "    return total\n```"
)


# ---- a run folder to report on


def make_round(number, of, level, rng, texts=(), external=1, group_size=8):
    """A round of a solver that gets better with time."""
    skill = 0.3 + 0.45 * number / of
    groups, verdicts, rewards = [], [], []
    for i in range(2 + external):
        source = ("proposer", "mbpp", "proposer")[i % 3]
        question = texts[number % len(texts)] if texts and i == 0 else (
            f"Write a function `add_{number}` that returns the sum of a list of numbers, skipping those above {i}."
        )  # fmt: skip
        tests = tuple(f"assert add_{number}([{j}, {j + 1}]) == {2 * j + 1}" for j in range(3 + 5 * (i == 1)))
        task = Task(source, question, tests, f"add_{number}", min(5, max(1, level + i - 1)))
        rollouts, row, paid = [], [], []
        for j in range(group_size):
            chance = min(0.97, max(0.03, rng.gauss(skill, 0.25)))
            outcome = Outcome.UNREADABLE if rng.random() < 0.04 else (
                Outcome.CORRECT if chance > 0.5 else Outcome.WRONG
            )  # fmt: skip
            ended = rng.random() < skill + 0.2
            text = ANSWER.format(n=number, op="+" if outcome is Outcome.CORRECT else "-")
            text = texts[(number + j) % len(texts)] if texts and i == 0 else text
            rollouts.append(Rollout(text, ended, j, (1, 2, 3) * 20, (-0.5, -0.1, -0.01) * 20))
            row.append(Verdict(outcome, None if outcome is Outcome.UNREADABLE else chance))
            right = float(outcome is Outcome.CORRECT)
            parts = {"structure": 0.3 * (0.5 + right / 2), "format": 0.1 + 0.1 * ended, "correctness": right}
            paid.append(Reward(math.fsum(parts.values()), parts))
        peer = "solver" if i < 2 else rng.choice(["QmfB2Qi41qyQqMUeiw6GLmFbhJcf61poZEi39vTvj7Laye", "12D3KooWpeer"])
        groups.append(Group(task, peer, digest(["policy", number]), number, tuple(rollouts)))
        verdicts.append(tuple(row))
        rewards.append(tuple(paid))
    return Round(
        number, level, level, tuple(groups[:2]), tuple(groups[2:]), tuple(verdicts), tuple(rewards),
        tuple(g.id for g in groups), digest(["policy", number]), digest(["policy", number + 1]), Config().digest,
        measure(groups[:2], verdicts, rewards, number, level, external, rng),
    )  # fmt: skip


def measure(own, verdicts, rewards, number, level, external, rng):
    flat = [x for row in rewards[:2] for x in row]
    outcomes = [v.outcome for row in verdicts[:2] for v in row]
    seconds = {"propose": 3.1, "roll_out": 9 + rng.random(), "share": 0.05, "judge": 2.2, "update": 6 + rng.random()}
    seconds["update"] += 30.0 * (number == 1)
    success = [sum(v.outcome is Outcome.CORRECT for v in row) / len(row) for row in verdicts[:2]]
    refused = {"not_json": rng.randint(0, 2), "near_copy": rng.randint(0, 1)}
    return {
        "level": level, "groups_own": 2, "groups_external": external, "groups_failed": 0, "groups_trained": 3,
        "proposals": {"valid": 1, "tries": 1 + sum(refused.values()), "refused": refused},
        "verdicts": {o: outcomes.count(o) for o in sorted(set(outcomes))},
        "completion_tokens": 960, "tokens_per_second": 960 / seconds["roll_out"], "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds, "truncated": rng.random() * 0.3, "success": sum(success) / 2,
        "success_by_level": {str(g.task.level): s for g, s in zip(own, success, strict=True)},
        "success_by_source": {g.task.source: s for g, s in zip(own, success, strict=True)},
        "reward": sum(x.total for x in flat) / len(flat),
        **{f"reward_{p}": sum(x.parts[p] for x in flat) / len(flat) for p in ("structure", "format", "correctness")},
        "entropy": 1.1 - 0.004 * number + 0.1 * rng.random(), "policy_kl": 0.0, "gradient_norm": 1 + rng.expovariate(2),
        "loss": rng.gauss(0, 0.05), "learning_rate": 1e-5, "groups_dropped": 0.25 * rng.random(),
        "logprob_difference_mean": 4e-6 + 1e-6 * rng.random(), "logprob_difference_max": 7e-5,
    }  # fmt: skip


def estimate(value, half=0.08, k=8):
    return {"k": k, "value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def evaluation(value):
    by_level = {
        str(n): {"n_tasks": 8, "average_at_k": estimate(max(0.02, value + 0.3 - 0.12 * n), 0.14),
                 "pass_at_k": estimate(min(1.0, value + 0.2))} for n in range(1, 6)
    }  # fmt: skip
    return {
        "average_at_k": estimate(value), "pass_at_k": estimate(min(1.0, value + 0.25)), "n_tasks": 40,
        "by_level": by_level, "by_source": {}, "verdicts": {}, "left_out": 0,
    }  # fmt: skip


def make_run(folder, rounds=40, texts=(), seed=0, external=1, finished=True, after=0.55):
    rng, ledger, level = random.Random(seed), RunLedger(folder), 2
    for number in range(1, rounds + 1):
        level = min(5, 2 + 3 * number // max(rounds, 8))
        ledger.write(make_round(number, rounds, level, rng, texts, external))
    config = from_dict({"run": {"rounds": rounds}, "round": {"external_groups": external}})
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "evaluations.json").write_text(json.dumps({"before": evaluation(0.34), "after": evaluation(after)}))
    if finished:
        versions = {"cz-jax": "0.1.0", "jax": "0.10.2"}
        ledger.write_summary({"rounds": rounds, "policy_digest": "ab" * 32, "versions": versions})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def run(whole, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(whole, tmp_path / "first")


# ---- reading the page


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts; `faults` are tags that do not nest and attributes that stand twice."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.elements, self.texts, self.comments = [], [], [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"{tag} is left open" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        self.faults += [f"{tag} has {n} twice" for n in set(names) if names.count(n) > 1]
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        self.comments.append(data)

    @property
    def tags(self):
        return {tag for tag, _ in self.elements}

    def text(self):
        text = " ".join(data for tag, data in self.texts if tag != "style")
        return text.replace("\N{NON-BREAKING HYPHEN}", "-")


TAGS = set(
    "html head meta title style body header main footer nav section article h1 h2 h3 h4 p a b i small span code pre "
    "ul li dl dt dd div table thead tbody tr th td details summary svg g line path rect circle text".split()
)


def checked(folder):
    """The page of a run folder, after what must hold for every page."""
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text("utf-8")
    page = Page(text)
    assert not page.faults and not page.comments, page.faults[:5]
    assert page.tags <= TAGS, page.tags - TAGS
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "action", "data", "srcset", "xlink:href", "style", "http-equiv", "id"):
            value = attributes.get(name, "")
            assert re.fullmatch(r"#[a-z]+|[a-z]+|Content-Security-Policy|", value), (tag, name, value)
    styles = "".join(data for tag, data in page.texts if tag == "style")
    assert "url(" not in styles and "@import" not in styles and "://" not in styles
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in page.elements
    assert not re.search(r"\b(nan|inf|None|null)\b", " ".join(str(a) for _, a in page.elements))
    unprinted = {c for c in text if not c.isprintable() and c not in "\n\t"}
    assert not unprinted, unprinted
    return page


# ---- the whole page


def test_the_page_says_what_a_run_folder_holds(whole):
    page = checked(whole)
    text = page.text()
    for wanted in (
        *("Answers judged right on held-out tasks rose from 34% to 55%", "first and last 10 rounds", "finished"),
        *("Mean reward of an answer", "correctness", "Success by level", "Level path", "5 expert", "Verdicts"),
        *("unreadable", "Proposals", "near copy", "From peers", "judged right", "Time by phase", "Entropy"),
        *("Gradient norm", "Log-prob difference", "KL to the policy", "Best answer", "Worst answer", "average@8"),
        *("26% to 42%", "+21.0", "round.external_groups", "Digests", Config().digest, "jax", "0.10.2"),
    ):
        assert wanted in text, wanted
    assert sum(a.get("class") == "answer" for _, a in page.elements) == 6
    assert digest(["policy", 1]) in text and digest(["policy", 41]) in text and "ab" * 32 in text


def test_every_chart_is_named_and_tells_its_values(whole):
    page = checked(whole)
    plots = [a for tag, a in page.elements if tag == "svg" and "plot" in a.get("class", "")]
    assert len(plots) >= 15 and all(a["role"] == "img" and a["aria-label"] for a in plots)
    titles = [data for tag, data in page.texts if tag == "title"]
    reward = [line["reward"] for line in RunLedger(whole).rounds()]
    assert any(t.startswith(f"round 7\nreward: {markup.number(reward[6])}") for t in titles)
    for name in ("viewport", "color-scheme"):
        assert any(a.get("name") == name for _, a in page.elements)
    style = "".join(data for tag, data in page.texts if tag == "style")
    assert "prefers-color-scheme:dark" in style and "max-width:720px" in style


def test_links_lead_to_parts_of_the_page(whole):
    page = checked(whole)
    anchors = {a["id"] for _, a in page.elements if "id" in a}
    assert {a["href"] for tag, a in page.elements if tag == "a"} == {f"#{name}" for name in anchors} != set()


def test_the_same_folder_gives_the_same_bytes(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert [p.name for p in run.iterdir() if p.name.endswith(".tmp")] == []


def test_a_hundred_rounds_take_less_than_two_seconds(tmp_path):
    make_run(tmp_path / "long", 100)
    begun = time.process_time()
    write_report(tmp_path / "long")
    assert time.process_time() - begun < 2.0


def test_five_thousand_rounds(whole, tmp_path):
    rng = random.Random(1)
    line = next(RunLedger(whole).rounds())
    rows = [line | {"round": n, "reward": rng.random(), "level": 1 + n // 1001} for n in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    begun = time.process_time()
    page = checked(tmp_path)
    assert time.process_time() - begun < 10.0
    assert (tmp_path / "report.html").stat().st_size < 2 << 20
    assert "Each point stands for 42 rounds" in page.text() and "5,000" in page.text()


# ---- hostile text


@pytest.mark.parametrize("text", HOSTILE, ids=["tags", "bidi", "quotes", "urls", "long", "lines"])
def test_hostile_texts_stay_text(tmp_path, text):
    if "\ud800" in text:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") + "\ud800"
    checked(make_run(tmp_path / "run", 4, [text]))
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert len(page) < 400_000 and "<script" not in page and "<img" not in page


def test_hostile_names_everywhere(tmp_path):
    bad = "</title><script>\u202e\ud800\n'\"" + "y" * 3000
    make_run(tmp_path / "run", 14, [bad])
    ledger = RunLedger(tmp_path / "again")
    for number in range(1, 15):
        r = to_json(RunLedger(tmp_path / "run").read_round(number))
        r["metrics"]["proposals"]["refused"] = {bad: 2, **{f"{bad}{i}": 1 for i in range(20)}}
        r["metrics"] |= {f"reward_{bad}": 0.5, "success_by_source": {bad: 0.5}, "seconds_by_phase": {bad: 1.0}}
        for group in r["own"] + r["external"]:
            group |= {"peer": bad, "policy": bad}
            group["task"] |= {"source": bad, "entry_point": bad, "tests": [bad] * 3}
        for row in r["rewards"]:
            for x in row:
                x["parts"] = {bad: x["total"]}
        for row in r["verdicts"]:
            for v in row:
                v["detail"] = bad
        r |= {"policy_before": bad, "policy_after": bad, "config_digest": bad}
        ledger.write(from_json(Round, r))
    (tmp_path / "again" / "config.toml").write_text(f'[run]\n"{"<b>" * 9}" = "<i>"\n["<u>"]\nx = ["<s>", 1]\n')
    ledger.write_summary({"rounds": 14, "versions": {bad: bad}, "policy_digest": bad})
    page = checked(tmp_path / "again")
    assert "script" not in page.tags and "u" not in page.tags and "yyyy" in page.text()


@given(st.text(max_size=300))
def test_escaping_hides_nothing_and_opens_nothing(text):
    shown = Page(f"<pre>{markup.block(text)}</pre>")
    assert shown.tags <= {"pre", "span"} and not shown.faults
    kept = "".join(data for tag, data in shown.texts if tag == "pre")
    assert kept == "".join(c for c in text.replace("\r\n", "\n") if c.isprintable() or c in "\n\t")
    line = markup.inline(text)
    assert not re.search("[<>\"'\n]", line) and line.isprintable()


def test_a_cut_text_says_how_much_is_missing():
    assert "195,999 more characters" in markup.block("x" * 199_999, 4000)
    assert markup.block("\u200b" * 3 + "<") == '<span class="ctl">U+200B ×3</span>&lt;'


# ---- folders that lack something


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(Config()))
    page = checked(tmp_path)
    assert "No round has been played yet" in page.text() and "0 of 100 rounds so far" in page.text()


@pytest.mark.parametrize("missing", ["config.toml", "metrics.jsonl", "evaluations.json", "summary.json", "rounds"])
def test_a_missing_part_is_left_out(run, missing):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = checked(run).text()
    if missing in ("rounds", "metrics.jsonl"):
        assert "Best answer" not in text
    if missing == "evaluations.json":
        assert "Mean reward rose from" in text and "Before and after" not in text


@pytest.mark.parametrize("name", ["config.toml", "evaluations.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("data", [b"\x00\xff" * 50, b"[1, 2]", b"[" * 100_000, b'{"before": 3, "round": "x"}\n'])
def test_a_damaged_file_is_noted(run, name, data):
    (run / name).write_bytes(data)
    page = checked(run)
    noted = [a for _, a in page.elements if a.get("class") == "note"]
    assert noted or data.startswith(b"{") and name != "config.toml"


def test_damaged_lines_and_records_are_noted(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:5], b"{torn\n", *lines[5:9], lines[2], *lines[9:]])[:-20])
    (run / "rounds" / "000001.json.gz").write_bytes(b"no gzip")
    record = json.loads(gzip.decompress((run / "rounds" / "000039.json.gz").read_bytes()))
    record["own"][0]["rollouts"][0]["text"] = 7
    (run / "rounds" / "000039.json.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    text = checked(run).text()
    assert "3 lines are damaged" in text and "2 round records cannot be read" in text
    assert "39 of 40 rounds" not in text or "finished" not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
METRIC = st.sampled_from(
    "reward reward_x success_by_level success_by_source level verdicts proposals groups_own groups_external seconds "
    "seconds_by_phase entropy loss tokens_per_second".split()
)
INNER = st.sampled_from(["1", "5", "correct", "tries", "valid", "refused", "judge", "value", "low", "high", "by_level"])
METRICS = st.dictionaries(METRIC, JSON | st.dictionaries(INNER, JSON | st.floats(-2, 2), max_size=4), max_size=8)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=st.lists(METRICS, max_size=14), evaluations=st.dictionaries(st.sampled_from(["before", "after"]), JSON))
def test_any_metrics_make_a_page(tmp_path, lines, evaluations):
    rows = "".join(json.dumps(line | {"round": n}) + "\n" for n, line in enumerate(lines, 1))
    (tmp_path / "metrics.jsonl").write_text(rows)
    (tmp_path / "evaluations.json").write_text(json.dumps(evaluations))
    checked(tmp_path)


# ---- honesty of the headline


def rewards(values, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"round": n, "reward": v}) + "\n" for n, v in enumerate(values, 1))
    )
    return learned.headline(read_run(tmp_path))


@pytest.mark.parametrize(
    "values, says",
    [
        ([0.1, 0.2, 0.1, 0.2, 0.7, 0.8, 0.7, 0.8], "Mean reward rose from 0.15 to 0.75 over 8 rounds"),
        ([0.7, 0.8, 0.7, 0.8, 0.1, 0.2, 0.1, 0.2], "Mean reward fell from 0.75 to 0.15 over 8 rounds"),
        ([0.1, 0.9, 0.2, 0.8, 0.3, 0.9], "No clear change in reward yet"),
        ([0.1, 0.9], "2 rounds played, too few to tell"),
        ([0.4], "1 round played, too few to tell"),
        ([None, None, None, None, None], "5 rounds played, too few to tell"),
        ([], "No round has been played yet"),
    ],
)
def test_headline_from_rewards(values, says, tmp_path):
    assert rewards(values, tmp_path)[0].startswith(says)


@pytest.mark.parametrize(
    "after, says",
    [
        (0.55, "Answers judged right on held-out tasks rose from 34% to 55%"),
        (0.40, "No clear change on held-out tasks: 34% judged right before, 40% after"),
        (0.34, "Held-out tasks as before: 34% of the answers judged right"),
        (0.10, "Answers judged right on held-out tasks fell from 34% to 10%"),
    ],
)
def test_headline_from_evaluations(run, after, says):
    both = {"before": evaluation(0.34), "after": evaluation(after)}
    (run / "evaluations.json").write_text(json.dumps(both))
    line, basis = learned.headline(read_run(run))
    assert line == says and "95% intervals 26% to 42% before" in basis
    assert (", which overlap." in basis) == (after in (0.40, 0.34))


def test_an_evaluation_of_an_earlier_round_is_told_as_such(run):
    summary = json.loads((run / "summary.json").read_text()) | {"rounds": 20}
    (run / "summary.json").write_text(json.dumps(summary))
    text = checked(run).text()
    assert "evaluation after training is of round 20" in text and "40 of 40 rounds so far" in text


# ---- charts


def test_bins_keep_means_and_missing_values():
    bins = charts.Bins(tuple(range(1, 251)), most=100)
    assert (
        bins.size == 3
        and len(bins) == 84
        and bins.names()[0] == "rounds 1–3, means"
        and bins.names()[-1] == "round 250"
    )
    assert bins.mean([1.0, None, 3.0, None, None, None] + [0.0] * 244)[:3] == [2.0, None, 0.0]
    assert [t for _, t in bins.ticks()] == ["round 1", "100", "200", "250"] and bins.ticks()[-1][0] == 83.5 / 84
    assert charts.Bins((7,)).ticks() == [(0.5, "round 7")]


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=300))
def test_ticks_stand_apart_and_at_the_ends(numbers):
    bins = charts.Bins(tuple(sorted(numbers)))
    ticks = bins.ticks()
    places = [place for place, _ in ticks]
    assert 1 <= len(ticks) <= 8 and all(0 < p < 1 for p in places)
    assert all(b - a > 0.1 for a, b in zip(places[:-1], places[1:-1], strict=False))
    assert ticks[-1][1].removeprefix("round ") == f"{max(numbers):,}" and ticks[0][1].startswith("round ")


def test_moving_average():
    assert charts.moving_average([1.0, 3.0, None, 5.0, 1e90, 2.0, 2.0], 2) == [
        1.0,
        2.0,
        3.0,
        5.0,
        1e90 / 2 + 2.5,
        1e90 / 2,
        2.0,
    ]
    assert charts.moving_average([None, 1.0], 3) == [None, 1.0]


@given(st.lists(st.floats(-1e99, 1e99, allow_nan=False), min_size=1, max_size=20), st.booleans())
def test_scales_hold_their_values_between_round_ends(values, zero):
    scale = charts.scale_for(values, 100, zero)
    assert scale.low < scale.high
    assert not zero or scale.low <= 0 <= scale.high
    assert 2 <= len(scale.ticks(4)) <= 8
    assert all(-0.01 <= scale.y(v) <= 100.01 for v in values)


def test_a_curve_breaks_where_values_are_missing():
    chart = charts.line_chart(charts.Bins((1, 2, 3, 4)), [charts.Series("x", [0.0, 1.0, None, 0.5], "s1")], "x")
    line = re.search(r'class="line s1" d="([^"]*)"', chart)[1]
    assert line.count("M") == 2 and line.count("L") == 1


def test_stacked_bars_add_up():
    series = [charts.Series("a", [1.0, None], "s1"), charts.Series("b", [3.0, 2.0], "s2")]
    chart = charts.stacked_chart(charts.Bins((1, 2)), series, "x", height=100)
    tops = [re.findall(r"M\S+ ([\d.]+)h", d) for d in re.findall(r'class="bar \S+" d="([^"]*)"', chart)]
    assert tops == [["75.0"], ["0.0", "50.0"]]
    assert "<b>17%</b>" in chart and "<b>83%</b>" in chart


@pytest.mark.parametrize(
    "value, number, percent",
    [
        (None, "–", "–"), (0.0, "0", "0%"), (0.12345, "0.123", "12%"), (12.0, "12", "1200%"), (0.05, "0.05", "5.0%"),
        (3.8e-6, "3.8e-6", "0.0%"), (102.5, "102.5", "10250%"), (123456.0, "123k", "12345600%"), (-0.5, "-0.5", "-50%"),
    ],
)  # fmt: skip
def test_numbers_in_few_characters(value, number, percent):
    assert markup.number(value) == number and markup.percent(value) == percent


def test_seconds():
    told = [markup.seconds(s) for s in (0.05, 12.34, 75, 4000, 360000)]
    assert told == ["0.05 s", "12.3 s", "1 min 15 s", "1 h 6 min", "100 h"]


# ---- samples


def test_samples_are_of_three_tasks_in_order_and_show_a_contrast(whole):
    chosen = samples.pick(read_run(whole))
    assert len({s.group.task.id for s in chosen}) == 3
    assert [s.round for s in chosen] == sorted(s.round for s in chosen)
    assert chosen[0].round <= 14 and chosen[2].round >= 27
    for s in chosen:
        totals = [r.total for r in s.rewards]
        assert totals[s.best] == max(totals) and totals[s.worst] == min(totals)
        assert s.verdicts[s.best].outcome is Outcome.CORRECT and s.verdicts[s.worst].outcome is not Outcome.CORRECT


def test_a_group_that_failed_is_no_sample(whole):
    r = RunLedger(whole).read_round(3)
    assert len(samples.samples_of(r)) == 2
    assert len(samples.samples_of(dataclasses.replace(r, rewards=(None, *r.rewards[1:])))) == 1


def test_records_are_spread_over_the_run():
    assert spread([], 3) == [] and spread([4], 3) == [4] and spread([4, 9], 3) == [9, 4]
    some = spread(range(1, 1001), 24)
    assert some[:2] == [1000, 1] and len(set(some)) == 24 == len(some)


# ---- trackers


def test_tensorboard_event_files_hold_every_number(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    notes = []
    modules = load_sinks(["tensorboard"])
    for played, numbers in ((0, (1, 2, 3)), (2, (3,))):
        open_ = report.Sinks(modules, tmp_path, {}, played, lambda *a, **k: notes.append(k))
        for n in numbers:
            open_.write(n, {"reward": n / 2, "verdicts": {"correct": n}, "name": "x", "bad": math.nan, "none": None})
        open_.close()
    events, purged = [], []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            events += [(event.step, v.tag, round(v.simple_value, 3)) for v in event.summary.value]
            purged += [event.step] if event.HasField("session_log") else []
    assert sorted(set(events)) == [
        (1, "reward", 0.5), (1, "verdicts/correct", 1.0), (2, "reward", 1.0), (2, "verdicts/correct", 2.0),
        (3, "reward", 1.5), (3, "verdicts/correct", 3.0),
    ]  # fmt: skip
    assert purged[-1] == 3 and notes == []


@pytest.mark.parametrize("name", list(sinks.PACKAGES))
def test_a_tracker_that_is_not_installed(name, monkeypatch):
    monkeypatch.setitem(sys.modules, sinks.PACKAGES[name], None)
    with pytest.raises(ConfigError, match=f"report.sinks names {name}.*pip install {sinks.PACKAGES[name]}") as told:
        load_sinks([name])
    assert "\n" not in str(told.value)


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **named):
        self.calls.append(("init", named))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize(
    "environment, mode",
    [
        ({}, "offline"),
        ({"WANDB_MODE": "online"}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_never_asks_for_a_key(environment, mode, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    open_ = report.Sinks(load_sinks(["wandb"]), tmp_path, {"run": {"seed": 1}}, 0, pytest.fail)
    open_.write(4, {"reward": 1, "seconds_by_phase": {"judge": 2.0}})
    open_.close()
    open_.close()
    (_, named), *rest = fake.calls
    assert named["mode"] == mode and named["config"] == {"run": {"seed": 1}} and named["dir"] == str(tmp_path)
    assert rest == [("log", {"reward": 1.0, "seconds_by_phase/judge": 2.0}, 4), ("finish",)]


def test_trackio(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    open_ = report.Sinks(load_sinks(["trackio"]), tmp_path / "night", {}, 0, pytest.fail)
    open_.write(1, {"reward": 0.5})
    open_.close()
    assert fake.calls[0][1]["name"] == "night" and fake.calls[1:] == [("log", {"reward": 0.5}, 1), ("finish",)]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_breaks_is_left_out_and_told_once(where, monkeypatch, tmp_path):
    fake, notes = FakeWandb(), []

    def broken(*args, **named):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(fake, where, broken)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    open_ = report.Sinks(load_sinks(["trackio"]), tmp_path, {}, 0, lambda event, text: notes.append((event, text)))
    open_.write(1, {"reward": 0.5})
    open_.write(2, {"reward": 0.5})
    open_.close()
    assert len(notes) == 1 and notes[0][0] == "note" and "trackio is left out" in notes[0][1]


def test_a_tracker_that_does_not_end_is_left_to_itself(monkeypatch, tmp_path):
    fake, notes, go_on = FakeWandb(), [], threading.Event()
    monkeypatch.setattr(fake, "finish", lambda: go_on.wait(30))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    open_ = report.Sinks(load_sinks(["trackio"]), tmp_path, {}, 0, lambda event, text: notes.append(text))
    begun = time.monotonic()
    open_.close(0.05)
    assert time.monotonic() - begun < 10 and "trackio did not end within 0.05 s" in notes[0]
    go_on.set()


def test_no_tracker_by_default_and_none_imported():
    assert Config().report.sinks == () and load_sinks(Config().report.sinks) == {}
    with pytest.raises(ConfigError, match="names one twice"):
        from_dict({"report": {"sinks": ["wandb", "wandb"]}})
    with pytest.raises(ConfigError, match="report.sinks"):
        from_dict({"report": {"sinks": ["mlflow"]}})


def test_trackers_may_change_when_a_run_goes_on():
    assert verbs._may_change("report.sinks", Config())


# ---- in a run


class FakeCheckpoints:
    def __init__(self, *args, **named):
        self.saved = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def save(self, number, *rest):
        self.saved.append(number)

    def wait(self):
        pass


@pytest.fixture
def training(whole, monkeypatch, tmp_path):
    """`training(error)`: cz_jax.build.train with a stand-in for everything but the keeping: 3 rounds, a checkpoint
    after the second, then `error`."""
    config = from_dict({"run": {"rounds": 5}, "checkpoint": {"every": 2}, "eval": {"before_and_after": False},
                        "report": {"sinks": ["trackio"]}})  # fmt: skip
    state = types.SimpleNamespace(state={}, restore=None)
    built = types.SimpleNamespace(
        node=types.SimpleNamespace(config=config), learner=state, host_state=lambda p: {}, close=lambda: None,
        base=None, skipped={},
    )  # fmt: skip
    fake, out, seen = FakeWandb(), tmp_path / "run", []

    def play(node, position, keep, say):
        for number in (1, 2, 3):
            keep(RunLedger(whole).read_round(number), Position(number, LevelState(2)))
            seen.append((out / "report.html").exists())
        if play.error is not None:
            raise play.error

    def train(error=None):
        play.error = error
        return verbs.train(config, out)

    monkeypatch.setitem(sys.modules, "trackio", fake)
    for name, value in {
        "Checkpoints": FakeCheckpoints, "build": lambda *a: built, "run": play, "_finish": lambda *a: {"rounds": 3},
        "write_texts": lambda *a: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(verbs, name, value)
    train.out, train.seen, train.fake = out, seen, fake
    return train


def test_a_run_writes_its_report_after_a_checkpoint_and_at_its_end(training):
    training()
    assert training.seen == [False, True, True]
    assert "3 of 5 rounds so far" in checked(training.out).text()
    rewards = [line["reward"] for line in RunLedger(training.out).rounds()]
    logged = [(call[2], call[1]["reward"]) for call in training.fake.calls if call[0] == "log"]
    assert logged == list(zip((1, 2, 3), rewards, strict=True)) and training.fake.calls[-1] == ("finish",)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunStopped("the evaluator is broken")], ids=["ctrl_c", "stop"])
def test_a_run_that_ends_early_has_its_report(training, error):
    with pytest.raises(type(error)):
        training(error)
    assert "3 of 5 rounds so far" in (training.out / "report.html").read_text("utf-8")
    assert training.fake.calls[-1] == ("finish",)


def test_a_report_that_finds_no_room_ends_no_run(training, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_atomic", full)
    training()
    assert not (training.out / "report.html").exists() and len(list(RunLedger(training.out).rounds())) == 3


def test_a_missing_tracker_is_told_before_anything_is_written(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        training()
    assert not training.out.exists()
