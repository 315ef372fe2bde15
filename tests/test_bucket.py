"""Checkpoints in a bucket: the same promises as in a folder, over the REST interface of Google Cloud Storage."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket_server import BucketServer
from test_checkpoint import TRAINER
from test_processes import free_address
from test_run import QUICK, lines, small, timeless, wait_until

from cz_jax.build.models import export_run
from cz_jax.checkpoint import Checkpoints, store
from cz_jax.checkpoint.places import Bucket, place_at
from cz_jax.config import to_toml
from cz_jax.errors import CheckpointError, ConfigError
from cz_jax.plan.here import unreachable

ROOT = pathlib.Path(__file__).parents[1]
HOST = {"level": 2}


@pytest.fixture(scope="module")
def server():
    patch = pytest.MonkeyPatch()
    with BucketServer() as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        patch.undo()


@pytest.fixture(autouse=True)
def url(server, request):
    return "gs://bucket/" + request.node.name.replace("[", "-").replace("]", "")


def opened(url, **how):
    return Checkpoints(url, **{"keep": 2, "keep_best": 1} | how)


def tree(x=0.0):
    return {"w": jnp.full((16, 4), x, jnp.float32), "n": jnp.int32(x)}


TARGET = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree())


def write(url, name, data):
    place = Bucket(url)
    step, _, name = name.partition("/")
    place.write(step, name, data)


def test_round_trip_is_exact(url):
    with opened(url) as c:
        assert c.latest() is None
        c.save(3, tree(3), HOST, score=0.5)
        c.save(4, tree(4), HOST)
        number, arrays, host = c.restore(TARGET)
        assert (number, host) == (4, HOST) and int(arrays["n"]) == 4
        assert np.array_equal(arrays["w"], tree(4)["w"])
    with opened(url, lock=False) as c:
        assert c.latest() == 4 and int(c.restore(TARGET, 3)[1]["n"]) == 3


def test_retention(url):
    with opened(url) as c:
        for n, score in ((1, 0.9), (10, 0.1), (11, 0.2), (12, 0.3)):
            c.save(n, tree(n), HOST, score)
    assert Bucket(url).names() == ["1", "11", "12"]  # the two newest, and the best


def shorter(url):
    write(url, "5/host.json", b"{}")


def other(url):
    write(url, "5/host.json", Bucket(url).read("5", "host.json").replace(b"2", b"3"))


def missing(url):
    place = Bucket(url)
    place._files.rm_file(place._at("5", "host.json"))


def unfinished(url):
    place = Bucket(url)
    place._files.rm_file(place._at("5", "manifest.json"))


def more(url):
    write(url, "5/arrays/stranger", b"x")


DAMAGES = {shorter: "bytes, not", other: "checksum differs", missing: "host.json is missing",
           unfinished: "did not finish", more: "does not belong"}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=[f"bad_{d.__name__}" for d in DAMAGES])
def test_broken_newest_is_skipped_and_saved_again(url, caplog, damage):
    with opened(url) as c:
        for n in (3, 5):
            c.save(n, tree(n), HOST)
    damage(url)
    with opened(url) as c:
        assert c.latest() == 3 and c.skipped == ["5"]
        [told] = [r.getMessage() for r in caplog.records if r.name == store.__name__]
        assert f"checkpoint {url}/5 is skipped" in told and DAMAGES[damage] in told
        c.save(5, tree(5), HOST)
        assert c.latest() == 5
    names = Bucket(url).names()
    assert ("5.broken-1" in names) == (damage is not unfinished)  # moved aside; removed where it never was whole


def test_a_second_history_is_refused(url):
    with opened(url) as c:
        c.save(5, tree(), HOST)
        with pytest.raises(CheckpointError, match="round 4 cannot be saved: gs://.* whole checkpoint of round 5"):
            c.save(4, tree(), HOST)


def test_a_copy_of_a_bucket_is_checked_as_a_folder_and_the_other_way_round(url, tmp_path):
    with opened(url) as c:
        c.save(1, tree(1), HOST)
    bucket, folder = Bucket(url), tmp_path / "c"
    bucket._files.get(bucket._prefix, str(folder), recursive=True)
    with opened(folder) as c:
        assert c.latest() == 1
        c.save(2, tree(2), HOST)
    (folder / ".lock").unlink()
    bucket._files.put(str(folder / "2"), bucket._at("2"), recursive=True)
    with opened(url, lock=False) as c:
        assert c.latest() == 2 and c.skipped == []
    path = folder / "1" / "host.json"
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    shutil.rmtree(folder / "2")
    with opened(folder) as c:
        assert c.latest() is None and c.skipped == ["1"]


@pytest.mark.parametrize("where", ["gs://bucket", "gs://B/x", "gs://", "gs://bucket/a*b"])
def test_bad_url(where):
    with pytest.raises(CheckpointError, match="names no place in a bucket. Try: gs://my-bucket/"):
        place_at(where)


def test_bad_other_url():
    with pytest.raises(ConfigError, match="s3://bucket/c is no folder of this machine"):
        place_at("s3://bucket/c")


def test_bad_no_such_bucket(server):
    with pytest.raises(CheckpointError, match="nobodys-bucket/c cannot be used: .*no such bucket.*Try: gcloud auth"):
        opened("gs://nobodys-bucket/c")


def test_bad_gcsfs_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match=r"gcsfs is not installed. Try: pip install 'cz-jax\[gcs\]'"):
        opened("gs://bucket/c")


def test_bad_sigkill_during_save(url):
    """Killed at three moments: what comes back is one whole round, and at least the last whose successor had begun."""
    wanted = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    command, reached = [sys.executable, "-c", textwrap.dedent(TRAINER), url], 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    for moment in (0.0, 0.1, 0.4):
        with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
            child.stdin.write(b"go\n")
            child.stdin.flush()
            started = [int(child.stdout.readline()) for _ in range(3)][-1]
            time.sleep(moment)
            child.kill()
            rest = child.communicate()[0].split()
        started = int(rest[-1]) if rest else started
        with opened(url, lock=False) as c:
            number, arrays, host = c.restore(wanted)
        assert started - 1 <= number <= started + 1 and number > reached
        assert host == {"n": number} and int(arrays["n"]) == number and np.all(np.asarray(arrays["w"]) == number)
        reached = number


def test_a_bucket_that_refuses_is_told_of_and_no_step_is_taken_for_broken(url, server):
    with opened(url) as c:
        c.save(1, tree(1), HOST)
        c.wait()
        server.lock()
        try:
            with pytest.raises(CheckpointError, match="cannot be used: OSError: Forbidden.* no network"):
                c.latest()
        finally:
            server.unlock()
        assert c.latest() == 1 and c.skipped == []


def run_of_two(words, outs):
    """Two processes of one run, each with a disk of its own; what each says at its end."""
    together = ["--coordinator", free_address(), "--processes", "2", "--process"]
    program = [sys.executable, "-c", "from cz_jax.cli.main import program; program()", "train"]
    return [
        subprocess.Popen(
            [*program, *words, "--out", str(out), *together, str(i)],
            env=os.environ | QUICK, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, out in enumerate(outs)
    ]  # fmt: skip


def test_hosts_without_a_shared_disk_train_resume_and_export(url, tmp_path):
    config = small(
        run={"rounds": 4}, eval={"before_and_after": False}, checkpoint={"every": 2}, mesh={"data": 2, "fsdp": -1},
        proposer={"model": "none"},
    )  # fmt: skip
    path, whole, cache = tmp_path / "config.toml", tmp_path / "whole", f"run.compile_cache={tmp_path / 'cache'}"
    path.write_text(to_toml(config))
    for p in run_of_two([str(path), cache], (whole, whole)):
        _, said = p.communicate(timeout=300)
        assert p.returncode == 0, said
    outs = tmp_path / "host-0", tmp_path / "host-1"
    words = [str(path), cache, f"checkpoint.folder={url}"]
    run = run_of_two(words, outs)
    wait_until(lambda: len(lines(outs[0])) >= 1 or run[0].poll() is not None, 200)
    run[1].send_signal(signal.SIGTERM)
    for p in run:
        _, said = p.communicate(timeout=60)
        assert p.returncode == 143 and "Traceback" not in said, said
    for p in run_of_two([*words, "--resume"], outs):
        _, said = p.communicate(timeout=300)
        assert p.returncode == 0, said
    assert timeless(outs[0]) == timeless(whole)
    assert not outs[1].exists() or not any(outs[1].iterdir())  # process 0 alone writes
    assert [p.name for p in (outs[0] / "checkpoints").iterdir()] == [".lock"]
    digest = [json.loads((out / "summary.json").read_text())["policy_digest"] for out in (whole, outs[0])]
    assert digest[0] == digest[1]
    export_run(outs[0], tmp_path / "model")
    export_run(whole, tmp_path / "model-of-whole")
    one, two = (tmp_path / name / "model.safetensors" for name in ("model", "model-of-whole"))
    assert one.read_bytes() == two.read_bytes()


def test_doctor_says_that_a_bucket_cannot_be_reached(url, server):
    config = small(checkpoint={"folder": url})
    assert unreachable(config) == []
    server.lock()
    try:
        assert f"{url} cannot be used" in unreachable(config)[0]
    finally:
        server.unlock()
