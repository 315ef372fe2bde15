"""One row of a data set in, one `Task` out, or the reason why not. Pure: no file, no network, nothing is ever run.

A row that cannot be used is left out whole and counted under its reason; no text is ever cut to make it fit, least of
all tests. Chat tokens and code fences in a row are plain text and stay.
"""

import ast
import builtins
import hashlib
import keyword
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cz_jax.errors import one_line
from cz_jax.nouns import Level, Task, canonical_json
from cz_jax.text.reading import BadJson, is_unicode, load_json, parse_python

MAX_ROW_CHARS = 1 << 26  # a longer line is not even parsed
MAX_QUESTION_CHARS = 6_000
MAX_TEST_CHARS = 2_000
MAX_TESTS = 20  # of a row of one's own file
MAX_PROGRAM_TESTS = 4  # kept of a CodeContests row
MAX_REASONS = 50  # distinct reasons counted by name

_NAMING = "\n\nThe function must be named "
_BUILTIN_NAMES = frozenset(dir(builtins))
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.comprehension, ast.BoolOp, ast.Try, ast.Lambda, ast.FunctionDef)
_LETTER_A = 7  # difficulty codes of CodeContests: 1 EASY .. 5 HARDEST, 6 elsewhere, 7 problem A, 8 B, .. 28 V
_FILE_KEYS = ("question", "tests", "entry_point", "level")


class BadRow(ValueError):
    """A row that is left out; its text is the reason under which it is counted."""


@dataclass(frozen=True)
class LoadedTasks:
    """What a task source held: its usable tasks in order, and how many rows were left out, by reason."""

    tasks: tuple[Task, ...]
    skipped: dict[str, int]


def collect(rows: Iterable, make: Callable[[object], Task]) -> LoadedTasks:
    """The tasks that `make` gives for `rows`. A `BadRow` is counted; so is a task whose id came before."""
    tasks: dict[str, Task] = {}
    skipped: dict[str, int] = {}
    for row in rows:
        try:
            task = make(row)
            if task.id in tasks:
                raise BadRow("the same task as an earlier row")
            tasks[task.id] = task
        except BadRow as e:
            reason = str(e)
            if reason not in skipped and len(skipped) >= MAX_REASONS:
                reason = "other reasons"
            skipped[reason] = skipped.get(reason, 0) + 1
    return LoadedTasks(tuple(tasks.values()), skipped)


def read_json_row(line: str) -> dict:
    """The JSON object on one line; BadRow where there is none."""
    if len(line) > MAX_ROW_CHARS:
        raise BadRow(f"a line of more than {MAX_ROW_CHARS} characters")
    try:
        row = load_json(line.removeprefix("\ufeff"))
    except BadJson as e:
        raise BadRow(f"not a line of strict JSON ({e.reason})") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def mbpp_task(row: dict) -> Task:
    """A function task from an MBPP row (text, code, test_list, test_setup_code).

    MBPP does not name the function it wants: the question gets a sentence with the name and the first test. The name
    is the function that all asserts call (`entry_point_of`). `test_setup_code` is put before each test. The level comes
    from the size of the reference solution, statements + 2 x branches: up to 6 level 1, 8 level 2, 11 level 3, 17
    level 4, else 5. Of MBPP's 374 training rows this makes 83, 76, 82, 71 and 62 tasks of level 1 to 5.
    """
    text = _text(row, "text").strip()
    setup = row.get("test_setup_code") or ""
    if not isinstance(setup, str):
        raise BadRow("test_setup_code is not text")
    lines = [line.strip() for line in _texts(row, "test_list")]
    name = entry_point_of(lines)
    solution = parse_python(_text(row, "code"))
    if solution is None:
        raise BadRow("code does not parse as Python, so its size gives no level")
    setup = setup.replace("\r\n", "\n").strip()
    tests = [f"{setup}\n{line}" if setup else line for line in lines]
    question = f"{text}{_NAMING}{name}, as in this test:\n{lines[0]}"
    return _task("mbpp", question, tests, name, _level_from(_size(solution), (6, 8, 11, 17)))


def code_contests_task(row: dict) -> Task:
    """A program task from a CodeContests row (description, public_tests, generated_tests, cf_rating, difficulty).

    Tests: the public ones first, then generated ones, up to 4, each of at most 2,000 characters (longer ones are passed
    over whole). Left out: rows whose statement shows an image, that read or write a named file, or whose description is
    longer than 6,000 characters. Level by Codeforces rating: below 1000 1, 1400 2, 1800 3, 2300 4, else 5. Without a
    rating (0) by problem letter, A 1, B 2, C 3, D 4, later ones 5, or by EASY .. HARDEST; 3 where nothing is known.
    """
    description = _text(row, "description").strip()
    if "<image>" in description:
        raise BadRow("its statement shows an image")
    if row.get("input_file") or row.get("output_file"):
        raise BadRow("it reads or writes a named file")
    tests = []
    for field in ("public_tests", "generated_tests"):
        for test in _program_tests(row, field):
            if len(test) <= MAX_TEST_CHARS and test not in tests and len(tests) < MAX_PROGRAM_TESTS:
                tests.append(test)
    if not tests:
        raise BadRow(f"no test of text input and output within {MAX_TEST_CHARS} characters")
    return _task("code_contests", description, tests, None, _contest_level(row))


