"""The run folder's record: what is written comes back, a crash or a full disk tears nothing, resume cuts exactly."""

import dataclasses
import errno
import gzip
import json
import logging
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cz_jax import files, ledger
from cz_jax.errors import CheckpointError
from cz_jax.ledger import RunLedger
from cz_jax.nouns import Group, Reward, Rollout, Round, Task, Verdict


def a_round(number, **metrics):
    task = Task("proposer", "Reverse a string. \ud800 \x00", ("assert f('ab') == 'ba'",), "f", 2)
    mine = Group(task, "solver", "p0", number, (Rollout("x", True, 2**64 - 1, (1, 2), (-0.5, -1e-30)),))
    theirs = Group(task, "peer", "p1", number, (Rollout("y", False), Rollout("é", True)))
    verdicts = ((Verdict("correct", 0.75),), (Verdict("failed", None, "down"), Verdict("wrong", 0.0)))
    rewards = ((Reward(1.2, {"structure": 0.2, "correctness": 1.0}),), None)
    return Round(
        number, 2, 3, (mine,), (theirs,), verdicts, rewards, (mine.id,), "p0", "p2", "c0", {"loss": 0.5} | metrics
    )


@pytest.fixture
def folder(tmp_path):
    """A run folder with rounds 1 to 5."""
    book = RunLedger(tmp_path / "run")
    for n in range(1, 6):
        book.write(a_round(n, reward=n / 10))
    return tmp_path / "run"


def numbers(folder):
    return [line["round"] for line in RunLedger(folder).rounds()]


def records(folder):
    return sorted(int(p.name.split(".")[0]) for p in (folder / "rounds").iterdir())


# What is written


def test_a_round_comes_back_as_it_was(folder):
    assert RunLedger(folder).read_round(3) == a_round(3, reward=0.3)
    assert sorted(p.name for p in (folder / "rounds").iterdir())[0] == "000001.json.gz"


def test_lines_are_canonical_and_carry_the_round(folder):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[0] == b'{"loss":0.5,"reward":0.1,"round":1}\n'
    assert list(RunLedger(folder).rounds())[4] == {"round": 5, "loss": 0.5, "reward": 0.5}


def test_the_same_round_gives_the_same_bytes(folder, tmp_path):
    RunLedger(tmp_path / "again").write(a_round(1, reward=0.1))
    name = "rounds/000001.json.gz"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_metric_that_is_no_number_is_null(tmp_path, bad):
    book = RunLedger(tmp_path)
    book.write(a_round(1, kl=bad, shares=(1.0, bad), parts={"x": bad}))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"round": 1, "loss": 0.5, "kl": None, "shares": [1.0, None], "parts": {"x": None}}
    assert book.read_round(1).metrics["kl"] is None
    book.write_summary({"best": bad})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"best": None}


def test_nan_elsewhere_is_refused_and_leaves_nothing(tmp_path):
    bad = dataclasses.replace(a_round(1), rewards=((Reward(float("nan"), {}),), None))
    with pytest.raises(ValueError, match="JSON"):
        RunLedger(tmp_path / "run").write(bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [a_round(-1), a_round(2, round=3)], ids=["negative", "other_round_metric"])
def test_a_wrong_number_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="round numbered"):
        RunLedger(tmp_path / "run").write(bad)


@pytest.mark.parametrize("number", [4, 5])
def test_a_round_is_written_once(folder, number):
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=f"already holds round 5, so round {number} cannot follow"):
        RunLedger(folder).write(a_round(number))
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert RunLedger(folder).read_round(number) == a_round(number, reward=number / 10)


def test_summary(folder):
    book = RunLedger(folder)
    book.write_summary({"rounds": 5, "best": a_round(5).metrics})
    book.write_summary({"rounds": 6})
    assert json.loads((folder / "summary.json").read_text()) == {"rounds": 6}
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


# Resume


@pytest.mark.parametrize("after", range(6))
def test_truncate_after(folder, after):
    book = RunLedger(folder)
    whole = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rounds" / ".000006.json.gz.1-1.tmp").write_bytes(b"half a")
    book.truncate_after(after)
    assert numbers(folder) == records(folder) == list(range(1, after + 1))
    for n in range(after + 1, 8):
        book.write(a_round(n, reward=n / 10))
    assert (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:5] == whole
    assert numbers(folder) == records(folder) == list(range(1, 8))


def test_truncate_of_nothing(tmp_path):
    RunLedger(tmp_path / "run").truncate_after(0)
    assert not (tmp_path / "run").exists()


