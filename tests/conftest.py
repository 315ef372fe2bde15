"""Fixtures that every test may use."""

import os
import pathlib
import signal

# Eight CPU devices for the sharding tests; must be said before jax starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Started in the background of a shell this process would ignore Ctrl-C, and so would every child that is sent one.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

ROOT = pathlib.Path(__file__).resolve().parents[1]


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


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("CZ_NO_SKIP") == "1":
        for r in terminalreporter.stats.get("skipped", []):
            terminalreporter.write_line(f"skipped, and CZ_NO_SKIP=1 allows none: {r.nodeid}: {r.longrepr[-1]}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped")
    if os.environ.get("CZ_NO_SKIP") == "1" and skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
