"""What no evaluator needs to be asked about: code that Python refuses, and names that nothing binds."""

import json

import pytest

from cz_jax.nouns import Task
from cz_jax.text.names import fault

TASK = Task("mbpp", "Write f.", ("assert f(Node(1)) == 3",), "f", 1)
PROGRAM = Task("code_contests", "Read n, print n + 1.", ('{"input":"1\\n","output":"2\\n"}',), None, 2)


@pytest.mark.parametrize(
    "code, why",
    [
        ("def f(a, a):\n    return a", "does not compile"),
        ("def f(a):\n    nonlocal a\n    return a", "does not compile"),
        ("def f(a):\n    return a\nglobal f\nnonlocal x", "does not compile"),
        ("def g(a):\n    return a", "does not define f"),
        ("class A:\n    def f(a):\n        return a", "does not define f"),
        ("def f(a):\n    return b", "undefined name: b"),
        ("def f(a):\n    return math.sqrt(a)", "undefined name: math"),
        ("def f(a):\n    def g(b):\n        return b\n    return g(a) + b", "undefined name: b"),
        ("def f(a):\n    return [k for k in s for s in a]", "undefined name: s"),
        ("class A:\n    y = 1\n    def g(self):\n        return y\nf = A.g", "undefined name: y"),
        ("f = lambda a: a + c\nd = c", "undefined name: c"),
    ],
)
def test_a_fault_is_told(code, why):
    assert fault(code, TASK) == why


@pytest.mark.parametrize(
    "code",
    [
        "def f(a):\n    return a",
        "f = lambda a: a",
        "from functools import cache as f",
        "class f:\n    pass",
        "def f(a):\n    return Node(a)",  # the tests know it
        "def f(a):\n    return f(a - 1) + g(a)\ndef g(a):\n    return len(a) if a else __name__",
        "def f(a: List[int]) -> Dict[str, int]:\n    b: Set[int] = a\n    c: Any\n    return b",
        "def f(a):\n    global c\n    c = a\ndef g():\n    return c",
        "import numpy as np\nfrom os import path\ndef f(a):\n    return np, path",
        "import os.path\ndef f(a):\n    return os.path",
        "try:\n    import q\nexcept ImportError as e:\n    print(e)\ndef f(a):\n    return q",
        "def f(*a, b=1, **c):\n    return [a + b + i for i in c if (d := i)] + [d]",
        "def f(a):\n    match a:\n        case [b, *c] | {'x': b, **c}:\n            return b, c",
        "def f(a):\n    with open(a) as b:\n        for c, (d, *e) in b:\n            return c, d, e",
        "from math import *\ndef f(a):\n    return sqrt(a)",
        "from solution import *",
        "def f(a):\n    b += 1\n    del a\n    return b",  # fails, but not for want of a binding in sight
        "class A:\n    x = 1\n    y = x\n    def g(self):\n        return __class__, super()\nf = A",
        "def f(a):\n    return a for",  # does not parse: told elsewhere
    ],
)  # fmt: skip
def test_what_may_work_has_no_fault(code):
    assert fault(code, TASK) is None


def test_a_program_defines_nothing():
    assert fault("print(int(input()) + 1)", PROGRAM) is None
    assert fault("print(n + 1)", PROGRAM) == "undefined name: n"


@pytest.mark.parametrize(
    "code", ["", "x" * 70000, "(" * 300, "def f(a):\n    return " + "-" * 199 + "a", "\0", "\ud800"]
)
def test_no_text_raises(code):
    fault(code, TASK)


def test_no_right_answer_of_the_labelled_pairs_has_a_fault(shared):
    rows = [json.loads(line) for line in (shared / "data/judge_pairs/mbpp_train.jsonl").open()]
    faults = {0: [], 1: []}
    for row in rows:
        tests = (row["test_setup_code"], *row["test_imports"], *row["test_list"])
        why = fault(row["solution"], Task("mbpp", row["prompt"], tests, row["entry_point"], 1))
        faults[row["label"]] += [why] if why else []
    assert not faults[1] and len(faults[0]) >= 5
