"""Wrong answers made from right ones: one systematic slip each, kept where the interpreter finds another result."""

import ast
import copy
import random
from collections.abc import Iterator

from cz_jax.text.answers import normalise
from tiny.families import Item
from tiny.parts import ARGUMENTS, LETTERS, NOUNS, VERBS

OPERATORS = {
    ast.Add: (ast.Sub, ast.Mult), ast.Sub: (ast.Add,), ast.Mult: (ast.Add,), ast.FloorDiv: (ast.Mod, ast.Mult),
    ast.Mod: (ast.FloorDiv, ast.Mult), ast.Pow: (ast.Mult, ast.Add),
}  # fmt: skip
COMPARISONS = {
    ast.Gt: (ast.Lt, ast.GtE), ast.Lt: (ast.Gt, ast.LtE), ast.GtE: (ast.Gt, ast.LtE), ast.LtE: (ast.Lt, ast.GtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
CALLS = {
    "sum": ("max", "len", "min"), "max": ("min", "sum"), "min": ("max", "sum"), "len": ("sum", "max"),
    "any": ("all",), "all": ("any",), "sorted": ("list", "set"), "abs": ("int",), "list": ("set",), "set": ("list",),
}  # fmt: skip
METHODS = {
    "upper": ("lower", "capitalize"), "capitalize": ("upper", "lower"), "startswith": ("endswith",),
    "endswith": ("startswith",), "items": ("keys",), "values": ("keys",), "append": ("extend",), "count": ("find",),
}  # fmt: skip


def wrong_bodies(
    item: Item, rng: random.Random, count: int, others: tuple[Item, ...] = (), slips: tuple | None = None
) -> list[str]:
    """At most `count` different wrong answers to the item: `slips` (None: SLIPS) in its right bodies, as far as there
    are any, and right bodies of `others` under this item's names."""
    found: list[str] = []
    for _ in range(8 * count):
        if len(found) == count:
            break
        if others and rng.random() < 0.15:
            code = _borrowed(item, rng.choice(others), rng)
        else:
            code = _slip(rng.choice(item.right), item, rng, slips or SLIPS)
        if code is not None and code not in found and code not in item.right and not item.solved_by(code):
            found.append(code)
    return found


def _slip(code: str, item: Item, rng: random.Random, slips: tuple) -> str | None:
    tree = ast.parse(code)
    kinds = rng.sample(slips, len(slips))
    for kind in kinds:
        edits = list(kind(tree, item, rng))
        if edits:
            path, new = rng.choice(edits)
            return normalise(ast.unparse(ast.fix_missing_locations(_replaced(tree, path, new))))
    return None


def _replaced(tree: ast.AST, old: ast.AST, new: ast.AST | list | None) -> ast.AST:
    """A copy of `tree` with the node `old` (told by identity) replaced; a list or None stands for statements."""

    class Put(ast.NodeTransformer):
        def visit(self, node):
            if node is old:
                return copy.deepcopy(new)
            return self.generic_visit(node)

    memo: dict = {}
    twin = copy.deepcopy(tree, memo)
    old = memo[id(old)]
    return Put().visit(twin)


Edits = Iterator[tuple[ast.AST, ast.AST | list | None]]


def _changed(node: ast.AST, **fields) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _operators(tree, item, rng) -> Edits:
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.AugAssign)):
            for other in OPERATORS.get(type(node.op), ()):
                yield node, _changed(node, op=other())


def _comparisons(tree, item, rng) -> Edits:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            for other in COMPARISONS.get(type(node.ops[0]), ()):
                yield node, _changed(node, ops=[other()])


