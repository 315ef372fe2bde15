"""The charts and tables of the report, each a function of the Run."""

from collections import Counter, defaultdict
from statistics import fmean

from cz_jax.nouns import LEVEL_NAMES, Outcome
from cz_jax.report.charts import (
    Bins,
    Interval,
    Scale,
    Series,
    Span,
    interval_chart,
    line_chart,
    moving_average,
    stacked_chart,
    step_chart,
    timeline_chart,
)
from cz_jax.report.learned import estimate, evaluated, interval_text
from cz_jax.report.markup import card, inline, number, percent, seconds, short, table
from cz_jax.report.read import Run, at, finite, listed, mean

PALETTE = tuple(f"s{i}" for i in (1, 2, 3, 4, 5, 6, 8))
LONGEST_WINDOW = 50
MOST_DEVICES = 8
PART = "reward_"
VERDICTS = ((Outcome.CORRECT, "v1"), (Outcome.WRONG, "v2"), (Outcome.UNREADABLE, "v3"), (Outcome.FAILED, "v4"))
PHASES = {"propose": "s4", "roll_out": "s1", "share": "s6", "judge": "s3", "update": "s2"}
HEALTH = (  # metric, title, what to look for
    ("entropy", "Entropy", "nats a token; near zero the answers of a group are alike"),
    ("policy_kl", "KL to the policy that sampled", "nats a token; zero with one update a batch"),
    ("reference_kl", "KL to the starting weights", "nats a token; only with grpo.kl"),
    ("gradient_norm", "Gradient norm", "before it is clipped"),
    ("logprob_difference_mean", "Log-prob difference", "sampler against trainer, nats; should stay near zero"),
    ("loss", "Loss", "of the GRPO step; its level says little by itself"),
    ("learning_rate", "Learning rate", ""),
    ("truncated", "Cut answers", "share of answers that met the token limit"),
    ("groups_dropped", "Groups without contrast", "share dropped because all rewards were equal"),
    ("tokens_per_second", "Sampled tokens a second", ""),
)


