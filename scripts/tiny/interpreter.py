"""A small interpreter for a subset of Python, so that answers can be checked without running them.

It walks the syntax tree and knows what short functions over numbers, strings, lists and dictionaries need, and nothing
else: no import, no attribute beyond the methods named here, no class. Steps, recursion and sizes are bounded.
"""

import ast
import operator
import warnings

MAX_STEPS = 4000
MAX_DEPTH = 60  # calls inside calls
MAX_BITS = 256  # of an integer
MAX_LENGTH = 2000  # of a string, list, ...


class Rejected(Exception):
    """The code is outside of the subset, fails, or goes beyond a bound."""


class _Return(Exception):
    def __init__(self, value):
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Div: operator.truediv, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
FUNCTIONS = {
    "abs": abs, "all": all, "any": any, "bool": bool, "dict": dict, "divmod": divmod, "enumerate": enumerate,
    "int": int, "len": len, "list": list, "max": max, "min": min, "range": range, "reversed": reversed, "set": set,
    "sorted": sorted, "str": str, "sum": sum, "tuple": tuple, "zip": zip,
}  # fmt: skip
METHODS = {
    str: "capitalize count endswith find isdigit isalpha islower isupper join lower replace split startswith strip "
    "swapcase title upper".split(),
    list: "append copy count extend index insert pop remove reverse sort".split(),
    dict: "copy get items keys pop setdefault update values".split(),
    set: "add discard remove".split(),
    tuple: "count index".split(),
}