def file_task(row: dict, source: str = "file") -> Task:
    """A task from a row of one's own: question (text), tests (a list), entry_point (name, or null), level (1 to 5).

    With an entry_point each test is Python with an assert, and calls that function. With null the task is a program,
    and each test is {"input": text, "output": text}, as an object or as its JSON text. At most 20 tests. A row with
    another key is left out.
    """
    unknown = sorted(set(row) - set(_FILE_KEYS))
    if unknown:
        raise BadRow(f"unknown key {one_line(unknown[0], 40)!r}")
    if "entry_point" not in row:
        raise BadRow("entry_point is missing")
    question, name, tests = _text(row, "question").strip(), row["entry_point"], row.get("tests")
    try:
        level = int(Level(row.get("level")))
    except (ValueError, TypeError, OverflowError):
        raise BadRow("level is not a whole number from 1 to 5") from None
    if not isinstance(tests, list) or not tests:
        raise BadRow("tests is not a list with at least one test")
    if len(tests) > MAX_TESTS:
        raise BadRow(f"more than {MAX_TESTS} tests")
    if name is None:
        return _task(source, question, [_program_test(test) for test in tests], None, level)
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or not is_unicode(name):
        raise BadRow("entry_point is neither null nor the name of a function")
    lines = [line.strip() for line in _texts(row, "tests")]
    if not all(name in _called(line) for line in lines):
        raise BadRow("a test does not call entry_point")
    return _task(source, question, lines, name, level)


def entry_point_of(tests: Sequence[str]) -> str:
    """The function that every test calls within an assert. Python's builtins (set, sorted, ...) do not count, nor do
    methods such as math.isclose; of several the outermost, leftmost call of the first test. BadRow without one."""
    first, *others = [_called(test) for test in tests]
    for name in first:
        if name not in _BUILTIN_NAMES and all(name in other for other in others):
            return name
    raise BadRow("its tests call no function in common")


def question_key(task: Task) -> str:
    """One spelling of what a task asks, whatever its tests: SHA-256 of the question without case and layout, and
    without the sentence that MBPP questions get here. Starts with "question:", so that it is never a task id."""
    text = unicodedata.normalize("NFKC", task.question.partition(_NAMING)[0]).casefold()
    return "question:" + hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).hexdigest()


def held_out_keys(tasks: Iterable[Task]) -> frozenset[str]:
    """The ids and the question keys of `tasks`: what `MixedStream` keeps out of training."""
    return frozenset(key for task in tasks for key in (task.id, question_key(task)))


def _task(source: str, question: str, tests: Sequence[str], entry_point: str | None, level: int) -> Task:
    if len(question) > MAX_QUESTION_CHARS:
        raise BadRow(f"its question is longer than {MAX_QUESTION_CHARS} characters")
    if any(len(test) > MAX_TEST_CHARS for test in tests):
        raise BadRow(f"a test is longer than {MAX_TEST_CHARS} characters")
    return Task(source, question, tuple(tests), entry_point, level)


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise BadRow(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    if not is_unicode(value):
        raise BadRow(f"{name} is not valid Unicode text")
    return value


def _texts(row: dict, name: str) -> list[str]:
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise BadRow(f"{name} is not a list with at least one test")
    return [_text({name: value}, name) for value in values]


def _called(test: str) -> list[str]:
    """Names called in the asserts of `test`, outermost first. BadRow where it does not parse or asserts nothing."""
    if len(test) > MAX_TEST_CHARS:
        raise BadRow(f"a test is longer than {MAX_TEST_CHARS} characters")
    tree = parse_python(test)
    if tree is None:
        raise BadRow("a test does not parse as Python")
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    if not asserts:
        raise BadRow("a test asserts nothing")
    calls = [n for a in asserts for n in ast.walk(a.test) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [call.func.id for call in calls]


def _size(tree: ast.Module) -> int:
    nodes = list(ast.walk(tree))
    return sum(isinstance(n, ast.stmt) for n in nodes) + 2 * sum(isinstance(n, _BRANCHES) for n in nodes)


def _level_from(value: float, bounds: Sequence[float]) -> int:
    return 1 + sum(value > bound for bound in bounds)


def _contest_level(row: dict) -> int:
    rating, difficulty = row.get("cf_rating"), row.get("difficulty")
    if isinstance(rating, int) and rating > 0:
        return _level_from(rating, (999, 1399, 1799, 2299))
    if not isinstance(difficulty, int):
        return 3
    if difficulty >= _LETTER_A:
        return min(5, difficulty - _LETTER_A + 1)
    return difficulty if 1 <= difficulty <= 5 else 3


def _program_tests(row: dict, field: str) -> list[str]:
    """The tests of {"input": [...], "output": [...]}; those that are not text, or expect no output, are passed over."""
    pairs = row.get(field) or {}
    if not isinstance(pairs, dict):
        raise BadRow(f"{field} is not an object of inputs and outputs")
    inputs, outputs = pairs.get("input") or [], pairs.get("output") or []
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise BadRow(f"{field} does not hold as many outputs as inputs")
    tests = []
    for given, wanted in zip(inputs, outputs, strict=True):
        try:
            tests.append(_program_test({"input": given, "output": wanted}))
        except BadRow:
            continue
    return tests


def _program_test(test) -> str:
    if isinstance(test, str):
        test = read_json_row(test)
    if not isinstance(test, dict) or set(test) != {"input", "output"}:
        raise BadRow('a test of a program is not {"input": text, "output": text}')
    if not all(isinstance(text, str) and is_unicode(text) for text in test.values()) or not test["output"].strip():
        raise BadRow("input or output of a test is not text, or no output is expected")
    return canonical_json(test)
