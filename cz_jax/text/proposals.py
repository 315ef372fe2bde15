"""A proposer's text -> a `Task`, or the reason why not; and a memory against near-copies of earlier questions."""

import ast
import builtins
import re
import unicodedata
from collections import deque
from collections.abc import Sequence

from cz_jax.nouns import Level, Task
from cz_jax.text.reading import MAX_TEXT, BadJson, is_unicode, load_json, parse_python, read_fences, unparse

MAX_QUESTION = 4000  # characters
MAX_TEST = 1000
MAX_TESTS = 4
MAX_ENTRY_POINT = 64
SHINGLE = 2  # words that stand side by side

_BUILTINS = frozenset(dir(builtins))
_FORBIDDEN_CALLS = frozenset(
    "exec eval compile open input __import__ globals locals vars getattr setattr delattr breakpoint exit quit".split()
)
_FORBIDDEN_MODULES = frozenset("os sys subprocess socket builtins importlib shutil ctypes pathlib pickle".split())
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.NamedExpr)
_NEVER = (*_DEFINITIONS, ast.Await, ast.Yield, ast.YieldFrom)
_SAME = (ast.Eq, ast.LtE, ast.GtE, ast.Is, ast.In)
_DIFFERENT = (ast.NotEq, ast.Lt, ast.Gt, ast.IsNot, ast.NotIn)
_DISPLAYS = (ast.Tuple, ast.List, ast.Set)

# Words that speak to whoever judges the answer, not to whoever writes it.
_ORDERS = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?think>|\[/?inst\]|<</?sys>>|is_correct|system prompt|"
    r"\b(?:ignore|disregard|forget|override) (?:\w+ ){0,5}(?:instruction|prompt|direction|guideline)s?\b|"
    r"\byou (?:must|should|have to|are to|will) (?:always )?(?:judge|grade|mark|rate|accept|approve)\b|"
    r"\b(?:judge|grade|mark|rate|accept|approve|consider|treat) (?:\w+ ){0,2}(?:answer|solution|response|submission)s? "
    r"(?:as |is |to be )?(?:correct|right|true|valid|passed|passing)\b|"
    r"\b(?:evaluator|grader|dear judge|note to (?:the )?judge)\b|"
    r"\b(?:answer|solution|response|submission)s? (?:is|are) (?:always|surely|already) (?:correct|right)\b"
)


class Refused(ValueError):
    """A proposal that is no task. `reason`: a short stable snake_case code, fit to be counted; `detail`: what was
    found."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


def parse_proposal(text: str, level: int, allowed_imports: Sequence[str]) -> Task:
    """The task of a proposal of `level`; raises Refused, and nothing else, whatever `text` is.

    Asked for: exactly one ```json fence, closed, with prose around it or none; in it an object with exactly `question`
    (a text of at most 4,000 characters that names the function, without a solution) and `tests` (1 to 4 texts of at
    most 1,000 characters). A test is one assert, after imports of `allowed_imports` if need be, that calls the
    function. The function is the one name that all tests call and that nothing else defines. Comments in tests are
    dropped. ValueError for a level that is none.
    """
    level = int(Level(level))
    question, tests = _read(text)
    if "```" in question or read_fences(question)[0]:
        raise Refused("fence_in_question")
    allowed = frozenset(allowed_imports)
    parsed = [_read_test(test, allowed) for test in tests]
    entry_point = _entry_point([called for _, called, _ in parsed])
    for tree, _, unbound in parsed:
        if unbound - {entry_point}:
            raise Refused("undefined_name", ", ".join(sorted(unbound - {entry_point}))[:200])
        if _always_true(tree.body[-1].test, entry_point):
            raise Refused("trivial_test", ast.unparse(tree)[:200])
    if not re.search(rf"(?<!\w){re.escape(entry_point)}(?!\w)", question):
        raise Refused("entry_point_not_in_question", entry_point)
    if re.search(rf"\bdef\s+{entry_point}\b|\b{entry_point}\s*=\s*lambda\b", question):
        raise Refused("solution_in_question", entry_point)
    kept = [_without_comments(test, tree) for test, (tree, _, _) in zip(tests, parsed, strict=True)]
    return Task("proposer", question, tuple(kept), entry_point, level)