def test_truncate_warns_of_missing_rounds(folder, caplog):
    with caplog.at_level(logging.WARNING):
        RunLedger(folder).truncate_after(9)
    assert "ends at round 5, before the checkpoint's round 9" in caplog.text
    assert numbers(folder) == [1, 2, 3, 4, 5]


@given(cut=st.integers(min_value=1, max_value=36))
def test_a_torn_last_line_is_left_out(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("torn")
    book = RunLedger(folder)
    for n in (1, 2):
        book.write(a_round(n, reward=n / 10))
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert numbers(folder) == [1]
    RunLedger(folder).write(a_round(2, reward=0.7))
    assert list(RunLedger(folder).rounds())[1:] == [{"round": 2, "loss": 0.5, "reward": 0.7}]


@pytest.mark.parametrize(
    "tail", [b'{"round":6', b'{"round":6}', b"\x00" * 4096, b"not json\n", b'{"round":5}\n', b"[" * 99999]
)
def test_a_torn_tail_of_any_kind(folder, tail, caplog):
    with open(folder / "metrics.jsonl", "ab") as f:
        f.write(tail)
    with caplog.at_level(logging.WARNING):
        assert numbers(folder) == [1, 2, 3, 4, 5]
    assert "the last line is torn" in caplog.text
    book = RunLedger(folder)
    book.truncate_after(5)
    book.write(a_round(6))
    assert numbers(folder) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_line_in_the_middle_is_told(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    with pytest.raises(CheckpointError, match="line 3 is damaged"):
        numbers(folder)
    with pytest.raises(CheckpointError, match="line 3 is damaged"):
        RunLedger(folder).truncate_after(4)
    assert len(path.read_bytes().splitlines()) == 5
    RunLedger(folder).truncate_after(2)  # what is damaged is dropped anyway
    assert numbers(folder) == [1, 2]


# Damaged records


def write_gz(data):
    return lambda path: path.write_bytes(gzip.compress(data))


def renamed(path):
    path.write_bytes(path.with_name("000002.json.gz").read_bytes())


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "not a whole record"),
        (lambda path: path.write_bytes(b"\x00" * 100), "not a whole record"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:60] + b"\xff" * 20 + path.read_bytes()[80:]),
            "not a whole record",
        ),
        (write_gz(b"[" * 100_000), "not a whole record"),
        (write_gz(b'{"number":3}'), "not a whole record"),
        (renamed, "holds round 2"),
    ],
    ids=["missing", "truncated", "binary", "flipped", "deep", "not_a_round", "renamed"],
)
def test_bad_record(folder, damage, told):
    damage(folder / "rounds" / "000003.json.gz")
    with pytest.raises(CheckpointError, match=told):
        RunLedger(folder).read_round(3)


def test_a_gzip_bomb_is_not_unpacked(folder, monkeypatch):
    monkeypatch.setattr(ledger, "MAX_ROUND_BYTES", 1500)
    assert RunLedger(folder).read_round(2).number == 2
    (folder / "rounds" / "000003.json.gz").write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(CheckpointError, match="unpacks to more than 1500 bytes"):
        RunLedger(folder).read_round(3)


# Full disk


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["record", "line"])
def test_full_disk_is_loud_and_tears_nothing(folder, monkeypatch, where):
    before, book, sync, calls = (folder / "metrics.jsonl").read_bytes(), RunLedger(folder), os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        return full() if len(calls) == (1 if where == "record" else 3) else sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="round 6 could not be written: No space left on device"):
        book.write(a_round(6))
    monkeypatch.undo()
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert [p for p in (folder / "rounds").iterdir() if p.name.endswith(".tmp")] == []
    book.write(a_round(6))
    assert numbers(folder) == records(folder) == [1, 2, 3, 4, 5, 6]


def test_a_line_of_which_a_part_fits(folder):
    """The system takes a part of the line: a limit on the size of a file stands in for the full disk."""
    before, book = (folder / "metrics.jsonl").read_bytes(), RunLedger(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    pad = {f"m{i}": "x" * 99 for i in range(200)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5000, hard))
    try:
        with pytest.raises(CheckpointError, match="round 6 could not be written: .*only a part of the line"):
            book.write(a_round(6, **pad))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "metrics.jsonl").read_bytes() == before
    book.write(a_round(6, **pad))
    assert numbers(folder)[-1] == 6


def test_write_atomic_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (lambda b: b.write(a_round(1)), lambda b: b.write_summary({})):
        with pytest.raises(CheckpointError, match="could not be written"):
            call(RunLedger(tmp_path / "file" / "run"))
