"""A solver's answer: the code it holds, that code in one spelling, and what its structure shows without running it."""

import ast
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cz_jax.nouns import Task
from cz_jax.text.reading import MAX_CODE, MAX_TEXT, parse_python, read_fences, unparse

PYTHON_INFO = ("python", "py")
MAX_TEST_CALLS = 64  # calls of the entry point that are looked at
MAX_KEY_NODES = 256
_NO_EFFECT = (ast.Constant, ast.JoinedStr, ast.Tuple, ast.List)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.Match)
# What may keep a call from being made, beside those.
_DETOURS = (ast.BoolOp, ast.TryStar, ast.Assert, ast.comprehension, ast.Yield, ast.YieldFrom)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True, slots=True)
class Extraction:
    """`code`: what the one python fence holds, or None with the `problem`: "not_text", "too_long", "no_fence",
    "two_fences", "unclosed_fence", "nested_fence", "not_python" or "empty". `fences` counts fences of every kind."""

    code: str | None
    fences: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Structure:
    """Four things that hold or do not. For a program task (stdin to stdout) `defines_entry` says that it reads stdin,
    `arity_fits` that it prints."""

    parses: bool
    defines_entry: bool
    arity_fits: bool
    non_trivial: bool

    @property
    def score(self) -> float:
        """Mean of the four, 0..1."""
        return (self.parses + self.defines_entry + self.arity_fits + self.non_trivial) / 4


NO_STRUCTURE = Structure(False, False, False, False)


def extract_code(text: str) -> Extraction:
    """The code of an answer that holds exactly one fence: closed, not nested, marked python or py. Never raises.

    Fences are read line by line as CommonMark does (`reading.read_fences`): a line of three backticks inside a
    triple-quoted string closes the fence, and what follows makes the answer unclosed or two-fenced. Prose around the
    fence is allowed. A ~~~ fence counts as a fence, not as a python one.
    """
    if not isinstance(text, str):
        return Extraction(None, 0, "not_text")
    if len(text) > MAX_TEXT:
        return Extraction(None, 0, "too_long")
    fences, _ = read_fences(text)
    problem = ""
    if not fences:
        problem = "no_fence"
    elif not fences[-1].closed:
        problem = "unclosed_fence"
    elif len(fences) > 1:
        problem = "two_fences"
    elif fences[0].nested:
        problem = "nested_fence"
    elif fences[0].info not in PYTHON_INFO or fences[0].mark != "`":
        problem = "not_python"
    elif not fences[0].body.strip():
        problem = "empty"
    return Extraction(None if problem else fences[0].body, len(fences), problem)


def normalise(code: str) -> str | None:
    """`code` in one spelling, without anything that a reader sees and Python does not: comments, docstrings and other
    statements that are constants. None where it does not parse or is above the caps; "" where nothing is left.

    Meaning is kept, but for `__doc__`. Strings that the code uses stay: they are code. Never raises.
    """
    tree = parse_python(code)
    if tree is None:
        return None
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block:
                kept = [s for s in block if not (isinstance(s, ast.Expr) and _is_inert(s.value))]
                needed = field == "body" or (field == "finalbody" and not node.handlers)
                setattr(node, field, kept or ([ast.Pass()] if needed and node is not tree else []))
    return unparse(tree)


def _is_inert(node: ast.expr) -> bool:
    """Whether evaluating `node` as a statement does nothing: constants, and tuples, lists and f-strings of them."""
    return all(isinstance(n, (*_NO_EFFECT, ast.expr_context)) for n in ast.walk(node))


def structure(code: str | None, task: Task) -> Structure:
    """What can be said of `code` as an answer to `task` from its syntax tree alone. Never raises; None scores 0.

    `non_trivial` is a cheap guard against the cheapest answers (constants, tables of the test inputs, a function that
    only calls itself, copies of the tests, exits, objects equal to everything); an answer that hides better passes it,
    and is the evaluator's business.
    """
    tree = parse_python(code) if code is not None else None
    if tree is None:
        return NO_STRUCTURE
    try:
        return _program_structure(tree) if task.is_program else _function_structure(tree, task)
    except RecursionError:
        return NO_STRUCTURE


