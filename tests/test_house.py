"""The rules of the house: import floors, sizes, nothing that executes text, one agreed top level, docs that hold.

Each checker takes source text, so that a planted violation can show that it is found.
"""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cz_jax"

FLOORS = {
    0: {"nouns", "errors", "config", "shapes"},
    1: {
        *("ports", "rewards", "difficulty", "metrics", "text", "rng", "parallel", "processes", "models", "grpo"),
        *("files", "preemption"),
    },
    2: {"convert", "sampling", "tasks", "checkpoint", "ledger", "swarm", "audit", "report", "doctor", "timeline"},
    3: {"roles"},
    4: {"loop", "evaluate"},
    5: {"build", "bench", "plan", "local_swarm"},
    6: {"cli", ""},  # "": cz_jax/__init__.py, which offers the verbs of build
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
SIDEWAYS = {  # edges within a floor, in an order that has no circle
    *{("config", "nouns"), ("config", "errors")},
    *{("grpo", "models"), ("grpo", "parallel"), ("models", "parallel"), ("rewards", "text"), ("evaluate", "loop")},
    *{("report", "ledger"), ("bench", "build"), ("plan", "build"), ("plan", "bench"), ("local_swarm", "build")},
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
FILE_LIMITS = {"loop.py": 200}
LONG_FUNCTIONS: set[str] = set()  # "file.py:function", each with its reason beside it

EXECUTING_CALLS = {"exec", "eval", "compile", "__import__"}
UNSAFE_MODULES = {
    *("subprocess", "pickle", "cPickle", "marshal", "shelve", "runpy", "code", "codeop", "dill", "cloudpickle"),
    *("joblib", "pty"),
}
UNSAFE_ATTRIBUTES = {
    *("os.system", "os.popen", "os.fork", "os.startfile", "yaml.load", "yaml.unsafe_load", "torch.load"),
    *("builtins.exec", "builtins.eval", "builtins.compile"),
}
UNSAFE_OS = re.compile(r"os\.(exec|spawn|posix_spawn)\w*")
UNSAFE_SWITCHES = {"allow_pickle", "trust_remote_code"}

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "cz_jax", "configs", "tests", "scripts", "tpu"}
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")


def package_files():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: pathlib.Path) -> tuple[str, ...]:
    """("cz_jax", "models", "qwen") of cz_jax/models/qwen.py; a package stands for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def room_of(module: tuple[str, ...]) -> str:
    return module[1] if len(module) > 1 else ""


def imported_rooms(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, room) of every import of this package, wherever in the file it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [f"{base}.{a.name}" for a in node.names] if base == "cz_jax" else [base]
            assert not node.level, f"line {node.lineno}: a relative import hides which room it reaches"
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "cz_jax":
                room = room_of(parts)
                found.append((node.lineno, room if room in FLOOR_OF or len(parts) > 2 else known_room(room)))
    return found


def known_room(name: str) -> str:
    """`name` where a file or folder of that name exists, else the package's own front ("from cz_jax import Config")."""
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else ""


def floor_violations(source: str, room: str) -> list[str]:
    if room not in FLOOR_OF:
        return [f"the room {room!r} stands on no floor: name it in FLOORS"]
    found = []
    for line, other in imported_rooms(ast.parse(source)):
        if other == room or (room, other) in SIDEWAYS:
            continue
        if FLOOR_OF.get(other, 99) >= FLOOR_OF[room]:
            found.append(
                f"line {line}: {room} (floor {FLOOR_OF[room]}) imports {other!r} (floor {FLOOR_OF.get(other)})"
            )
    return found