def _read(text: str) -> tuple[str, list[str]]:
    """`question` and `tests` with their types, sizes and characters checked."""
    if not isinstance(text, str):
        raise Refused("not_text", type(text).__name__)
    if len(text) > MAX_TEXT:
        raise Refused("too_long", f"{len(text)} characters, at most {MAX_TEXT}")
    fences, _ = read_fences(text)
    if len(fences) != 1:
        raise Refused("two_fences" if fences else "no_fence", f"{len(fences)} fences")
    fence = fences[0]
    if not fence.closed or fence.nested:
        raise Refused("nested_fence" if fence.nested else "unclosed_fence")
    if (fence.mark, fence.info) != ("`", "json"):
        raise Refused("not_a_json_fence", fence.info[:40])
    try:
        value = load_json(fence.body.strip())
    except BadJson as e:
        raise Refused(e.reason, e.detail) from None
    if not isinstance(value, dict):
        raise Refused("not_an_object", type(value).__name__)
    if set(value) != {"question", "tests"}:
        raise Refused("wrong_keys", ", ".join(sorted(value))[:200])
    question, tests = value["question"], value["tests"]
    if not isinstance(question, str) or not question.strip():
        raise Refused("no_question")
    if len(question) > MAX_QUESTION:
        raise Refused("question_too_long", f"{len(question)} characters, at most {MAX_QUESTION}")
    if not isinstance(tests, list) or not 1 <= len(tests) <= MAX_TESTS:
        raise Refused("wrong_number_of_tests", f"1 to {MAX_TESTS} texts are wanted")
    for test in tests:
        if not isinstance(test, str) or not test.strip():
            raise Refused("test_not_text")
        if len(test) > MAX_TEST:
            raise Refused("test_too_long", f"{len(test)} characters, at most {MAX_TEST}")
    for part in (question, *tests):
        if not is_unicode(part) or any(unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\r\t" for c in part):
            raise Refused("bad_characters", "control characters or lone surrogates")
        if _ORDERS.search(" ".join(unicodedata.normalize("NFKC", part).casefold().split())):
            raise Refused("orders_to_evaluator")
    return question.strip(), [test.strip() for test in tests]


def _read_test(test: str, allowed: frozenset[str]) -> tuple[ast.Module, set[str], set[str]]:
    """(tree, names that the assert calls and that are neither builtin nor bound in the test, all such names)."""
    tree = parse_python(test)
    if tree is None:
        raise Refused("test_does_not_parse")
    nodes = list(ast.walk(tree))
    if any(isinstance(n, _NEVER) for n in nodes):
        raise Refused("definition_in_test")
    *imports, last = tree.body or [None]
    if not isinstance(last, ast.Assert):
        raise Refused("no_assert" if not any(isinstance(n, ast.Assert) for n in nodes) else "more_than_an_assert")
    if not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in imports):
        raise Refused("more_than_an_assert")
    bound = {name for node in imports for name in _imported(node, allowed)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and (node.attr.startswith("_") or node.attr in _FORBIDDEN_MODULES):
            raise Refused("forbidden_attribute", node.attr[:40])
        if isinstance(node, ast.Name) and (node.id.startswith("__") or node.id in _FORBIDDEN_CALLS):
            raise Refused("forbidden_name", node.id[:40])
    names = [n for n in nodes if isinstance(n, ast.Name)]
    bound |= {n.id for n in names if isinstance(n.ctx, ast.Store)} | _BUILTINS
    called = {n.func.id for n in ast.walk(last.test) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return tree, called - bound, {n.id for n in names} - bound


def _imported(node: ast.Import | ast.ImportFrom, allowed: frozenset[str]) -> list[str]:
    """The names that an import binds, all of it from the allow-list."""
    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    relative = isinstance(node, ast.ImportFrom) and node.level
    for module in modules:
        if relative or module.split(".")[0] not in allowed:
            raise Refused("forbidden_import", module[:40])
    bound = []
    for alias in node.names:
        parts = alias.name.split(".")
        if any(p == "*" or p.startswith("_") or p in _FORBIDDEN_MODULES | _FORBIDDEN_CALLS for p in parts):
            raise Refused("forbidden_import", alias.name[:40])
        bound.append(alias.asname or parts[0])
    return bound


def _entry_point(called: list[set[str]]) -> str:
    common = set.intersection(*called)
    if len(common) != 1:
        raise Refused("ambiguous_entry_point" if common else "no_entry_point", ", ".join(sorted(common))[:200])
    name = common.pop()
    if not name.isascii() or len(name) > MAX_ENTRY_POINT:
        raise Refused("bad_entry_point", name[:80])
    return name


def _always_true(node: ast.expr, entry: str) -> bool:
    """Whether an asserted expression holds whatever the entry point returns, as far as its shape tells."""
    match node:
        case ast.BoolOp(op=ast.Or()):
            return any(_always_true(v, entry) for v in node.values)
        case ast.BoolOp():
            return all(_always_true(v, entry) or not _calls(v, entry) for v in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return _always_false(node.operand, entry)
        case ast.IfExp(test=ast.Constant()):
            return _always_true(node.body if node.test.value else node.orelse, entry)
        case ast.IfExp():
            return _always_true(node.body, entry) and _always_true(node.orelse, entry)
        case ast.Compare():
            return not _calls(node, entry) or all(_with_itself(node, _SAME))
        case ast.Call(func=ast.Name(id="bool"), args=[argument]):
            return _always_true(argument, entry)
        case ast.Call(func=ast.Name(id="isinstance"), args=[_, ast.Name(id="object")]):
            return True
        case ast.Constant():
            return bool(node.value)
        case ast.Tuple() | ast.List() | ast.Set():
            return any(not isinstance(e, ast.Starred) for e in node.elts)
        case ast.Dict():
            return any(key is not None for key in node.keys)
    return False


def _always_false(node: ast.expr, entry: str) -> bool:
    match node:
        case ast.Compare():
            return any(_with_itself(node, _DIFFERENT))
        case ast.UnaryOp(op=ast.Not()):
            return _always_true(node.operand, entry)
        case ast.Constant():
            return not node.value
    return False


def _with_itself(node: ast.Compare, operators: tuple[type, ...]) -> list[bool]:
    """For each operator: is it one of `operators`, with one and the same expression on both sides (`in`: on the left
    and among what is written out on the right)?"""
    found, left = [], node.left
    for operator, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(operator, (ast.In, ast.NotIn)):
            choices = [ast.dump(e) for e in right.elts] if isinstance(right, _DISPLAYS) else []
        else:
            choices = [ast.dump(right)]
        found.append(isinstance(operator, operators) and ast.dump(left) in choices)
        left = right
    return found


def _calls(node: ast.expr, entry: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == entry for n in ast.walk(node))


def _without_comments(test: str, tree: ast.Module) -> str:
    if "#" not in test:
        return test
    clean = unparse(tree)
    if clean is None:
        raise Refused("test_does_not_parse")
    return clean


_WORD = re.compile(r"`[^`\n]*`|\d+(?:[.,]\d+)*|[^\W\d]\w*")
_IDENTIFIER = re.compile(r"`.*`|.*[_\d].*|[^A-Z]+[A-Z].*", re.DOTALL)
_NAMING = frozenset(["named", "called", "function", "def"])


def _shingles(question: str) -> frozenset[tuple[str, ...]]:
    """Runs of `SHINGLE` words, lower case, numerals and identifiers folded to one word each.

    An identifier is a word in backticks, with an underscore, a digit or an inner capital, before "(", or after "named",
    "called".
    """
    question = unicodedata.normalize("NFKC", question[:MAX_QUESTION])
    words = []
    for match in _WORD.finditer(question):
        word = match[0]
        before = words[-1] if words else ""
        if word[0].isdigit():
            words.append("0")
        elif _IDENTIFIER.fullmatch(word) or question[match.end() : match.end() + 1] == "(" or before in _NAMING:
            words.append("x")
        else:
            words.append(word.casefold())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


class NearCopies:
    """The last `capacity` questions, and whether a new one is a near-copy of one of them: the Jaccard similarity of
    their folded word pairs is at least `threshold`. Time per question is O(capacity)."""

    def __init__(self, capacity: int, threshold: float):
        self.threshold = threshold
        self._seen = deque(maxlen=capacity)

    def is_copy(self, question: str) -> bool:
        new = _shingles(question)
        return any(_similar(new, old, self.threshold) for _, old in reversed(self._seen))

    def add(self, question: str) -> None:
        self._seen.append((question, _shingles(question)))

    def state(self) -> list[str]:
        """The remembered questions, oldest first; `restore` continues from them."""
        return [question for question, _ in self._seen]

    def restore(self, questions: Sequence[str]) -> None:
        if not all(isinstance(q, str) for q in questions):
            raise ValueError("the remembered questions are a list of texts")
        self._seen.clear()
        self._seen.extend((q, _shingles(q)) for q in questions)


def _similar(a: frozenset, b: frozenset, threshold: float) -> bool:
    small, large = sorted((len(a), len(b)))
    if small < threshold * large:
        return False
    common = len(a & b)
    return common >= threshold * (len(a) + len(b) - common)