def tests_of(task: Task) -> list[ast.Module]:
    """The tests of a function task that parse, read up to `MAX_CODE` characters in all."""
    trees, length = [], 0
    for test in filter(lambda t: isinstance(t, str), task.tests):
        length += len(test)
        if length > MAX_CODE:
            break
        tree = parse_python(test)
        if tree is not None:
            trees.append(tree)
    return trees


def _is_call_of(node: ast.AST, name: str | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _function_structure(tree: ast.Module, task: Task) -> Structure:
    entry = _definition(tree, task.entry_point)
    if entry is None:
        return Structure(True, False, False, False)
    tests = [node for test in tests_of(task) for node in ast.walk(test)]
    calls = [node for node in tests if _is_call_of(node, task.entry_point)][:MAX_TEST_CALLS]
    fits = all(_fits(entry.args, call) for call in calls)
    canned = _is_canned(tree, entry, calls) or _never_returns(entry, task.entry_point)
    cheats = canned or _holds_asserts(tree, tests) or _exits(tree) or _equals_everything(tree)
    return Structure(True, True, fits, not cheats)


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.Lambda | None:
    """The last top-level `def name` or `name = lambda`."""
    found = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            found = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                found = node.value
    return found


def _fits(signature: ast.arguments, call: ast.Call) -> bool:
    """Whether `call` binds to `signature`. What *x and **x of the call bring is taken to fit."""
    named = [a.arg for a in signature.args]
    positional = [a.arg for a in signature.posonlyargs] + named
    unknown = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
    given = [a for a in call.args if not isinstance(a, ast.Starred)]
    keywords = {k.arg for k in call.keywords if k.arg is not None}
    if len(given) > len(positional) and not signature.vararg:
        return False
    by_position = set(positional[: len(given)]) & set(named)
    keyword_only = {a.arg for a in signature.kwonlyargs}
    if keywords & by_position or (keywords - set(named) - keyword_only and not signature.kwarg):
        return False
    if unknown:
        return True
    required = positional[len(given) : len(positional) - len(signature.defaults)]
    required += [a.arg for a, d in zip(signature.kwonlyargs, signature.kw_defaults, strict=True) if d is None]
    position_only = {a.arg for a in signature.posonlyargs}
    return not (set(required) & position_only) and set(required) <= keywords


def _is_constant(node: ast.AST | None) -> bool:
    """Whether `node` is written out in full: constants, signs, and tuples, lists, sets and dicts of them."""
    allowed = (*_NO_EFFECT, ast.Set, ast.Dict, ast.UnaryOp, ast.unaryop, ast.expr_context)
    return node is None or all(isinstance(n, allowed) for n in ast.walk(node))


def _own_nodes(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """`nodes` and what lies in them, not entering functions and classes defined there."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            stack.extend(ast.iter_child_nodes(node))


class _Constants:
    """Names that a whole source binds once, and that to a constant."""

    def __init__(self, tree: ast.Module):
        bound, values = Counter(), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                bound[node.id] += 1
            elif isinstance(node, ast.arg):
                bound[node.arg] += 1
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _is_constant(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                values.update({t.id: node.value for t in targets if isinstance(t, ast.Name)})
        self.values = {name: value for name, value in values.items() if bound[name] == 1}
        self._fixed = {}

    def fixed(self, node: ast.expr | None) -> str | None:
        """The dump of the one value that `node` always has, where it is a constant or the name of an immutable one."""
        if not isinstance(node, ast.Name):
            return ast.dump(node or ast.Constant(None)) if _is_constant(node) else None
        if node.id not in self._fixed:
            value = self.values.get(node.id, node)
            mutable = any(isinstance(n, (ast.List, ast.Set, ast.Dict)) for n in ast.walk(value))
            self._fixed[node.id] = None if mutable else self.fixed(value) if value is not node else None
        return self._fixed[node.id]


def _is_canned(tree: ast.Module, entry: ast.FunctionDef | ast.Lambda, calls: Sequence[ast.Call]) -> bool:
    """Whether the entry point gives one constant whatever happens, or looks the test inputs up in what it was told."""
    body = [ast.Return(entry.body)] if isinstance(entry, ast.Lambda) else entry.body
    nodes = list(_own_nodes(body))
    if any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in nodes):
        return False
    names = _Constants(tree)
    given = {names.fixed(n.value) for n in nodes if isinstance(n, ast.Return)}
    if not isinstance(body[-1], ast.Return):
        given.add(ast.dump(ast.Constant(None)))  # what falling off the end gives
    if len(given) == 1 and None not in given:
        return True
    told = _Told(names.values, calls)
    return all(told.statement(n) for n in nodes if isinstance(n, ast.stmt)) and told.covers_tests


class _Told:
    """Recognises statements that do nothing but look up test inputs, and notes which inputs they ask for."""

    def __init__(self, names: dict[str, ast.expr], calls: Sequence[ast.Call]):
        self.names, self.inputs, self.asked, self.tables = names, set(), set(), {}
        for call in calls:
            arguments = [*call.args, *(k.value for k in call.keywords)]
            self.inputs |= {_key(a) for a in arguments} | {_key(ast.Tuple(arguments, ast.Load()))}
        self.inputs.discard(None)
        self.needed = max(2, len({_key(call) for call in calls}) - 1)

    @property
    def covers_tests(self) -> bool:
        """Two inputs or more, and all calls but the one that the last line may answer: fewer is an honest base case."""
        return len(self.asked) >= self.needed

    def statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Return() | ast.Expr():
                return self.value(node.value)
            case ast.Assign() | ast.AnnAssign():
                return _is_constant(node.value)
            case ast.If():
                return self.condition(node.test)
            case ast.Match():
                parts = [n for c in node.cases for n in ast.walk(c.pattern)]
                values = [n.value for n in parts if isinstance(n, ast.MatchValue)]
                return all(c.guard is None for c in node.cases) and all(self.is_input(v) for v in values)
        return isinstance(node, (ast.Pass, ast.Raise))

    def value(self, node: ast.expr | None) -> bool:
        """A constant, or one picked from a table whose keys are all test inputs."""
        if _is_constant(node) or (isinstance(node, ast.Name) and node.id in self.names):
            return True
        if isinstance(node, ast.IfExp):
            return self.condition(node.test) and self.value(node.body) and self.value(node.orelse)
        if isinstance(node, ast.Subscript):
            return self.table(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            return self.table(node.func.value)
        return False

    def table(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            node = self.names.get(node.id, node)
        if id(node) not in self.tables:
            told = isinstance(node, ast.Dict) and _is_constant(node) and all(self.is_input(key) for key in node.keys)
            self.tables[id(node)] = told
        return self.tables[id(node)]

    def condition(self, test: ast.expr) -> bool:
        """Constant, or comparisons of names with test inputs."""
        if _is_constant(test):
            return True
        if isinstance(test, ast.BoolOp):
            return all(self.condition(v) for v in test.values)
        if not isinstance(test, ast.Compare) or not all(isinstance(o, (ast.Eq, ast.Is, ast.In)) for o in test.ops):
            return False
        sides = [s for s in (test.left, *test.comparators) if not _is_names(s)]
        return bool(sides) and all(self.is_input(s) or self.are_inputs(s) for s in sides)

    def are_inputs(self, node: ast.expr) -> bool:
        choices = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else ()
        return bool(choices) and all(self.is_input(c) for c in choices)

    def is_input(self, node: ast.expr | None) -> bool:
        key = _key(node) if node is not None else None
        if key in self.inputs:
            self.asked.add(key)
        return key in self.inputs


def _key(node: ast.AST) -> str | None:
    """What tells one expression from another; None for one of more than `MAX_KEY_NODES` nodes."""
    size = sum(1 for _ in itertools.islice(ast.walk(node), MAX_KEY_NODES + 1))
    return ast.dump(node) if size <= MAX_KEY_NODES else None


def _is_names(node: ast.expr) -> bool:
    """A name, or a tuple or list of names."""
    elements = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    return bool(elements) and all(isinstance(e, ast.Name) for e in elements)


def _never_returns(entry: ast.FunctionDef | ast.Lambda, name: str) -> bool:
    """Whether the entry point calls itself on the straight way to its first return: a recursion without an end, which
    solvers fall into because it looks like an answer."""
    body = [ast.Return(entry.body)] if isinstance(entry, ast.Lambda) else entry.body
    ends = next((i for i, s in enumerate(body) if isinstance(s, (ast.Return, ast.Raise))), len(body))
    nodes = list(_own_nodes(body[: ends + 1]))
    return not any(isinstance(n, (*_BRANCHES, *_DETOURS)) for n in nodes) and any(_is_call_of(n, name) for n in nodes)


def _holds_asserts(tree: ast.Module, tests: Sequence[ast.AST]) -> bool:
    wanted = {ast.dump(n.test) for n in tests if isinstance(n, ast.Assert)}
    return any(isinstance(n, ast.Assert) and ast.dump(n.test) in wanted for n in ast.walk(tree))


def _exits(tree: ast.Module) -> bool:
    """exit(), quit(), sys.exit(), os._exit() or SystemExit anywhere: a function that is asked for has no use for it."""
    nodes = list(ast.walk(tree))
    aliases = [a for n in nodes if isinstance(n, ast.Import) for a in n.names]
    owners = {"sys", "os"} | {a.asname for a in aliases if a.asname and a.name in ("sys", "os")}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == "SystemExit":
            return True
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("exit", "quit", "_exit"):
            return True
        if isinstance(called, ast.Attribute) and called.attr in ("exit", "_exit", "abort"):
            if isinstance(called.value, ast.Name) and called.value.id in owners:
                return True
    return False


def _equals_everything(tree: ast.Module) -> bool:
    """An __eq__ or __ne__ that gives one constant, and so makes any assert true."""
    nodes = list(ast.walk(tree))
    spoken = any(
        name in ("__eq__", "__ne__") for n in nodes for name in (getattr(n, a, None) for a in ("id", "attr", "value"))
    )
    if spoken and any(isinstance(n, ast.Lambda) and _is_constant(n.body) for n in nodes):
        return True
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name in ("__eq__", "__ne__"):
            returns = [n.value for n in _own_nodes(node.body) if isinstance(n, ast.Return)]
            if all(_is_constant(r) for r in returns) and len({ast.dump(r or ast.Constant(None)) for r in returns}) <= 1:
                return True
    return False


def _program_structure(tree: ast.Module) -> Structure:
    nodes = list(ast.walk(tree))
    reads = any(_reads_stdin(n) for n in nodes)
    writers = [n for n in nodes if _is_stdout(n) or _is_call_of(n, "print")]
    return Structure(True, reads, bool(writers), bool(writers) and not _prints_constants(tree))


def _is_stream(node: ast.AST, name: str) -> bool:
    """`sys.NAME`, or NAME alone as after `from sys import NAME`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id == "sys" and node.attr == name
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _is_stdout(node: ast.AST) -> bool:
    return _is_stream(node, "stdout")


def _reads_stdin(node: ast.AST) -> bool:
    """input(), sys.stdin, open(0), os.read(0, n), os.fdopen(0)."""
    if _is_call_of(node, "input") or _is_stream(node, "stdin"):
        return True
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return False
    name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
    return name in ("open", "read", "fdopen") and node.args[0].value in (0, "/dev/stdin")


def _prints_constants(tree: ast.Module) -> bool:
    """Whether every print stands outside of branches and loops and prints constants."""
    names = _Constants(tree)
    stack = [(tree, False)]
    while stack:
        node, branched = stack.pop()
        if _is_call_of(node, "print") or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("write", "writelines")
            and _is_stdout(node.func.value)
        ):
            if branched or any(names.fixed(a) is None for a in node.args):
                return False
            continue
        if _is_stdout(node):
            return False  # handed on under another name: what it writes is not seen here
        branched = branched or (isinstance(node, _BRANCHES) and not _is_constant(getattr(node, "test", node)))
        stack.extend((child, branched) for child in ast.iter_child_nodes(node))
    return True
