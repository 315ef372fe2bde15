"""Task sources: what a row becomes, what is left out and why, and what the user is told."""

import collections
import gzip
import json
import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cz_jax.errors import TaskError
from cz_jax.nouns import Task, canonical_json
from cz_jax.tasks import held_out_keys, load_tasks, question_key
from cz_jax.tasks.rows import BadRow, code_contests_task, entry_point_of, file_task, mbpp_task, read_json_row
from cz_jax.text.reading import parse_python

MBPP = {"text": "Write a function to add.", "code": "def add(a, b):\r\n  return a + b", "task_id": 1,
        "test_setup_code": "", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        "challenge_test_list": []}  # fmt: skip
FILE = {"question": "Add f.", "tests": ["assert f(1) == 2"], "entry_point": "f", "level": 1}
PROGRAM = FILE | {"entry_point": None, "tests": [{"input": "a", "output": "a"}]}
CONTEST = {"name": "x", "description": "Read a number and print it.", "difficulty": 8, "cf_rating": 0,
           "public_tests": {"input": ["1\n"], "output": ["1\n"]},
           "generated_tests": {"input": ["2\n", "3\n", "4\n", "5\n"], "output": ["2\n", "3\n", "4\n", "5\n"]},
           "input_file": "", "output_file": ""}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every attempt to reach another machine fails at once, and is listed."""
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def load_file(tmp_path, rows):
    return load_tasks(f"file:{write(tmp_path / 'tasks.jsonl', rows)}")


# ---- MBPP


def test_mbpp_row():
    task = mbpp_task(MBPP)
    assert task == Task(
        "mbpp",
        "Write a function to add.\n\nThe function must be named add, as in this test:\nassert add(1, 2) == 3",
        ("assert add(1, 2) == 3", "assert add(0, 0) == 0"),
        "add",
        1,
    )


def test_mbpp_setup_code_stands_before_every_test():
    task = mbpp_task(MBPP | {"test_setup_code": "root = 1\r\nleft = 2 "})
    assert task.tests == ("root = 1\nleft = 2\nassert add(1, 2) == 3", "root = 1\nleft = 2\nassert add(0, 0) == 0")


@pytest.mark.parametrize(
    "tests, name",
    [
        (["assert set(f([1])) == set([1])", "assert f([]) == []"], "f"),
        (["assert math.isclose(area(2), 3, rel_tol=0.1)", "assert abs(area(1) - 2) < 1"], "area"),
        (["assert longest([Pair(1, 2)], 1) == 1", "assert longest([Pair(3, 4)], 1) == 2"], "longest"),
        (["assert not odd(2)", "assert odd(1) == True"], "odd"),
        (["assert g(h(1)) == 1", "assert h(2) == 2"], "h"),
        (["assert (tree(root)) == 3"], "tree"),
    ],
)
def test_entry_point(tests, name):
    assert entry_point_of(tests) == name


@pytest.mark.parametrize(
    "tests, reason",
    [
        (["assert f(1)", "assert g(1)"], "call no function in common"),
        (["assert sorted([2, 1]) == [1, 2]"], "call no function in common"),
        (["assert x.f(1)"], "call no function in common"),
        (["assert f(1"], "does not parse"),
        (["f(1)"], "asserts nothing"),
        (["assert " + "(" * 500 + "f(1)" + ")" * 500], "does not parse"),
    ],
)
def test_no_entry_point(tests, reason):
    with pytest.raises(BadRow, match=reason):
        entry_point_of(tests)


BAD_MBPP = [
    ({"text": None}, "text is missing"),
    ({"text": "  "}, "text is empty"),
    ({"text": 5}, "text is not text"),
    ({"text": "x" * 10_000_000}, "longer than 6000"),
    ({"text": "a \ud800 b"}, "not valid Unicode"),
    ({"text": "a \0 b"}, "not valid Unicode"),
    ({"code": None}, "code is missing"),
    ({"code": "def add(:"}, "code does not parse"),
    ({"code": "x=1\n" * 100_000}, "code does not parse"),
    ({"test_list": None}, "test_list is not a list"),
    ({"test_list": []}, "test_list is not a list"),
    ({"test_list": "assert add(1, 2) == 3"}, "test_list is not a list"),
    ({"test_list": [None]}, "test_list is missing"),
    ({"test_list": [3]}, "test_list is not text"),
    ({"test_list": ["assert add(1)", "assert sub(1)"]}, "no function in common"),
    ({"test_list": ["assert add(1) == '" + "y" * 2000 + "'"]}, "longer than 2000"),
    ({"test_setup_code": "z = 1\n" * 400}, "longer than 2000"),
    ({"test_setup_code": ["x"]}, "test_setup_code is not text"),
]


@pytest.mark.parametrize("change, reason", BAD_MBPP, ids=[r[1] + str(i) for i, r in enumerate(BAD_MBPP)])
def test_bad_mbpp_rows(change, reason):
    with pytest.raises(BadRow, match=reason):
        mbpp_task(MBPP | change)


def test_mbpp_as_published(shared, no_network):
    loaded = load_tasks(f"mbpp:{shared / 'data/mbpp'}")
    assert (len(loaded.tasks), loaded.skipped) == (374, {})
    levels = collections.Counter(t.level for t in loaded.tasks)
    assert [levels[i] for i in range(1, 6)] == [83, 76, 82, 71, 62]
    rows = [json.loads(line) for line in (shared / "data/mbpp/train.jsonl").read_text("utf-8").splitlines()]
    for task, row in zip(loaded.tasks, rows, strict=True):
        assert f"def {task.entry_point}(" in row["code"] or f"def {task.entry_point} (" in row["code"]
        assert task.question.startswith(row["text"].strip()) and task.entry_point in task.question
        assert all(parse_python(test) is not None for test in task.tests)
    assert len(load_tasks(f"mbpp:{shared / 'data/mbpp'}@validation").tasks) == 90
    assert len(load_tasks(f"mbpp:{shared / 'data/mbpp'}@prompt").tasks) == 10
    assert no_network == []


# ---- CodeContests


def test_code_contests_row():
    task = code_contests_task(CONTEST)
    assert task.question == "Read a number and print it." and task.is_program and task.level == 2
    assert task.tests == tuple(canonical_json({"input": f"{i}\n", "output": f"{i}\n"}) for i in range(1, 5))


@pytest.mark.parametrize(
    "rating, difficulty, level",
    [(800, 20, 1), (999, 0, 1), (1000, 0, 2), (1399, 0, 2), (1400, 0, 3), (1800, 7, 4), (2300, 7, 5), (3500, 7, 5),
     (0, 7, 1), (0, 8, 2), (0, 10, 4), (0, 11, 5), (0, 28, 5), (0, 1, 1), (0, 5, 5), (0, 6, 3), (0, 0, 3),
     (None, None, 3), ("1500", "A", 3), (-1, -1, 3)],
)  # fmt: skip
def test_code_contests_level(rating, difficulty, level):
    assert code_contests_task(CONTEST | {"cf_rating": rating, "difficulty": difficulty}).level == level


def test_code_contests_passes_over_long_empty_and_repeated_tests():
    tests = {"input": ["1\n", "x" * 3000, "1\n", None], "output": ["1\n", "y", "1\n", "z"]}
    more = {"input": ["7\n", "8\n"], "output": [" \n", "8\n"]}
    task = code_contests_task(CONTEST | {"public_tests": tests, "generated_tests": more})
    assert [json.loads(t)["input"] for t in task.tests] == ["1\n", "8\n"]


BAD_CONTESTS = [
    ({"description": "See <image> here"}, "image"),
    ({"description": ""}, "description is empty"),
    ({"description": "d" * 6001}, "longer than 6000"),
    ({"input_file": "in.txt"}, "named file"),
    ({"public_tests": None, "generated_tests": None}, "no test of text"),
    ({"public_tests": {"input": [], "output": []}, "generated_tests": {}}, "no test of text"),
    ({"public_tests": [1]}, "public_tests is not an object"),
    ({"public_tests": {"input": ["1"], "output": []}}, "as many outputs as inputs"),
    ({"public_tests": {"input": "1", "output": "1"}}, "as many outputs as inputs"),
]


@pytest.mark.parametrize("change, reason", BAD_CONTESTS)
def test_bad_code_contests_rows(change, reason):
    with pytest.raises(BadRow, match=reason):
        code_contests_task(CONTEST | change)


def test_code_contests_as_published(shared, no_network):
    loaded = load_tasks(f"code_contests:{shared / 'data/code_contests'}")
    assert len(loaded.tasks) == 114 and loaded.skipped == {"its statement shows an image": 86}
    assert {t.level for t in loaded.tasks} == {1, 2, 3, 4, 5} and all(t.is_program for t in loaded.tasks)
    text = (shared / "data/code_contests/train.jsonl").read_text("utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if "<image>" not in row["description"]]
    for task, row in zip(loaded.tasks, rows, strict=True):
        tests, first = [json.loads(test) for test in task.tests], row["public_tests"]
        known = first["input"] + row["generated_tests"]["input"]
        assert task.question == row["description"].strip()
        assert 1 <= len(tests) <= 4 and all(test["input"] in known for test in tests)
        if first["input"] and len(first["input"][0] + first["output"][0]) < 1000:
            assert tests[0] == {"input": first["input"][0], "output": first["output"][0]}
    assert no_network == []


# ---- a file of one's own


def test_file_tasks_in_order_as_written(tmp_path, no_network):
    fenced = FILE | {"question": "<|im_start|>system\n```python\nf\n``` \u2028 \x85 ü"}
    program = {"question": "Echo.", "tests": [{"input": "a", "output": "a"}, '{"output":"b","input":"b"}'],
               "entry_point": None, "level": 5}  # fmt: skip
    raw = json.dumps(fenced, ensure_ascii=False)
    loaded = load_file(tmp_path, [FILE, "", raw, program])
    assert [t.question for t in loaded.tasks] == ["Add f.", fenced["question"], "Echo."]
    assert loaded.tasks[2].tests == ('{"input":"a","output":"a"}', '{"input":"b","output":"b"}')
    assert [t.entry_point for t in loaded.tasks] == ["f", "f", None] and loaded.skipped == {}
    assert no_network == []


BAD_FILE_ROWS = [
    ("{", "not a line of strict JSON (not_json)"),
    ("[1]", "not a JSON object"),
    ('{"question": NaN}', "not a line of strict JSON (bad_number)"),
    ('{"level": 1, "level": 2}', "not a line of strict JSON (duplicate_key)"),
    ("[" * 100_000, "not a line of strict JSON (too_deep)"),
    ("9" * 5000, "not a line of strict JSON (bad_number)"),
    (FILE | {"answer": "x"}, "unknown key 'answer'"),
    ({k: FILE[k] for k in FILE if k != "entry_point"}, "entry_point is missing"),
    (FILE | {"question": ""}, "question is empty"),
    (FILE | {"question": "q" * 10_000_000}, "its question is longer than 6000 characters"),
    (FILE | {"question": "\ud83d alone"}, "question is not valid Unicode text"),
    (FILE | {"tests": []}, "tests is not a list with at least one test"),
    (FILE | {"tests": None}, "tests is not a list with at least one test"),
    (FILE | {"tests": [f"assert f({i})" for i in range(21)]}, "more than 20 tests"),
    (FILE | {"tests": ["assert g(1) == 2"]}, "a test does not call entry_point"),
    (FILE | {"tests": ["f(1)"]}, "a test asserts nothing"),
    (FILE | {"tests": ["assert f(1) =="]}, "a test does not parse as Python"),
    (FILE | {"tests": ["assert f(1) == '" + "t" * 2000 + "'"]}, "a test is longer than 2000 characters"),
    (FILE | {"entry_point": "not a name"}, "entry_point is neither null nor the name of a function"),
    (FILE | {"entry_point": "class"}, "entry_point is neither null nor the name of a function"),
    (FILE | {"entry_point": None}, "not a line of strict JSON (not_json)"),
    (PROGRAM | {"tests": [{"input": "1"}]}, 'a test of a program is not {"input": text, "output": text}'),
    (
        PROGRAM | {"tests": [{"input": 1, "output": "1"}]},
        "input or output of a test is not text, or no output is expected",
    ),
    (
        PROGRAM | {"tests": [{"input": "", "output": " "}]},
        "input or output of a test is not text, or no output is expected",
    ),
]
BAD_FILE_ROWS += [
    (FILE | {"level": level}, "level is not a whole number from 1 to 5") for level in (0, 6, "2", None, True, 1.5, [])
]


def test_one_bad_row_costs_no_other(tmp_path):
    good = [FILE | {"question": f"Number {i}"} for i in range(len(BAD_FILE_ROWS))]
    rows = [row for pair in zip(good, (bad for bad, _ in BAD_FILE_ROWS), strict=True) for row in pair]
    loaded = load_file(tmp_path, rows)
    assert [t.question for t in loaded.tasks] == [row["question"] for row in good]
    assert loaded.skipped == dict(collections.Counter(reason for _, reason in BAD_FILE_ROWS))


def test_repeated_tasks_count_once(tmp_path):
    loaded = load_file(tmp_path, [FILE, FILE | {"level": 4}, FILE | {"tests": ["assert f(2) == 3"]}])
    assert [t.level for t in loaded.tasks] == [1, 1] and loaded.skipped == {"the same task as an earlier row": 1}


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path):
    path = tmp_path / "t.jsonl"
    other = json.dumps(FILE | {"question": "other"}).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(FILE).encode() + b"\r\n" + b'{"question": "\xff\xfe"}\n\xed\xa0\x80\n' + other
    )
    loaded = load_tasks(f"file:{path}")
    assert [t.question for t in loaded.tasks] == ["Add f.", "other"]
    assert loaded.skipped == {"not a line of strict JSON (not_json)": 2}


def test_reasons_are_bounded(tmp_path):
    loaded = load_file(tmp_path, [FILE] + [FILE | {f"key{i}": 1} for i in range(200)])
    assert len(loaded.skipped) == 51 and loaded.skipped["other reasons"] == 150


@pytest.mark.parametrize(
    "name", ["a[1]/t*.jsonl", "a b/ü?.jsonl", ".hidden/.t.jsonl", "__x__/t.jsonl", "x@y/z:1.jsonl"]
)
def test_odd_paths(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    (path.parent / "tx.jsonl").write_text("{}\n")
    assert len(load_tasks(f"file:{write(path, [FILE])}").tasks) == 1


def test_file_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "t.jsonl", [FILE])
    assert len(load_tasks("file:~/t.jsonl").tasks) == 1


def test_a_binary_file_is_told(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(gzip.compress(b"x" * 100_000)[:40])
    with pytest.raises(TaskError, match="no usable task: .*not a line of strict JSON"):
        load_tasks(f"file:{path}")


# ---- specs


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "no task source"),
        ("mppb", "no task source"),
        ("mbpp@", "no task source"),
        ("mbpp:", "no path"),
        ("mbpp@dev", "train, test, validation, prompt"),
        ("code_contests@validation", "train, valid, test"),
        ("file", "takes a path"),
        ("file:/no/such.jsonl@train", "no split"),
        ("file:/no/such.jsonl", "does not exist"),
        ("file:{tmp}", "is a folder"),
        ("mbpp:{tmp}", "no \\*.jsonl"),
        ("mbpp:/no/such/folder", "no folder"),
        ("mbpp:{tmp}/some/train.jsonl", "is not a folder.*mbpp:.*/some@train"),
        ("mbpp:{tmp}/some@test", "known here: dev, train.*Try: mbpp:.*some@train"),
        ("mbpp:{tmp}/some@dev", "it has no rows"),
        ("mbpp:{tmp}/some", "no usable task: 2 x text is missing, 1 x not a JSON object"),
        ("file:{tmp}/some/train.jsonl", "unknown key 'question2'"),
    ],
)
def test_refused_specs(tmp_path, no_network, spec, words):
    (tmp_path / "some").mkdir()
    write(tmp_path / "some/train.jsonl", [{"question2": 1}, {"question2": 2}, "[]"])
    write(tmp_path / "some/dev.jsonl", [])
    with pytest.raises(TaskError, match=words) as e:
        load_tasks(spec.format(tmp=tmp_path))
    assert "\n" not in str(e.value) and no_network == []


@pytest.mark.parametrize("spec", ["mbpp", "code_contests@test", "mbpp:someone/else"])
def test_no_network_is_told_at_once(no_network, monkeypatch, spec):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(TaskError, match="no network.*FOLDER@.* with a local copy"):
        load_tasks(spec)
    assert 1 <= len(no_network) <= 3, "asked once, not retried for half a minute"


@pytest.mark.parametrize(
    "spec, hub_id, split, streamed",
    [
        ("mbpp", "google-research-datasets/mbpp", "train", False),
        ("mbpp:someone/else@dev", "someone/else", "dev", False),
        ("code_contests@valid", "deepmind/code_contests", "valid", True),
    ],
)
def test_what_is_asked_of_the_hub(monkeypatch, spec, hub_id, split, streamed):
    """With a stand-in for the hub: names, split, streaming, the bound on rows, and no remote code."""
    import datasets
    from huggingface_hub import HfApi

    asked, rows = [], [(CONTEST if streamed else MBPP) | {"description": str(i), "text": str(i)} for i in range(9)]
    monkeypatch.setattr("cz_jax.tasks.sources.STREAMED_ROWS", 4)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: asked.append((name, more)) or rows)
    assert len(load_tasks(spec).tasks) == (4 if streamed else 9)
    assert asked == [hub_id, (hub_id, {"split": split, "streaming": streamed})]


def test_a_split_that_the_hub_does_not_have(monkeypatch):
    import datasets
    from huggingface_hub import HfApi

    def refuse(name, **more):
        raise ValueError("Unknown split 'dev'. Should be one of ['train'].")

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TaskError, match="Should be one of.*no such split"):
        load_tasks("mbpp:someone/else@dev")


@pytest.mark.parametrize(
    "layout", ["train.parquet", "data/train-00000-of-00001.parquet", "full/train-00000-of-00001-ab12.parquet"]
)
def test_parquet_folders(tmp_path, no_network, layout):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / layout
    path.parent.mkdir(exist_ok=True)
    rows = [CONTEST, CONTEST | {"description": "Other."}, CONTEST | {"description": "<image>"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = load_tasks(f"code_contests:{tmp_path}")
    assert [t.question for t in loaded.tasks] == ["Read a number and print it.", "Other."]
    assert loaded.skipped == {"its statement shows an image": 1} and no_network == []
    assert loaded.tasks[0] == code_contests_task(CONTEST)
    with pytest.raises(TaskError, match="known here: train"):
        load_tasks(f"code_contests:{tmp_path}@test")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TaskError, match="cannot be read"):
        load_tasks(f"code_contests:{tmp_path}")


def test_only_a_bounded_part_of_parquet_code_contests_is_read(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("cz_jax.tasks.sources.STREAMED_ROWS", 3)
    rows = [CONTEST | {"description": str(i)} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert [t.question for t in load_tasks(f"code_contests:{tmp_path}").tasks] == ["0", "1", "2"]


def test_local_files_need_no_cache_and_no_library_until_read(tmp_path):
    write(tmp_path / "t.jsonl", [FILE])
    code = (
        "import sys, cz_jax.tasks as t; t.load_tasks('builtin'); "
        "assert not {'jax', 'datasets', 'grain', 'transformers'} & set(sys.modules), sys.modules.keys(); "
        "assert len(t.load_tasks('file:t.jsonl').tasks) == 1"
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "home").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "t.jsonl"]
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []


# ---- keys


def test_question_key_sees_through_case_layout_and_tests():
    key = question_key(mbpp_task(MBPP))
    assert key == question_key(
        mbpp_task(MBPP | {"text": " write  A function\nto ADD. ", "test_list": ["assert plus(1)"]})
    )
    assert key == question_key(file_task(FILE | {"question": "Write a function to add."}))
    assert key != question_key(file_task(FILE | {"question": "Write a function to add"}))
    assert held_out_keys([mbpp_task(MBPP)]) == {key, mbpp_task(MBPP).id}


@given(st.one_of(st.text(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from([*FILE, *MBPP, *CONTEST]), x), max_leaves=12,
).map(json.dumps)))  # fmt: skip
def test_any_line_is_a_task_or_a_reason(line):
    for make in (mbpp_task, code_contests_task, file_task):
        try:
            task = make(read_json_row(line))
        except BadRow as e:
            assert str(e)
        else:
            assert task.question and task.tests


ODD_VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys({**MBPP, **CONTEST}, ODD_VALUES)))
def test_any_change_of_a_good_row_is_a_task_or_a_reason(change):
    for make, row in ((mbpp_task, MBPP), (code_contests_task, CONTEST), (file_task, FILE)):
        try:
            make(row | change)
        except BadRow as e:
            assert str(e)
