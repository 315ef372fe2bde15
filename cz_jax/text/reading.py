"""The three readers that the rest of the room stands on: Markdown fences, Python source, strict JSON.

Each is linear in its input, bounds size before it looks and nesting before it parses, and knows every way in which
CPython's parsers give up on a hostile text (SyntaxError, ValueError, RecursionError, MemoryError). What the bounds do
not protect: a parser that crashes the process below them; none is known for CPython 3.11 and later.
"""

import ast
import json
import math
import re
import warnings
from dataclasses import dataclass

MAX_TEXT = 1 << 18  # characters of a whole answer or proposal
MAX_CODE = 1 << 16  # characters of Python source
MAX_BRACKETS = 50  # open brackets at one place of a source
MAX_CHAIN = 200  # prefix operators, ternaries and lambdas in one expression of a source
MAX_DEPTH = 100  # levels of a syntax tree; the standard library's walkers stay well inside the recursion limit
MAX_JSON_DEPTH = 8
MAX_JSON_DIGITS = 20
FEATURE_VERSION = (3, 11)  # the oldest Python that cz_jax runs on, so that every node accepts the same sources
PARSER_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)

_OPENING = re.compile(r"( {0,3})(`{3,}|~{3,})(.*)", re.DOTALL)
_SOURCE_TOKEN = re.compile(
    r'#[^\n]*|"""(?:[^"\\]|\\.|"(?!""))*+(?:""")?|'
    r"'''(?:[^'\\]|\\.|'(?!''))*+(?:''')?|"
    r'"(?:[^"\\\n]|\\.)*+"?|'
    r"'(?:[^'\\\n]|\\.)*+'?|\*\*|:=|[^\W\d]\w*+|[][(){},;\n+~-]",
    re.DOTALL,
)
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[][{}]', re.DOTALL)
_CHAINING = frozenset(["not", "await", "lambda", "if", "else", "+", "-", "~", "**", ":="])


@dataclass(frozen=True, slots=True)
class Fence:
    """One fenced block. `mark` is "`" or "~"; `info` the first word after the opening fence, in lower case; `nested`: a
    line inside it would itself open a fence as long as this one."""

    mark: str
    info: str
    body: str
    closed: bool
    nested: bool


def read_fences(text: str) -> tuple[tuple[Fence, ...], str]:
    """The fences of `text` and the lines outside of them, as CommonMark 0.31 reads fenced code blocks.

    Line by line: a fence opens with three or more backticks or tildes after at most three spaces, and closes with a
    line of at least as many of the same and nothing else. So a line of three backticks inside a Python string closes a
    fence of three; a writer who needs such a line opens with four. Containers (quotes, lists) are not read. Line ends
    become \\n.
    """
    found, outside, opened, body, nested = [], [], None, [], False
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        match = _OPENING.fullmatch(line)
        if match and match[2][0] == "`" and "`" in match[3]:
            match = None
        if opened is None:
            if match:
                opened, body, nested = match, [], False
            else:
                outside.append(line)
            continue
        indent, marks = len(opened[1]), opened[2]
        if match and match[2].startswith(marks):
            if not match[3].strip(" \t"):
                found.append(_fence(opened, body, True, nested))
                opened = None
                continue
            nested = True
        body.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    if opened is not None:
        found.append(_fence(opened, body, False, nested))
    return tuple(found), "\n".join(outside)


def _fence(opened: re.Match, body: list[str], closed: bool, nested: bool) -> Fence:
    words = opened[3].split(None, 1)
    return Fence(opened[2][0], words[0].lower() if words else "", "\n".join(body), closed, nested)


def parse_python(source: str) -> ast.Module | None:
    """The syntax tree of `source`, or None: not text, too long, too deep, or not Python 3.11. Prints no warning."""
    if not isinstance(source, str) or len(source) > MAX_CODE or not is_unicode(source) or _too_deep(source):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source, feature_version=FEATURE_VERSION)
    except PARSER_ERRORS:
        return None
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    return None


def unparse(tree: ast.AST) -> str | None:
    """Source text of `tree`, or None where it has none of at most `MAX_CODE` characters."""
    try:
        code = ast.unparse(tree)
    except PARSER_ERRORS:
        return None
    return code if len(code) <= MAX_CODE and is_unicode(code) else None


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8 (no lone surrogates) and holds no NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _too_deep(source: str) -> bool:
    """Whether brackets nest, or operators that the parser recurses on follow each other, beyond the bounds."""
    brackets = chain = 0
    for match in _SOURCE_TOKEN.finditer(source):
        token = match[0]
        if token in "([{":
            brackets += 1
        elif token in ")]}":
            brackets = max(0, brackets - 1)
        elif token in _CHAINING:
            chain += 1
        elif token in ",;" or (token == "\n" and not brackets):
            chain = 0
        if brackets > MAX_BRACKETS or chain > MAX_CHAIN:
            return True
    return False


class BadJson(ValueError):
    """A text that is not strict JSON; `reason` is a short stable code."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def load_json(text: str):
    """The value of a JSON text, or BadJson.

    Stricter than `json.loads`: no key twice, no NaN or infinity (1e999 is one), no integer of more than 20 digits, and
    at most 8 levels. The caller bounds the length.
    """
    depth = deepest = 0
    for match in _JSON_TOKEN.finditer(text):
        depth += (match[0] in "[{") - (match[0] in "]}")
        deepest = max(deepest, depth)
    if deepest > MAX_JSON_DEPTH:
        raise BadJson("too_deep", f"{deepest} levels, at most {MAX_JSON_DEPTH}")
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_no_constant
        )
    except BadJson:
        raise
    except (ValueError, RecursionError, MemoryError) as e:
        raise BadJson("not_json", str(e)) from None


def _object(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BadJson("duplicate_key", "an object names a key twice")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise BadJson("bad_number", f"an integer of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadJson("bad_number", "a number beyond float64")
    return value


def _no_constant(name: str):
    raise BadJson("bad_number", name)
