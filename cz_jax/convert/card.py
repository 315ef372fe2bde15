"""The model card (README.md) of an exported folder: where the weights come from and what they score."""

import pathlib
from collections.abc import Mapping, Sequence

import yaml
from huggingface_hub import ModelCardData, metadata_load

from cz_jax.convert.folder import is_hub_id
from cz_jax.errors import one_line

TAGS = ("code", "grpo", "rl-swarm", "codezero", "cz_jax")
_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\`*_{}[]<>#|!~$&"})


def license_of(folder) -> str | None:
    """The license that the front matter of FOLDER/README.md names, if it does."""
    try:
        data = metadata_load(pathlib.Path(folder) / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    name = data.get("license")
    return name if isinstance(name, str) else None


def model_card(
    *,
    name: str,
    base_model: str,
    base_digest: str,
    rounds: int,
    config_digest: str,
    data_sources: Sequence[str],
    datasets: Sequence[str] = (),
    scores: Mapping[str, Mapping[str, float | None]] | None = None,
    versions: Mapping[str, str] | None = None,
    license: str | None = None,
) -> str:
    """The text of a README.md with YAML front matter.

    `base_model`: a hub id, or a folder of which only the name is told. `datasets`: hub ids. `scores`: row -> column ->
    value, such as {"before": {"average@8": 0.31}, "after": {...}}. Names from outside are escaped: none can add
    a line, a table cell, HTML or a key.
    """
    is_id = is_hub_id(base_model)
    shown = base_model if is_id else pathlib.PurePath(base_model).name
    front = ModelCardData(
        base_model=base_model if is_id else None,
        datasets=[one_line(d) for d in datasets] or None,
        library_name="transformers",
        license=one_line(license) if license else None,
        pipeline_tag="text-generation",
        tags=list(TAGS),
    )
    facts = [
        ("Base model", shown),
        ("Digest of the base model's weights", base_digest),
        ("Rounds", str(rounds)),
        ("Digest of the configuration", config_digest),
        ("Tasks", ", ".join(data_sources) or "none"),
    ]
    facts += [(f"Version of {package}", version) for package, version in sorted((versions or {}).items())]
    lines = ["---", front.to_yaml().rstrip("\n"), "---", "", f"# {_plain(name)}", ""]
    lines.append(
        f"{_plain(shown)}, trained by CodeZero on JAX with GRPO: the answers that it learned from were scored by"
    )
    lines += ["an evaluator model that reads code and never runs it.", "", *_table(("", ""), facts)]
    if scores:
        lines += ["", "## Scores", "", "By predicted correctness: no answer was executed.", "", *_score_table(scores)]
    return "\n".join(lines) + "\n"


def _score_table(scores: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    rows = [(label, *(_number(row.get(column)) for column in columns)) for label, row in scores.items()]
    return _table(("", *columns), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(map(_plain, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def _plain(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would read as markup."""
    return one_line(text).translate(_MARKDOWN)