def executing_code(source: str) -> list[str]:
    """What in `source` could run text, unpickle, or start a program."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names = [f"{m}.{a.name}" for m in modules for a in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [f"line {node.lineno}: import {m}" for m in modules if m.split(".")[0] in UNSAFE_MODULES]
            found += [f"line {node.lineno}: import {n}" for n in names if unsafe_attribute(n)]
        elif isinstance(node, ast.Attribute) and unsafe_attribute(ast.unparse(node)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Name) and node.id in EXECUTING_CALLS and isinstance(node.ctx, ast.Load):
            found.append(f"line {node.lineno}: {node.id}")
        elif isinstance(node, ast.Call):
            found += unsafe_call(node)
    return found


def unsafe_attribute(name: str) -> bool:
    return name in UNSAFE_ATTRIBUTES or bool(UNSAFE_OS.fullmatch(name))


def unsafe_call(node: ast.Call) -> list[str]:
    found = []
    for keyword in node.keywords:
        constant = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in UNSAFE_SWITCHES and not constant:
            found.append(f"line {node.lineno}: {keyword.arg} is not False")
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
        found.append(f"line {node.lineno}: import_module of a name that is not written out")
    return found


def too_long(source: str, name: str) -> list[str]:
    found, lines, limit = [], source.count("\n"), FILE_LIMITS.get(name, MAX_FILE_LINES)
    if lines > limit:
        found.append(f"{name}: {lines} lines, {limit} allowed")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and f"{name}:{node.name}" not in LONG_FUNCTIONS:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{name}:{node.lineno} {node.name}: {length} lines, {MAX_FUNCTION_LINES} allowed")
    return found


def repository_files() -> list[str]:
    """Paths of the files that are, or would be, committed."""
    try:
        told = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [f for f in told.stdout.splitlines() if (ROOT / f).is_file()]


def readme_commands(text: str) -> list[list[str]]:
    """The words of each `cz-jax ...` line in the fenced shell blocks of `text`."""
    blocks = re.findall(r"```(?:bash|sh|console|shell)\n(.*?)```", text, re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0].split()[1:] for line in lines if re.match(r"(\S*/)?cz-jax\b", line)]


def unknown_in(words: list[str]) -> list[str]:
    """Which command or option of a `cz-jax` line does not exist."""
    from cz_jax.cli.main import command

    at = command
    while hasattr(at, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        if name not in at.commands:
            return [name]
        at = at.commands[name]
    known = {option for parameter in at.params for option in parameter.opts} | {"--help"}
    return [w.split("=")[0] for w in words if re.match("--?[a-z]", w) and w.split("=")[0] not in known]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_floors_sizes_and_nothing_executed(path):
    source = path.read_text("utf-8")
    complaints = floor_violations(source, room_of(dotted(path)))
    complaints += executing_code(source) + too_long(source, str(path.relative_to(PACKAGE)))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    "room, source",
    [
        ("nouns", "import cz_jax.config"),
        ("rewards", "from cz_jax import metrics"),
        ("metrics", "def f():\n    from cz_jax.build import train"),
        ("models", "from cz_jax.grpo import loss"),
        ("checkpoint", "import cz_jax.ledger.files"),
        ("loop", "from cz_jax import Config"),
        ("loop", "from cz_jax.nowhere import x"),
        ("attic", "import json"),
    ],
)
def test_a_planted_import_is_found(room, source):
    assert floor_violations(source, room)


@pytest.mark.parametrize(
    "room, source",
    [
        ("grpo", "from cz_jax.models import qwen\nfrom cz_jax.grpo.loss import f"),
        ("cli", "from cz_jax.build import train\nimport os"),
        ("loop", "from cz_jax import rewards\nfrom cz_jax.nouns import Task"),
    ],
)
def test_a_right_import_is_not(room, source):
    assert not floor_violations(source, room)


@pytest.mark.parametrize(
    "source",
    [
        "exec('x = 1')",
        "run = eval",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "import pickle",
        "from subprocess import run",
        "import os\nos.system('ls')",
        "from os import execvp",
        "os.spawnl(0, 'x')",
        "import importlib\nimportlib.import_module(name)",
        "yaml.load(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_a_planted_execution_is_found(source):
    assert executing_code(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "jax.jit(f).lower(x).compile()",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "import ast\nast.parse(text)",
        "import os\nos.path.exists('x')",
    ],
)
def test_what_only_looks_alike_is_not(source):
    assert not executing_code(source)


def test_planted_lengths_are_found():
    assert too_long("x = 1\n" * 501, "a.py") and not too_long("x = 1\n" * 500, "a.py")
    assert too_long("x = 1\n" * 201, "loop.py") and not too_long("x = 1\n" * 200, "loop.py")
    assert too_long("def f():\n" + "    x = 1\n" * 60, "a.py") and not too_long(
        "def f():\n" + "    x = 1\n" * 59, "a.py"
    )


def test_every_room_of_the_map_has_one_floor():
    assert sum(len(rooms) for rooms in FLOORS.values()) == len(FLOOR_OF)


def test_top_level():
    names = {f.split("/")[0] for f in repository_files()}
    assert {n for n in names if not n.startswith(".")} <= TOP_LEVEL


def test_nothing_unfinished():
    found = []
    for name in repository_files():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", "") and path.stat().st_size < 1 << 20:
            text = path.read_text("utf-8", "replace")
            found += [f"{name}: {match.group()}" for match in UNFINISHED.finditer(text)]
    assert not found


def test_no_large_file():
    assert not [f for f in repository_files() if (ROOT / f).stat().st_size > 8 << 20]


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    for script in ("scripts/demo", "scripts/test"):
        assert script in text and (ROOT / script).stat().st_mode & 0o111, script
    unknown = {" ".join(words): unknown_in(words) for words in readme_commands(text)}
    assert not {k: v for k, v in unknown.items() if v}
    files = re.findall(r"(?<![\w/.-])(?:configs|scripts|tests|tpu|cz_jax)/[\w./-]*\w", text)
    assert not [f for f in files if not (ROOT / f).exists()]


def test_a_planted_readme_command_is_found():
    lines = ["cz-jax train configs/cpu.toml a.b=1 --out x", "$ cz-jax identity nwe p", "cz-jax eval \\", "  --modle m"]
    text = "\n".join(["```bash", *lines, "```"])
    assert [unknown_in(words) for words in readme_commands(text)] == [[], ["nwe"], ["--modle"]]