def _constants(tree, item, rng) -> Edits:
    """Another number or letter; off by one more often than not."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or isinstance(node.value, bool):
            continue
        if isinstance(node.value, int):
            yield node, ast.Constant(node.value + rng.choice((1, -1) if node.value > 0 else (1,)))
            yield node, ast.Constant(rng.randint(0, 9))
        elif isinstance(node.value, str) and len(node.value) == 1 and node.value.isalpha():
            yield node, ast.Constant(rng.choice(LETTERS))


def _calls(tree, item, rng) -> Edits:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for other in CALLS.get(node.func.id, ()):
                yield node.func, ast.Name(other, ast.Load())
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            for other in METHODS.get(node.func.attr, ()):
                yield node.func, _changed(node.func, attr=other)


def _conditions(tree, item, rng) -> Edits:
    """A condition left out, negated, or with its branches swapped."""
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension) and node.ifs:
            yield node, _changed(node, ifs=[])
            yield node, _changed(node, ifs=[ast.UnaryOp(ast.Not(), node.ifs[0])])
        elif isinstance(node, ast.IfExp):
            yield node, _changed(node, body=node.orelse, orelse=node.body)
            yield node, node.body
        elif isinstance(node, ast.If) and not isinstance(node.body[0], ast.Return):
            yield node, node.body
        elif isinstance(node, ast.BoolOp):
            yield node, _changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
            yield node, rng.choice(node.values)


def _unwrapped(tree, item, rng) -> Edits:
    """A call or an operation left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.func, ast.Name):
            if node.func.id in CALLS:
                yield node, node.args[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr != "append":
            yield node, node.func.value
        elif isinstance(node, ast.BinOp):
            yield node, node.left
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            yield node, node.value
        elif isinstance(node, ast.UnaryOp):
            yield node, node.operand


def _names(tree, item, rng) -> Edits:
    """Another variable of the function."""
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = sorted(bound | set(item.parameters))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            for other in names:
                if other != node.id:
                    yield node, ast.Name(other, ast.Load())


def _strangers(tree, item, rng) -> Edits:
    """A variable, or a parameter where it is declared, under a name that the function does not have."""
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = bound | set(item.parameters)
    strangers = sorted({name for of in ARGUMENTS.values() for name in of} - names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            yield node, ast.Name(rng.choice(strangers), ast.Load())
        elif isinstance(node, ast.arg):
            yield node, ast.arg(rng.choice(strangers))


def _slices(tree, item, rng) -> Edits:
    for node in ast.walk(tree):
        if isinstance(node, ast.Slice):
            yield node, ast.Slice(node.upper, node.lower, node.step)
            if node.step is not None:
                yield node, ast.Slice(node.lower, node.upper, None)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Constant, ast.UnaryOp)):
            other = 0 if isinstance(node.slice, ast.UnaryOp) else -1
            yield node, _changed(node, slice=ast.Constant(other))


def _orders(tree, item, rng) -> Edits:
    """Two operands or two statements in the other order."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            yield node, _changed(node, left=node.right, right=node.left)
        elif isinstance(node, (ast.For, ast.While)) and len(node.body) == 2:
            yield node, _changed(node, body=node.body[::-1])
        elif isinstance(node, ast.keyword) and node.arg == "reverse":
            yield node, ast.keyword("reverse", ast.Constant(False))


def _statements(tree, item, rng) -> Edits:
    """A return too early or missing, a statement left out."""
    body = tree.body[0].body
    for node in body:
        if isinstance(node, (ast.For, ast.While)):
            yield node, _changed(node, body=[*node.body, body[-1]])
    if isinstance(body[-1], ast.Return) and rng.random() < 0.3:
        yield body[-1], ast.Expr(body[-1].value)
    if len(body) > 2:
        yield body[0], None


def _entry(tree, item, rng) -> Edits:
    """The function under another name."""
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    if rng.random() < 0.3:
        yield tree.body[0], _changed(tree.body[0], name=name)


def _borrowed(item: Item, other: Item, rng: random.Random) -> str | None:
    """A right body of another task, with this task's function and argument names."""
    if len(other.parameters) != len(item.parameters):
        return None
    names = {other.task.entry_point: item.task.entry_point, **dict(zip(other.parameters, item.parameters, strict=True))}
    tree = ast.parse(rng.choice(other.right))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            node.id = names[node.id]
        elif isinstance(node, ast.arg) and node.arg in names:
            node.arg = names[node.arg]
        elif isinstance(node, ast.FunctionDef):
            node.name = names[node.name]
    return normalise(ast.unparse(tree))


SLIPS = (
    _operators, _comparisons, _constants, _constants, _calls, _conditions, _unwrapped, _names, _slices, _orders,
    _statements, _entry,
)  # fmt: skip
NEAR_SLIPS = (_operators, _comparisons, _constants, _constants, _calls, _names, _entry)
NAME_SLIPS = (*NEAR_SLIPS, _strangers, _strangers, _strangers, _strangers)
