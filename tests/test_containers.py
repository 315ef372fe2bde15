"""The container files: what can be held against them without an engine that builds them."""

import json
import pathlib
import re
import shlex

import pytest

from cz_jax.cli.main import command

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "scripts").glob("Containerfile.*"))


def instructions(path):
    """(word, rest) of each instruction, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", "\n".join(s for s in path.read_text().splitlines() if not s.startswith("#")))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_there_is_one_for_gpus_and_one_for_the_relay():
    assert [p.suffix for p in FILES] == [".gpu", ".relay"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.suffix)
def test_pinned_unprivileged_and_without_secrets(path):
    steps = instructions(path)
    (image,) = (rest for word, rest in steps if word == "FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image)
    words = [word for word, _ in steps]
    user = words.index("USER")
    assert steps[user][1].isdecimal() and int(steps[user][1]) > 0 and "RUN" not in words[user:]
    assert (
        "ADD" not in words
        and "ARG" not in words
        and not any("chmod 777" in rest or "sudo" in rest for _, rest in steps)
    )
    for name in re.findall(r"(\w+)=", " ".join(rest for word, rest in steps if word == "ENV")):
        assert not re.search("TOKEN|KEY|SECRET|PASSWORD", name)
    (install,) = (rest for word, rest in steps if word == "RUN")
    assert "--no-cache-dir" in install and "--constraint scripts/constraints.txt" in install


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.suffix)
def test_what_it_copies_is_there_and_installs(path):
    copied = set()
    for word, rest in instructions(path):
        if word == "COPY":
            *sources, _ = rest.split()
            copied |= set(sources)
            assert all((ROOT / s).exists() for s in sources)
    project = (ROOT / "pyproject.toml").read_text()
    assert {"pyproject.toml", "cz_jax", *re.findall(r'"(\w+\.md)"|\["(LICENSE)"\]', project)[0]} - {""} <= copied
    extra = re.search(r"\.\[(\w+)\]", path.read_text())
    assert extra is None or f"\n{extra[1]} = [" in project


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.suffix)
def test_its_command_and_the_example_at_its_head_parse(path):
    steps = dict(instructions(path))
    entry = json.loads(steps["ENTRYPOINT"])
    head = path.read_text().split("FROM")[0].replace("\\\n#", " ")
    (example,) = re.findall(rf"cz-jax-{path.suffix[1:]} ((?:train|--tls-cert) .*)", head)
    calls = [shlex.split(example)] + ([json.loads(steps["CMD"])] if "CMD" in steps else [])
    for words in ([*entry, *call][1:] for call in calls):
        name, *rest = words
        command.commands[name].make_context(name, rest)
