"""Saving and restoring a run: exactness, every way a step can be broken, retention, locking, kills and full disks."""

import errno
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cz_jax.checkpoint import Checkpoints, manifest, places, store
from cz_jax.errors import CheckpointError

Moments = namedtuple("Moments", "count mu nu")
HOST = {"level": 3, "stream": {"epoch": 1, "at": 7, "names": ["a", "\ud800"]}, "seed": 2**63 - 1, "cursor": None}


def tree(x=0.0, width=8):
    """A train state in small: nested dicts, a named tuple, a list, several dtypes, scalars and values that bite."""
    w = jnp.arange(width * 4, dtype=jnp.float32).reshape(width, 4) + x
    odd = jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45], jnp.float32)
    return {
        "params": {"w": w, "a.b": w.astype(jnp.bfloat16), "odd": odd, "zeros": jnp.full((3,), -0.0)},
        "opt": [Moments(jnp.int32(5), {"w": w * 2}, {"w": w * 3}), (), None],
        "mask": jnp.array([True, False]),
        "key": jnp.array([1, 2**32 - 1], jnp.uint32),
    }


def target(arrays, sharding=None):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


def same(a, b):
    """Equal structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def opened(folder, **how):
    return Checkpoints(folder, **({"keep": 3, "keep_best": 0} | how))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with whole steps 1, 3 and 5, whose arrays are tree(1), tree(3) and tree(5)."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with opened(folder) as c:
        for n in (1, 3, 5):
            c.save(n, tree(n), HOST | {"level": n})
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def arrays_file(step):
    """The largest file that Orbax wrote."""
    return max((p for p in (step / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


# Exactness


def test_round_trip_is_exact(tmp_path):
    with opened(tmp_path / "c") as c:
        assert c.latest() is None
        c.save(12, tree(), HOST, score=0.5)
        assert c.latest() == 12
        number, arrays, host = c.restore(target(tree()))
        assert (number, host, c.skipped) == (12, HOST, [])
        same(arrays, tree())


def test_names_in_the_step_folder(folder):
    assert sorted(p.name for p in (folder / "5").iterdir()) == ["arrays", "host.json", "manifest.json"]
    body = json.loads((folder / "5" / "manifest.json").read_text())
    assert body["round"] == 5
    assert ["params.a.b", [8, 4], "bfloat16"] in body["arrays"]
    assert "host.json" in body["files"] and "manifest.json" not in body["files"]


def test_restores_an_older_round_when_asked(folder):
    with opened(folder) as c:
        number, arrays, host = c.restore(target(tree()), 3)
    assert (number, host["level"]) == (3, 3)
    same(arrays, tree(3))


def test_without_a_target_arrays_come_by_their_paths(folder):
    with opened(folder, lock=False) as c:
        _, arrays, _ = c.restore()
    assert arrays["opt.0.mu.w"].dtype == jnp.float32
    np.testing.assert_array_equal(arrays["params.w"], tree(5)["params"]["w"])


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda t: jax.tree.map(lambda a: a * -3 + 1, t), donate_argnums=0)
    state = step({"w": jnp.ones((512, 512)), "v": jnp.ones((65536,))})
    with opened(tmp_path / "c", keep=5) as c:
        saved = {}
        for n in range(5):
            saved[n] = jax.tree.map(lambda a: np.array(a, copy=True), state)
            c.save(n, state, {})
            before = state
            for _ in range(3):
                state = step(state)
            # On CPU jax copies rather than donates a buffer that is being read; to delete it is as hard.
            jax.tree.map(lambda a: a.delete(), before)
            jax.block_until_ready(state)
        for n in range(5):
            same(c.restore(target(state), n)[1], saved[n])


def test_save_returns_before_the_disk_does(tmp_path, monkeypatch):
    write, slow = manifest.write, 0.5

    def dawdle(*args):
        time.sleep(slow)
        return write(*args)

    monkeypatch.setattr(manifest, "write", dawdle)
    with opened(tmp_path / "c") as c:
        c.save(1, tree(), HOST)
        assert not (tmp_path / "c" / "1" / "manifest.json").exists()
        c.wait()
        assert (tmp_path / "c" / "1" / "manifest.json").exists()


def test_host_is_taken_as_it_is_at_save(tmp_path):
    host = {"rounds": [1]}
    with opened(tmp_path / "c") as c:
        c.save(1, tree(), host)
        host["rounds"].append(2)
        assert c.restore(target(tree()))[2] == {"rounds": [1]}


@pytest.mark.parametrize(
    "bad", [{"host": {"x": float("nan")}}, {"score": float("nan")}, {"round_number": -1}, {"arrays": {"w": np.ones(2)}}]
)
def test_what_cannot_be_saved_exactly_is_refused(tmp_path, bad):
    with opened(tmp_path / "c") as c:
        with pytest.raises((ValueError, TypeError)):
            c.save(**({"round_number": 1, "arrays": tree(), "host": {}} | bad))
        assert c.latest() is None


def test_reader_may_not_save(folder):
    with opened(folder, lock=False) as c, pytest.raises(ValueError, match="lock=False"):
        c.save(9, tree(), {})


# Other meshes


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), None], ids=["1x8x1", "2x2x2", "one_device"])
def test_bad_other_mesh_is_resharded(tmp_path, shape):
    def laid_out(shape):
        if shape is None:
            return SingleDeviceSharding(jax.devices()[3])
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
        return NamedSharding(mesh, P("fsdp", "tensor"))

    w = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    arrays = {
        "w": jax.device_put(w, laid_out((2, 2, 2))),
        "b": jax.device_put(w.astype(jnp.bfloat16), laid_out((2, 2, 2))),
    }
    with opened(tmp_path / "c") as c:
        c.save(1, arrays, {})
        _, back, _ = c.restore(target(arrays, laid_out(shape)))
    same(back, arrays)
    assert all(a.sharding == laid_out(shape) for a in jax.tree.leaves(back))


# Broken steps: the newest whole one is used, with a warning that names the broken one


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def temporary(step):
    step.rename(step.with_name("5.orbax-checkpoint-tmp"))


def unfinished_arrays(step):
    (step / "manifest.json").unlink()
    (step / "arrays").rename(step / "arrays.orbax-checkpoint-tmp")


def flipped_bit(step):
    data = bytearray(arrays_file(step).read_bytes())
    data[len(data) // 2] ^= 1
    arrays_file(step).write_bytes(data)


def flipped_bit_in_host(step):
    text = (step / "host.json").read_text()
    (step / "host.json").write_text(text.replace('"level":5', '"level":4'))


def truncated(step):
    file = arrays_file(step)
    file.write_bytes(file.read_bytes()[:-1])


def copied_from_1(step):
    shutil.rmtree(step)
    shutil.copytree(step.with_name("1"), step)


def missing_file(step):
    arrays_file(step).unlink()


def extra_file(step):
    (step / "arrays" / "notes").write_text("mine")


def link_for_a_file(step):
    file = arrays_file(step)
    moved = step.parent / "elsewhere"
    file.rename(moved)
    file.symlink_to(moved)


def no_manifest(step):
    (step / "manifest.json").unlink()


def flipped_score(step):
    path = step / "manifest.json"
    path.write_text(path.read_text().replace('"score":null', '"score":9.5'))


def binary_manifest(step):
    (step / "manifest.json").write_bytes(b"\xff\x00" * 50)


def deep_manifest(step):
    (step / "manifest.json").write_text("[" * 100_000)


def a_file(step):
    shutil.rmtree(step)
    step.write_text("not a folder")


BREAKS = {
    empty: "it is empty",
    temporary: "did not finish",
    unfinished_arrays: "did not finish",
    flipped_bit: "checksum differs",
    flipped_bit_in_host: "host.json is not what was saved",
    truncated: "bytes, not",
    copied_from_1: "manifest is that of round 1",
    missing_file: "is missing",
    extra_file: "arrays/notes does not belong",
    link_for_a_file: "not a plain file",
    no_manifest: "no manifest.json",
    flipped_score: "manifest.json is damaged",
    binary_manifest: "manifest.json is damaged",
    deep_manifest: "manifest.json is damaged",
    a_file: "not a folder",
}


@pytest.mark.parametrize("damage", BREAKS, ids=[f"bad_{b.__name__}" for b in BREAKS])
def test_broken_newest_is_skipped_by_name(folder, caplog, damage):
    damage(folder / "5")
    name = "5.orbax-checkpoint-tmp" if damage is temporary else "5"
    with opened(folder) as c:
        with caplog.at_level(logging.WARNING):
            number, arrays, host = c.restore(target(tree()))
        assert (number, host["level"], c.skipped) == (3, 3, [name])
        assert c.latest() == 3
        same(arrays, tree(3))
    told = [r.getMessage() for r in caplog.records if r.name == store.__name__]
    assert told and f"/{name} is skipped" in told[0] and BREAKS[damage] in told[0]


AGAIN = (empty, temporary, unfinished_arrays, flipped_bit, copied_from_1, a_file)


@pytest.mark.parametrize("damage", AGAIN, ids=[f"bad_{b.__name__}" for b in AGAIN])
def test_broken_round_is_saved_again(folder, damage):
    damage(folder / "5")
    with opened(folder, keep=5) as c:
        c.restore(target(tree()))
        c.save(4, tree(4), HOST)
        c.save(5, tree(50), HOST)
        c.wait()
        assert c.latest() == 5 and c.skipped == []
        same(c.restore(target(tree()))[1], tree(50))
        same(c.restore(target(tree()), 4)[1], tree(4))
    kept = {p.name for p in folder.iterdir()} - {".lock", "elsewhere"}
    leftovers = kept - {"1", "3", "4", "5"}
    never_finished = damage in (empty, unfinished_arrays)
    aside = {"5.orbax-checkpoint-tmp"} if damage is temporary else set() if never_finished else {"5.broken-1"}
    assert leftovers == aside


def test_every_bit_of_a_manifest_counts(folder):
    path = folder / "5" / "manifest.json"
    good, rng = path.read_bytes(), random.Random(0)
    with opened(folder) as c:
        for _ in range(40):
            data = bytearray(good)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            assert c.latest() == 3
        path.write_bytes(good)
        assert c.latest() == 5


def test_nothing_whole_at_all(folder):
    for n, damage in ((1, empty), (3, truncated), (5, flipped_bit)):
        damage(folder / str(n))
    with opened(folder) as c:
        assert c.latest() is None
        assert c.skipped == ["5", "3", "1"]
        with pytest.raises(CheckpointError, match=r"5: .*checksum differs.*3: .*bytes.*1: it is empty"):
            c.restore(target(tree()))


def test_no_checkpoint_yet(tmp_path):
    with opened(tmp_path / "never", lock=False) as c:
        assert c.latest() is None
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            c.restore(target(tree()))
    assert not (tmp_path / "never").exists()


def test_a_broken_round_that_was_asked_for_is_refused(folder):
    flipped_bit(folder / "3")
    with opened(folder) as c:
        with pytest.raises(CheckpointError, match="checkpoint 3 is not whole: .*checksum"):
            c.restore(target(tree()), 3)
        with pytest.raises(CheckpointError, match=r"no checkpoint of round 4; there are \[1, 3, 5\]"):
            c.restore(target(tree()), 4)


# Another model or dtype


def changed(path, leaf):
    wanted = target(tree())
    wanted["params"][path] = leaf
    return wanted


@pytest.mark.parametrize(
    "wanted, told",
    [
        (
            changed("w", jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)),
            r"params\.w: saved float32\[8,4\], wanted bfloat16\[8,4\]",
        ),
        (
            changed("a.b", jax.ShapeDtypeStruct((8, 4), jnp.float32)),
            r"params\.a\.b: saved bfloat16\[8,4\], wanted float32",
        ),
        (
            changed("w", jax.ShapeDtypeStruct((4, 8), jnp.float32)),
            r"params\.w: saved float32\[8,4\], wanted float32\[4,8\]",
        ),
        (changed("bias", jax.ShapeDtypeStruct((4,), jnp.float32)), r"params\.bias: saved nothing, wanted float32\[4\]"),
        ({"params": target(tree())["params"]}, r"key: saved uint32\[2\], wanted nothing \(and \d more\)"),
    ],
    ids=[
        "bad_other_dtype_down",
        "bad_other_dtype_up",
        "bad_other_shape",
        "bad_other_model_more",
        "bad_other_model_less",
    ],
)
def test_other_model_is_refused(folder, wanted, told):
    with opened(folder) as c, pytest.raises(CheckpointError, match=told):
        c.restore(wanted)


# Retention


def steps(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_keeps_the_newest_and_the_best_across_restarts(tmp_path):
    folder, scores = tmp_path / "c", {1: 0.1, 2: 0.9, 3: 0.2, 4: None, 5: 0.3, 6: 0.3}
    for n, score in scores.items():
        with opened(folder, keep=2, keep_best=1) as c:
            c.save(n, tree(n), HOST, score)
    assert steps(folder) == [2, 5, 6]
    with opened(folder, keep=1, keep_best=0) as c:
        c.save(7, tree(7), HOST, -1.0)
    assert steps(folder) == [7]


def test_best_ties_go_to_the_newer(tmp_path):
    with opened(tmp_path / "c", keep=1, keep_best=1) as c:
        for n in (1, 2, 3):
            c.save(n, tree(), HOST, 0.5 if n < 3 else 0.0)
    assert steps(tmp_path / "c") == [2, 3]


def test_broken_steps_are_not_counted_as_kept(folder):
    flipped_bit(folder / "5")
    with opened(folder, keep=2) as c:
        assert c.restore(target(tree()))[0] == 3
        c.save(6, tree(6), HOST)
    assert steps(folder) == [3, 5, 6]  # 5 is damaged: left, and not one of the two


def test_what_never_finished_is_removed_once_a_newer_one_is_whole(folder):
    unfinished_arrays(folder / "3")
    (folder / "4.orbax-checkpoint-tmp-17").mkdir()
    (folder / "9").mkdir()
    (folder / "notes").mkdir()
    with opened(folder) as c:
        c.save(7, tree(7), HOST)
    assert {p.name for p in folder.iterdir()} == {"1", "5", "7", "9", "notes", ".lock"}


def test_a_second_history_is_refused(folder):
    with opened(folder) as c:
        for n in (4, 5):
            with pytest.raises(CheckpointError, match=f"round {n} cannot be saved: .* whole checkpoint of round 5"):
                c.save(n, tree(), HOST)
        assert c.latest() == 5


def test_a_step_half_removed_counts_as_never_finished(folder, monkeypatch):
    monkeypatch.setattr(places.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "killed here")))
    with opened(folder, keep=1) as c:
        c.save(6, tree(6), HOST)
        c.wait()
        assert not (folder / "3" / "manifest.json").exists()
        assert c.latest() == 6


# Two trainers


def test_bad_two_trainers(folder):
    with opened(folder):
        with pytest.raises(CheckpointError, match=rf"in use by another trainer, process {os.getpid()}\b"):
            opened(folder)
        with opened(folder, lock=False) as reader:
            assert reader.latest() == 5
    opened(folder).close()


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        opened(tmp_path / "file" / "checkpoints")


# Full disk


@pytest.mark.parametrize("then", ["wait", "save", "close", "latest"])
def test_bad_full_disk(folder, monkeypatch, then):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    c = opened(folder)
    monkeypatch.setattr(places, "write_atomic", full)
    c.save(6, tree(6), HOST)
    call = {"save": lambda: c.save(7, tree(7), HOST)}.get(then, getattr(c, then))
    with pytest.raises(CheckpointError, match="round 6 could not be written: .*No space left.*disk is full"):
        call()
    monkeypatch.undo()
    if then != "close":
        assert c.restore(target(tree()))[0] == 5
        assert steps(folder) == [1, 3, 5]
        c.save(7, tree(7), HOST)
        c.close()
        assert steps(folder) == [3, 5, 7]
    opened(folder).close()  # the lock was given back


def test_bad_full_disk_under_orbax(folder, capfd):
    """A true failure in TensorStore's own writing threads, by a limit on the size of a file."""
    noise = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(folder) as c:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            c.save(6, noise, HOST)
            with pytest.raises(CheckpointError, match="round 6 could not be written: .*File too large"):
                c.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert c.latest() == 5 and steps(folder) == [1, 3, 5]
        c.save(7, noise, HOST)
        assert c.latest() == 7
    assert "Traceback" not in capfd.readouterr().err


