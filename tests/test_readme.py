"""What the README shows exists: its commands parse, its Python names are there, its paths too."""

import ast
import pathlib
import re
import shlex

import pytest

import cz_jax
from cz_jax.cli.main import command

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line.partition("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.replace("\\\n", " ").splitlines()
    if "cz-jax " in line and not line.startswith("#")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(line)
    words = words[[w.endswith("cz-jax") for w in words].index(True) + 1 :]
    group = command
    while hasattr(group, "commands"):
        name, *words = words
        group = group.commands[name]
    group.make_context(name, list(words))
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


def test_python_names_exist():
    (block,) = (text for kind, text in BLOCKS if kind == "python")
    names = {
        n.attr for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "cz_jax"
    }
    assert names and all(hasattr(cz_jax, name) for name in names)
