"""Fixtures that tests share. Stages are trained once per session; see `helpers.py` for their configs."""

import fcntl
import os
import pathlib
import sys

import pytest

from unimm_jax import process

# Tests compile much and run little.
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
)
process.prepare(keep_memory=False)
os.environ.setdefault("UNIMM_TRACEBACK", "1")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="Rewrite golden files with what the code gives now.")


def pytest_collection_modifyitems(items):
    """Long tests first, so that no worker waits for another at the end; then those that need trained stages.

    The second worker starts in the middle, with tests that do not wait for the stages which the first one trains.
    """
    first = ("test_sharding.py", "test_distributed.py", "test_train.py", "test_export.py")
    items.sort(key=lambda item: 0 if item.path.name in first else 1 if "run" in item.fixturenames else 2)


@pytest.fixture
def update_golden(request):
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A directory with every tiny stage trained: encoder … stage3. Workers of pytest-xdist share it; do not write."""
    import helpers

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "run"
    with open(f"{root}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        helpers.train_tiny_stages(root)  # stages that another worker has finished do nothing here
    return root