def test_the_first_error_is_the_one_told(folder, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left")
    monkeypatch.setattr(places, "write_atomic", lambda *a: (_ for _ in ()).throw(full))
    with pytest.raises(KeyError), opened(folder) as c:
        c.save(6, tree(6), HOST)
        raise KeyError("the loop's own")
    assert "round 6 could not be written" in caplog.text


# Kills

TRAINER = """
    import sys
    import jax.numpy as jnp
    from cz_jax.checkpoint import Checkpoints
    sys.stdin.readline()
    with Checkpoints(sys.argv[1], keep=2, keep_best=1) as c:
        n = (c.latest() or 0) + 1
        while True:
            c.save(n, {"w": jnp.full((256, 256), n, jnp.float32), "n": jnp.int32(n)}, {"n": n}, score=float(n % 7))
            print(n, flush=True)
            n += 1
"""


def test_bad_sigkill_during_save(tmp_path):
    """Killed at five moments: what comes back is one whole round, and at least the last whose successor had begun."""
    folder, rng, reached = tmp_path / "c", random.Random(5), 0
    wanted = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), str(folder)]
    where = pathlib.Path(__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [subprocess.Popen(command, cwd=where, **pipes) for _ in range(5)]  # they import side by side, then wait
    try:
        for child in children:
            child.stdin.write(b"go\n")
            child.stdin.flush()
            started = [int(child.stdout.readline()) for _ in range(2)][-1]
            time.sleep(rng.uniform(0, 0.3))
            child.kill()
            rest = child.communicate()[0].split()
            started = int(rest[-1]) if rest else started
            with opened(folder, keep=2, keep_best=1, lock=False) as c:
                number, arrays, host = c.restore(wanted)
            assert started - 1 <= number <= started + 1 and number >= reached
            assert host == {"n": number} and int(arrays["n"]) == number
            assert np.all(np.asarray(arrays["w"]) == number)
            reached = number
    finally:
        for child in children:
            child.kill()
            child.communicate()


# Several processes on one folder

PROCESS = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from cz_jax.checkpoint import Checkpoints
    from cz_jax.errors import CheckpointError
    mesh, x = Mesh(np.array(jax.devices()), ("x",)), np.arange(64, dtype=np.float32).reshape(8, 8)
    saved = jax.make_array_from_callback((8, 8), NamedSharding(mesh, P("x")), lambda at: x[at])
    wanted = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    with Checkpoints(folder, keep=2, keep_best=0) as c:
        for n in (1, 2):
            c.save(n, {"x": saved}, {"n": n})
        number, arrays, host = c.restore({"x": wanted})
        assert (number, host, c.latest()) == (2, {"n": 2}, 2)
        assert all(np.array_equal(s.data, x[s.index]) for s in arrays["x"].addressable_shards)
        try:
            c.save(2, {"x": saved}, {})
        except CheckpointError as e:
            print("refused", e)
"""


def test_two_processes_share_a_folder(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(index), port, str(tmp_path / "c")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[1],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for index in (0, 1)
    ]
    try:
        told = [child.communicate(timeout=50) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], told
    assert "refused round 2 cannot be saved" in told[0][0] and "refused round 2 was not saved" in told[1][0]
    assert steps(tmp_path / "c") == [1, 2]