def window_of(run: Run) -> int:
    """Rounds in the moving average."""
    return max(5, min(LONGEST_WINDOW, len(run.lines) // 10))


def smoothed(run: Run, bins: Bins, name: str, values: list, colour: str) -> Series:
    return Series(name, bins.mean(values), colour, bins.last(moving_average(values, window_of(run))))


def told_window(run: Run, bins: Bins) -> str:
    averaged = f"Bold is the mean of the last {window_of(run)} rounds." if len(bins) > 12 else ""
    binned = f" Each point stands for {bins.size} rounds." if bins.size > 1 else ""
    return averaged + binned


def reward(run: Run, bins: Bins) -> str:
    """The total, then each part, on scales of their own."""
    names = [key for key in run.parts() if key.startswith(PART)][:8]
    if all(v is None for v in run.series("reward")):
        return card("Reward", '<p class="fine">No round has a reward yet.</p>')
    total = line_chart(
        bins, [smoothed(run, bins, "reward", run.series("reward"), "s1")], "Mean reward over rounds", 260
    )
    cards = [card("Mean reward of an answer", total, told_window(run, bins))]
    if names:
        parts = [
            smoothed(run, bins, name.removeprefix(PART), run.series(name), colour)
            for name, colour in zip(names, ("s3", "s2", "s4", "s5", "s6", "s8", "s7", "s1"), strict=False)
        ]
        chart = line_chart(bins, parts, "Parts of the reward over rounds", 260)
        cards.append(card("By part", chart, "The parts add up to the reward."))
    return f'<div class="grid2">{"".join(cards)}</div>'


def evaluation(run: Run) -> str:
    """Held-out tasks before and after: overall and by level, as a chart and as numbers."""
    k = at(run.evaluations, "before", "average_at_k", "k") or at(run.evaluations, "after", "average_at_k", "k")
    of = f"@{k}" if finite(k) else "@k"
    rows = [(f"average{of}", *evaluated(run)), (f"pass{of}", *evaluated(run, "pass_at_k"))]
    levels = sorted({*_keys(run, "before"), *_keys(run, "after")})[:12]
    rows += [
        (f"level {level}", *(estimate(at(run.evaluations, w, "by_level", level, "average_at_k")) for w in WHEN))
        for level in levels
    ]
    rows = [row for row in rows if row[1] or row[2]]
    if not rows:
        return ""
    chart = interval_chart(rows, "Held-out tasks before and after, with 95% intervals", interval_text)
    numbers = table(
        ["", "before", "after", "points"],
        [[inline(name), _cell(before), _cell(after), _change(before, after)] for name, before, after in rows],
        "figures",
    )
    played, summed = len(run.lines), finite(at(run.summary, "rounds"))
    old = f" The evaluation after training is of round {summed:.0f}." if summed and summed != played else ""
    tasks = finite(at(run.evaluations, "after", "n_tasks")) or finite(at(run.evaluations, "before", "n_tasks"))
    about = f"{tasks:.0f} held-out tasks; levels by average{of}. " if tasks else ""
    return (
        f'<div class="grid2">{card("Before and after", chart, about + "Whiskers are 95% intervals over tasks." + old)}'
        f"{card('In numbers', numbers)}</div>"
    )


WHEN = ("before", "after")


def _keys(run: Run, when: str) -> list[str]:
    held = at(run.evaluations, when, "by_level")
    return [str(key) for key in held] if isinstance(held, dict) else []


def _cell(e: Interval | None) -> str:
    return f"{percent(e.value)} <small>{percent(e.low)} to {percent(e.high)}</small>" if e else "\N{EN DASH}"


def _change(before, after) -> str:
    if before is None or after is None:
        return "\N{EN DASH}"
    points = round((after.value - before.value) * 100, 1)
    return f"{points:+.1f}" if points else "0"


def levels(run: Run, bins: Bins) -> str:
    """Success by level, and under it the level path over the same rounds."""
    share = Scale(0.0, 1.0, 240)
    by_level = [
        smoothed(run, bins, f"{n} {name}", run.series("success_by_level", str(n)), f"l{n}")
        for n, name in LEVEL_NAMES.items()
        if any(v is not None for v in run.series("success_by_level", str(n)))
    ]
    if not by_level:
        return ""
    lines = [Series(s.name, s.smooth if len(bins) > 12 else s.values, s.colour) for s in by_level]
    chart = line_chart(bins, lines, "Success by level over rounds", 240, share, percent)
    about = "Share of answers judged right" + (
        f", mean of the last {window_of(run)} rounds with tasks of the level." if len(bins) > 12 else "."
    )
    path = step_chart(bins, bins.last(run.series("level")), LEVEL_NAMES, "Level of the proposer over rounds", 120)
    low, high = finite(run.setting("level", "low")), finite(run.setting("level", "high"))
    rule = (
        f"; it rises when more than {percent(high)} succeed and falls under {percent(low)}"
        if run.setting("level", "rule") == "band" and low is not None and high is not None
        else ""
    )
    told = f'<h3 class="sub">Level path</h3><p class="about">The level that is asked for{rule}.</p>'
    return card("Success by level", chart + told + path, about)


def verdicts(run: Run, bins: Bins) -> str:
    series = [
        Series(str(o), [v or 0.0 for v in bins.mean(run.series("verdicts", str(o)))], colour) for o, colour in VERDICTS
    ]
    series = [s for s in series if any(s.values)]
    if not series:
        return ""
    chart = stacked_chart(bins, series, "Verdicts of each round")
    about = "Answers of a round; unreadable is an evaluator that abstained, failed one that broke."
    return card("Verdicts", chart, about)


def by_source(run: Run, bins: Bins) -> str:
    names = run.parts("success_by_source")[: len(PALETTE)]
    if not names:
        return ""
    averaged = len(bins) > 12
    every = [
        smoothed(run, bins, name, run.series("success_by_source", name), colour)
        for name, colour in zip(names, PALETTE, strict=False)
    ]
    lines = [Series(s.name, s.smooth if averaged else s.values, s.colour) for s in every]
    chart = line_chart(bins, lines, "Success by task source", 240, Scale(0.0, 1.0, 240), percent)
    return card("Success by source", chart, "Share of answers judged right, by where the task came from.")


def proposals(run: Run, bins: Bins) -> str:
    """What became of the proposer's samples."""
    tries = sum(v or 0.0 for v in run.series("proposals", "tries"))
    if not tries:
        return card("Proposals", '<p class="fine">The proposer was not asked: tasks came from data sets alone.</p>')
    refused = run.parts("proposals", "refused")
    shown, rest = refused[:5], refused[5:]
    series = [Series("valid", [v or 0.0 for v in bins.mean(run.series("proposals", "valid"))], "v1")]
    for name, colour in zip(shown, ("s2", "s4", "s5", "s6", "s1"), strict=False):
        values = bins.mean([v or 0.0 for v in run.series("proposals", "refused", name)])
        series.append(Series(name.replace("_", " "), [v or 0.0 for v in values], colour))
    if rest:
        columns = [run.series("proposals", "refused", name) for name in rest]
        others = bins.mean([sum(v or 0.0 for v in row) for row in zip(*columns, strict=True)])
        series.append(Series("other reasons", [v or 0.0 for v in others], "s7"))
    valid = sum(v or 0.0 for v in run.series("proposals", "valid"))
    about = f"{valid:,.0f} of {tries:,.0f} samples became a task; the others by why they were refused."
    return card("Proposals", stacked_chart(bins, series, "Proposals of each round, valid or refused"), about)


def peers(run: Run, bins: Bins) -> str:
    """Groups of the node's own and of its peers, and who the peers were."""
    own, external = run.series("groups_own"), run.series("groups_external")
    got = sum(v or 0.0 for v in external)
    series = [
        Series(name, [v or 0.0 for v in bins.mean(values)], colour)
        for name, values, colour in (("own groups", own, "s1"), ("from peers", external, "s6"))
    ]
    chart = stacked_chart(bins, series if got else series[:1], "Groups of each round, own and from peers")
    shared = sum(v or 0.0 for v in own)
    if not got:
        wanted = finite(run.setting("round", "external_groups"))
        why = "peers were asked and had nothing to give" if wanted else "round.external_groups is 0"
        return card("From peers", chart, f"{shared:,.0f} own groups; none came from peers: {why}.")
    about = f"{shared:,.0f} own groups were shared and {got:,.0f} came from peers."
    told = f'<p class="fine">Of {len(run.records)} of {len(run.lines)} rounds that were looked into:</p>'
    return card("From peers", chart + told + _peer_table(run), about)


def _peer_table(run: Run) -> str:
    groups, right, totals, trained = Counter(), defaultdict(list), defaultdict(list), Counter()
    for r in run.records:
        rows = list(zip(r.groups, r.verdicts, r.rewards, strict=False))[len(r.own) :]
        for group, row, rewards in rows:
            groups[group.peer] += 1
            trained[group.peer] += group.id in r.trained
            right[group.peer] += [v.outcome is Outcome.CORRECT for v in row]
            totals[group.peer] += [x.total for x in rewards or ()]
    rows = [
        [short(peer, 16), str(n), percent(mean(right[peer])), number(mean(totals[peer])), str(trained[peer])]
        for peer, n in groups.most_common(12)
    ]
    return table(["peer", "groups", "judged right", "mean reward", "trained on"], rows, "figures") if rows else ""


def phases(run: Run, bins: Bins) -> str:
    names = run.parts("seconds_by_phase")
    names = [n for n in PHASES if n in names] + [n for n in names if n not in PHASES][:3]
    if not names:
        return ""
    series = [
        Series(
            name.replace("_", " "),
            [v or 0.0 for v in bins.mean(run.series("seconds_by_phase", name))],
            PHASES.get(name, ("s5", "s8", "s7")[i % 3]),
        )
        for i, name in enumerate(names)
    ]
    chart = stacked_chart(bins, series, "Seconds of each round by phase", text=lambda s: f"{number(s)} s")
    whole = sum(v or 0.0 for v in run.series("seconds"))
    return card("Time by phase", chart, f"{seconds(whole)} in rounds, compiling included.")


def timeline(run: Run) -> str:
    """When the devices were busy in the one round that was recorded."""
    length = finite(at(run.timeline, "seconds"))
    devices, spans, rows = listed(run.timeline, "devices"), [], []
    for phase in listed(run.timeline, "phases"):
        begin, end, busy = (finite(at(phase, key)) for key in ("begin", "end", "busy"))
        if length and None not in (begin, end, busy) and 0 <= begin < end <= length * (1 + 1e-6):
            name = str(at(phase, "name"))
            text = f"{name.replace('_', ' ')}: {number(end - begin)} s, devices busy {percent(busy)}"
            spans.append(Span(name.replace("_", " "), begin / length, end / length, PHASES.get(name, "s5"), text))
    for device in devices[:MOST_DEVICES]:
        rows.append((str(at(device, "name")), [finite(v) for v in listed(device, "bins")]))
    if not spans:
        return ""
    busy = mean([finite(at(device, "busy")) for device in devices])
    chart = timeline_chart(spans, rows, length, "When the devices were busy")
    about = f"Round {number(finite(at(run.timeline, 'round')))}, devices busy {percent(busy)} of {seconds(length)}."
    return card("One round on the devices", chart, about)


def health(run: Run, bins: Bins) -> str:
    """Small charts of the update; those without a number are left out."""
    cards = []
    for i, (metric, title, about) in enumerate(HEALTH):
        values = run.series(metric)
        if any(v is not None for v in values):
            series = [smoothed(run, bins, metric.replace("_", " "), values, PALETTE[i % len(PALETTE)])]
            chart = line_chart(bins, series, f"{title} over rounds", 120, legend=False)
            there = [v for v in values if v is not None]
            told = " \N{MIDDLE DOT} ".join(
                x for x in (f"last {number(there[-1])}", f"mean {number(fmean(there))}", about) if x
            )
            cards.append(card(title, chart, told))
    return f'<div class="grid3">{"".join(cards)}</div>' if cards else ""


def configuration(run: Run, defaults: dict) -> str:
    """Every setting, and first those that are not the default."""
    rows, changed = {}, []
    for section, values in run.config.items():
        if not isinstance(values, dict):
            continue
        rows[section] = []
        for key, value in values.items():
            row = [f"{inline(section)}.{inline(key)}", inline(_setting(value), 200)]
            default = at(defaults, section, key)
            rows[section].append(row)
            if value != default and [value] != [default]:
                changed.append([*row, inline(_setting(default), 200)])
    if not rows:
        return card("Configuration", '<p class="fine">The folder holds no readable config.toml.</p>')
    differing = (
        table(["setting", "here", "default"], changed, "settings")
        if changed
        else '<p class="fine">Every setting is the default.</p>'
    )
    whole = "".join(
        f"<div><h4>{inline(section)}</h4>{table(['setting', 'value'], of, 'settings')}</div>"
        for section, of in rows.items()
    )
    count = sum(map(len, rows.values()))
    every = f'<details><summary>All {count} settings</summary><div class="all">{whole}</div></details>'
    return card("What differs from the defaults", differing + every)


def _setting(value) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value != "" else "\N{EN DASH}"


def provenance(run: Run) -> str:
    """Digests and versions."""
    rows = []
    if run.records:
        first, last = run.records[0], run.records[-1]
        rows += [
            [f"policy before round {first.number}", f"<code>{inline(first.policy_before, 70)}</code>"],
            [f"policy after round {last.number}", f"<code>{inline(last.policy_after, 70)}</code>"],
        ]
        configs = list(dict.fromkeys(r.config_digest for r in run.records))[:4]
        rows += [["configuration", f"<code>{inline(d, 70)}</code>"] for d in configs]
    digest = at(run.summary, "policy_digest")
    if isinstance(digest, str):
        rows.append(["policy of the summary", f"<code>{inline(digest, 70)}</code>"])
    digests = table(["what", "SHA-256"], rows) if rows else '<p class="fine">No round record could be read.</p>'
    versions = at(run.summary, "versions")
    if isinstance(versions, dict) and versions:
        about = table(["package", "version"], [[inline(k), inline(v)] for k, v in list(versions.items())[:40]])
    else:
        about = '<p class="fine">Written to summary.json when the run ends.</p>'
    return f'<div class="grid2">{card("Digests", digests)}{card("Versions", about)}</div>'
