"""What keeps an answer from working whatever it computes, by Python's symbol tables alone: nothing is run."""

import ast
import builtins
import re
import symtable
import warnings
from collections.abc import Iterator

from cz_jax.nouns import Task
from cz_jax.text.reading import PARSER_ERRORS, parse_python, unparse

_WORD = re.compile(r"\w+")


def fault(code: str, task: Task) -> str | None:
    """Why `code` cannot solve `task` whatever it computes, or None where nothing of this is found:

    - "does not compile": `ast.parse` lets it pass and the symbol tables refuse it, such as a parameter declared twice;
    - "does not define f": nothing in it binds the task's entry point, where it has one;
    - "undefined name: x": a name is read that neither the code binds anywhere in sight, nor Python brings, nor the
      task's tests mention (they may bring it). A name that only annotations hold is let be: whether it is looked up
      depends on the version of Python.

    The latter two are not looked for beside an `import *`. Never raises; code that does not parse has no fault.
    """
    tree = parse_python(code)
    plain = unparse(_Plain().visit(tree)) if tree is not None else None
    if plain is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            top = symtable.symtable(plain, "<answer>", "exec")
    except PARSER_ERRORS:
        return "does not compile"
    if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(tree)):
        return None
    read, bound = set(), set()
    for table in _tables(top):
        for symbol in table.get_symbols():
            if table is not top and not symbol.is_global():
                continue
            if symbol.is_referenced():
                read.add(symbol.get_name())
            if _binds(symbol):
                bound.add(symbol.get_name())
    if not task.is_program and task.entry_point not in bound:
        return f"does not define {task.entry_point}"
    unbound = {name for name in read - bound if not hasattr(builtins, name) and not _is_special(name)}
    if unbound and not task.is_program:
        unbound -= {word for test in task.tests if isinstance(test, str) for word in _WORD.findall(test)}
    return f"undefined name: {min(unbound)}" if unbound else None


class _Plain(ast.NodeTransformer):
    """Without annotations."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        if node.value is not None:
            return ast.copy_location(ast.Assign([node.target], node.value), node)
        node.annotation = ast.Constant(None)
        return node


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def _binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_parameter() or symbol.is_namespace()


def _is_special(name: str) -> bool:
    """`__name__` and the like, which modules and classes have."""
    return name.startswith("__") and name.endswith("__")