class Program:
    """The functions of `source`, ready to be called. Rejected where it does not parse or holds anything else."""

    def __init__(self, source: str):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a model's text may be odd
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise Rejected(str(e)) from None
        self._functions = {}
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                raise Rejected("only functions stand at the top level")
            self._functions[node.name] = node

    def call(self, name: str, *arguments):
        """The value of the function for copies of `arguments`. Rejected for whatever goes wrong."""
        self._steps = self._depth = 0
        try:
            return self._run(name, [_copied(a) for a in arguments])
        except (Rejected, _Break, _Continue):
            raise Rejected("outside of the subset or beyond a bound") from None
        except Exception as e:  # what the code itself raises: a wrong index, a wrong type
            raise Rejected(type(e).__name__) from None

    def _run(self, name: str, arguments: list):
        function = self._functions.get(name)
        if function is None:
            raise Rejected(f"{name} is not defined")
        a = function.args
        if a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults or len(a.args) != len(arguments):
            raise Rejected("the arguments do not fit")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Rejected("too deep")
        scope = dict(zip((x.arg for x in a.args), arguments, strict=True))
        try:
            self._block(function.body, scope)
            return None
        except _Return as done:
            return done.value
        finally:
            self._depth -= 1

    def _tick(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise Rejected("too many steps")

    def _block(self, statements, scope) -> None:
        for statement in statements:
            self._tick()
            handler = getattr(self, f"_do_{type(statement).__name__}", None)
            if handler is None:
                raise Rejected(type(statement).__name__)
            handler(statement, scope)

    def _do_Return(self, s, scope):
        raise _Return(None if s.value is None else self._value(s.value, scope))

    def _do_Expr(self, s, scope):
        self._value(s.value, scope)

    def _do_Pass(self, s, scope):
        pass

    def _do_Break(self, s, scope):
        raise _Break

    def _do_Continue(self, s, scope):
        raise _Continue

    def _do_Assign(self, s, scope):
        value = self._value(s.value, scope)
        for target in s.targets:
            self._assign(target, value, scope)

    def _do_AugAssign(self, s, scope):
        if not isinstance(s.target, (ast.Name, ast.Subscript)):
            raise Rejected("target")
        load = ast.Name(s.target.id) if isinstance(s.target, ast.Name) else s.target
        value = self._operate(type(s.op), self._value(load, scope), self._value(s.value, scope))
        self._assign(s.target, value, scope)

    def _do_If(self, s, scope):
        self._block(s.body if self._value(s.test, scope) else s.orelse, scope)

    def _do_For(self, s, scope):
        for item in _bounded(self._value(s.iter, scope)):
            self._assign(s.target, item, scope)
            if self._breaks(s.body, scope):
                return
        self._block(s.orelse, scope)

    def _do_While(self, s, scope):
        while self._value(s.test, scope):
            self._tick()
            if self._breaks(s.body, scope):
                return
        self._block(s.orelse, scope)

    def _breaks(self, body, scope) -> bool:
        """One turn of a loop: whether it ended with break."""
        try:
            self._block(body, scope)
        except _Break:
            return True
        except _Continue:
            pass
        return False

    def _assign(self, target, value, scope):
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = list(value)
            if len(values) != len(target.elts):
                raise Rejected("unpacking")
            for t, v in zip(target.elts, values, strict=True):
                self._assign(t, v, scope)
        elif isinstance(target, ast.Subscript):
            self._value(target.value, scope)[self._value(target.slice, scope)] = value
        else:
            raise Rejected("target")

    def _value(self, e, scope):
        self._tick()
        handler = getattr(self, f"_see_{type(e).__name__}", None)
        if handler is None:
            raise Rejected(type(e).__name__)
        return handler(e, scope)

    def _see_Constant(self, e, scope):
        if not isinstance(e.value, (int, float, str, bool, type(None))):
            raise Rejected("constant")
        return e.value

    def _see_Name(self, e, scope):
        if e.id in scope:
            return scope[e.id]
        if e.id in FUNCTIONS:
            return FUNCTIONS[e.id]  # as a key: sorted(words, key=len)
        raise Rejected(f"{e.id} is not defined")

    def _operate(self, kind, a, b):
        if kind not in BINARY:
            raise Rejected(kind.__name__)
        if kind is ast.Pow and not (_small(a, 64) and _small(b, 5)):
            raise Rejected("power")
        if kind is ast.Mult:
            for x, y in ((a, b), (b, a)):
                if isinstance(x, (str, list, tuple)) and isinstance(y, int) and len(x) * y > MAX_LENGTH:
                    raise Rejected("too long")
        if kind is ast.Mod and not isinstance(a, (int, float)):
            raise Rejected("formatting")
        return _checked(BINARY[kind](a, b))

    def _see_BinOp(self, e, scope):
        return self._operate(type(e.op), self._value(e.left, scope), self._value(e.right, scope))

    def _see_UnaryOp(self, e, scope):
        if type(e.op) not in UNARY:
            raise Rejected("operator")
        return UNARY[type(e.op)](self._value(e.operand, scope))

    def _see_BoolOp(self, e, scope):
        wanted = isinstance(e.op, ast.Or)
        for value in e.values:
            result = self._value(value, scope)
            if bool(result) == wanted:
                break
        return result

    def _see_Compare(self, e, scope):
        left = self._value(e.left, scope)
        for kind, right in zip(e.ops, e.comparators, strict=True):
            right = self._value(right, scope)
            if not COMPARE[type(kind)](left, right):
                return False
            left = right
        return True

    def _see_IfExp(self, e, scope):
        return self._value(e.body if self._value(e.test, scope) else e.orelse, scope)

    def _see_Call(self, e, scope):
        named = {k.arg: self._value(k.value, scope) for k in e.keywords}
        if set(named) - {"key", "reverse"} or any(isinstance(a, ast.Starred) for a in e.args):
            raise Rejected("keywords")
        arguments = [self._value(a, scope) for a in e.args]
        if isinstance(e.func, ast.Attribute):
            owner = self._value(e.func.value, scope)
            if e.func.attr not in METHODS.get(type(owner), ()):
                raise Rejected(f"method {e.func.attr}")
            return _checked(getattr(owner, e.func.attr)(*arguments, **named))
        if not isinstance(e.func, ast.Name):
            raise Rejected("call")
        if e.func.id in self._functions:
            return self._run(e.func.id, arguments)
        if e.func.id not in FUNCTIONS or e.func.id in scope:
            raise Rejected(f"{e.func.id} is not defined")
        if e.func.id == "range" and len(range(*arguments)) > MAX_LENGTH:
            raise Rejected("too long")
        return _checked(FUNCTIONS[e.func.id](*arguments, **named))

    def _see_Lambda(self, e, scope):
        names = [a.arg for a in e.args.args]

        def call(*values):
            return self._value(e.body, scope | dict(zip(names, values, strict=True)))

        return call

    def _see_Subscript(self, e, scope):
        return self._value(e.value, scope)[self._value(e.slice, scope)]

    def _see_Slice(self, e, scope):
        return slice(*(None if x is None else self._value(x, scope) for x in (e.lower, e.upper, e.step)))

    def _see_List(self, e, scope):
        return [self._value(x, scope) for x in e.elts]

    def _see_Tuple(self, e, scope):
        return tuple(self._value(x, scope) for x in e.elts)

    def _see_Set(self, e, scope):
        return {self._value(x, scope) for x in e.elts}

    def _see_Dict(self, e, scope):
        if None in e.keys:
            raise Rejected("**")
        return {self._value(k, scope): self._value(v, scope) for k, v in zip(e.keys, e.values, strict=True)}

    def _each(self, generators, scope):
        first, *rest = generators
        for item in _bounded(self._value(first.iter, scope)):
            self._assign(first.target, item, scope)
            if all(self._value(c, scope) for c in first.ifs):
                if rest:
                    yield from self._each(rest, scope)
                else:
                    yield scope

    def _see_ListComp(self, e, scope):
        return [self._value(e.elt, s) for s in self._each(e.generators, dict(scope))]

    def _see_SetComp(self, e, scope):
        return set(self._see_ListComp(e, scope))

    _see_GeneratorExp = _see_ListComp

    def _see_DictComp(self, e, scope):
        return {self._value(e.key, s): self._value(e.value, s) for s in self._each(e.generators, dict(scope))}


def _copied(value):
    if isinstance(value, list):
        return [_copied(v) for v in value]
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value


def _bounded(items):
    """At most MAX_LENGTH of them: a list that grows while it is walked has no end."""
    for count, item in enumerate(items):
        if count > MAX_LENGTH:
            raise Rejected("too long")
        yield item


def _small(value, bits: int) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1 << bits


def _checked(value):
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise Rejected("too large")
    if isinstance(value, (str, list, tuple, dict, set)) and len(value) > MAX_LENGTH:
        raise Rejected("too long")
    return value
