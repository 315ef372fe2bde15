"""The page: what was learned first, then the charts, then everything one needs to check it.

No script, no link to anything outside; a content security policy forbids both, should a text ever slip through.
"""

import pathlib
import re

from cz_jax.config import Config
from cz_jax.files import write_atomic
from cz_jax.nouns import LEVEL_NAMES
from cz_jax.report import sections
from cz_jax.report.charts import Bins
from cz_jax.report.learned import evaluated, headline, reward_ends
from cz_jax.report.markup import inline, number, percent, seconds
from cz_jax.report.read import Run, at, finite, mean, read_run
from cz_jax.report.samples import pick, show
from cz_jax.report.style import STYLE

REPORT = "report.html"
ARROW = " \N{RIGHTWARDS ARROW} "
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run_folder: pathlib.Path) -> pathlib.Path:
    """Writes report.html into the run folder from what the folder holds, whole or not at all, and returns its path.

    Files that are missing or damaged leave out what they would have told, with a note. CheckpointError where the folder
    holds no run; OSError where it cannot be written to.
    """
    path = pathlib.Path(run_folder) / REPORT
    write_atomic(path, page(read_run(run_folder)).encode("utf-8"))
    return path


def page(run: Run) -> str:
    """The whole HTML document."""
    title, basis = headline(run)
    bins = Bins(run.numbers)
    parts = [(anchor, name, about, body) for anchor, name, about, body in _parts(run, bins) if body]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _, _ in parts)
    notes = "".join(f'<p class="note">{inline(note, 300)}</p>' for note in run.notes)
    body = "".join(
        f'<h2 id="{anchor}">{name}</h2><p class="about">{about}</p>{content}' for anchor, name, about, content in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/><meta name="referrer" content="no-referrer"/>'
        f"<title>{inline(run.name, 60)} \N{MIDDLE DOT} CodeZero</title><style>{_packed(STYLE)}</style></head><body>"
        f'<header class="top"><p class="eyebrow">CodeZero \N{MIDDLE DOT} {inline(run.name, 60)} \N{MIDDLE DOT} '
        f'{_state(run)}</p><h1>{_unbroken(title)}</h1><p class="lead">{inline(basis, 600)}</p>'
        f'<dl class="tiles">{_tiles(run)}</dl><nav aria-label="Parts of this page">{links}</nav>{notes}</header>'
        f"<main>{body}</main><footer>Made by cz-jax from the run folder alone. No answer was executed: right means "
        f"judged right by the evaluator.</footer></body></html>\n"
    )


def _parts(run: Run, bins: Bins):
    """(anchor, name, what it shows, HTML) in reading order; empty HTML leaves a part out."""
    if run.lines:
        yield "learning", "Learning", "How good the answers were, round by round.", sections.reward(run, bins)
    yield (
        "evaluation",
        "Held-out tasks",
        "The same tasks and the same random keys before and after; none of them entered training.",
        sections.evaluation(run),
    )
    if run.lines:
        both = sections.levels(run, bins) + sections.by_source(run, bins)
        yield (
            "levels",
            "Difficulty",
            "The proposer's level follows the solver's success.",
            f'<div class="flow">{both}</div>' if both else "",
        )
    chosen = pick(run)
    yield (
        "samples",
        "Tasks and answers",
        "The most telling group of each third of the run: its best answer beside its worst.",
        f'<div class="stack">{"".join(map(show, chosen))}</div>' if chosen else "",
    )
    if run.lines:
        made = (sections.verdicts, sections.proposals, sections.peers, sections.phases)
        yield (
            "rounds",
            "What the rounds were made of",
            "Where tasks and groups came from, what became of them, and what took the time.",
            f'<div class="flow">{"".join(part(run, bins) for part in made)}</div>{sections.timeline(run)}',
        )
        yield "update", "The update", "Signs of a healthy or an ailing optimizer.", sections.health(run, bins)
    yield (
        "configuration",
        "Configuration",
        "What to set to play this run again.",
        sections.configuration(run, Config().model_dump(mode="json")),
    )
    yield "provenance", "Digests and versions", "What this page speaks of, exactly.", sections.provenance(run)


def _state(run: Run) -> str:
    played, wanted = len(run.lines), finite(run.setting("run", "rounds"))
    if at(run.summary, "rounds") == played:
        return "finished"
    return f"{played} of {wanted:.0f} rounds so far" if wanted else f"{played} rounds so far"


def _tiles(run: Run) -> str:
    first, last = reward_ends(run)
    before, after = evaluated(run)
    path = [v for v in run.series("level") if v is not None]
    shared, got = (sum(v or 0.0 for v in run.series(f"groups_{kind}")) for kind in ("own", "external"))
    speed = mean(run.series("tokens_per_second"))
    tiles = [("Rounds", f"{len(run.lines):,}", seconds(sum(v or 0.0 for v in run.series("seconds"))))]
    if first:
        ends = f"first and last {len(first)} rounds" if len(first) > 1 else "first and last round"
        tiles.append(("Mean reward", f"{number(mean(first))}{ARROW}{number(mean(last))}", ends))
    if before or after:
        values = [percent(e.value) for e in (before, after) if e]
        tiles.append(("Held-out tasks", ARROW.join(values), "of answers judged right"))
    if path:
        start = finite(run.setting("level", "start")) or path[0]
        name = LEVEL_NAMES.get(round(path[-1]), "")
        tiles.append(("Level", f"{start:.0f}{ARROW}{path[-1]:.0f}", name))
    tiles.append(("Groups", f"{shared + got:,.0f}", f"{got:,.0f} of them from peers"))
    if speed:
        tiles.append(("Sampling", f"{number(speed)} tok/s", "mean over rounds"))
    return "".join(f"<div><dt>{n}</dt><dd>{inline(v)}<small>{inline(s)}</small></dd></div>" for n, v, s in tiles)


def _unbroken(title: str) -> str:
    return inline(title, 160).replace("held-out", "held\N{NON-BREAKING HYPHEN}out")


def _packed(css: str) -> str:
    return re.sub(r"\s*\n\s*", "", css)
