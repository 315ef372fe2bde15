"""Fixtures that every test may use."""

import os
import pathlib
import shutil
import signal
import sys

# Eight CPU devices for the sharding tests; must be said before jax starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Started in the background of a shell this process would ignore Ctrl-C, and so would every child that is sent one.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
jax.devices()  # JAX starts here, with all eight, and not in a test that sets variables of its own

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_REDIS = "no valkey-server or redis-server here (apt install redis-server): the relay's store on Redis is not tested"
NO_BROWSER = "no chromium here (apt install chromium): the relay's page is not looked at in a browser"
MAY_SKIP = (NO_REDIS, NO_BROWSER)  # programs that no package of ours brings; CZ_NO_SKIP=1 tells of these and goes on


@pytest.fixture(scope="session")
def shared():
    """The folder of real tokenizers, model configs and data beside the checkout, where there is one."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with real tokenizers, model configs and data beside this checkout")
    return folder


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: transformers' own forward pass cannot be run")


@pytest.fixture(scope="session")
def redis_program():
    """The path of a Valkey or Redis server."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        pytest.skip(NO_REDIS)
    return found


@pytest.fixture(scope="session")
def browser():
    """The path of a Chromium."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip(NO_BROWSER)
    return found


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """Each compiled program keeps some mappings of memory, of which Linux gives a process 65,530: the compiler crashes
    beyond them, and all tests together come near."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def may_skip(report) -> bool:
    return isinstance(report.longrepr, tuple) and report.longrepr[-1].removeprefix("Skipped: ") in MAY_SKIP


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("CZ_NO_SKIP") == "1":
        for r in terminalreporter.stats.get("skipped", []):
            told = "skipped" if may_skip(r) else "skipped, and CZ_NO_SKIP=1 does not allow it"
            terminalreporter.write_line(f"{told}: {r.nodeid}: {r.longrepr[-1]}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    if os.environ.get("CZ_NO_SKIP") == "1" and exitstatus == 0 and not all(map(may_skip, skipped)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
