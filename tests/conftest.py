"""Fixtures that tests share. Stages are trained once per session; see `helpers.py` for their configs."""

import contextlib
import fcntl
import logging
import os
import pathlib
import random
import subprocess
import sys
import time
import urllib.request

import pytest

from unimm_jax import process

# Tests compile much and run little.
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
)
process.prepare(keep_memory=False)
os.environ.setdefault("UNIMM_TRACEBACK", "1")
# gcsfs asks Google for the type of each bucket otherwise
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


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


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """gs://bucket on a server of this machine (`object_store.py`); the variables that name it stay set.

    STORAGE_EMULATOR_HOST names another server, one without faults, such as `gcp-storage-emulator`.
    """
    import helpers

    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "x"
    os.environ["UNIMM_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    if other := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = other
        yield "gs://bucket"
        return
    port = helpers.free_port()
    words = [sys.executable, str(helpers.ROOT / "tests" / "object_store.py"), str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    os.environ |= {name: url for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")}
    for _ in range(100):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/storage/v1/b/bucket")
            break
        time.sleep(0.1)
    else:
        raise RuntimeError(f"tests/object_store.py does not answer at {url}")
    yield "gs://bucket"
    server.kill()
    server.wait()


class Faulty:
    """A WSGI application of which a share of the requests fails: 503, or a body that is cut in half."""

    def __init__(self, app):
        self.app, self.share, self.rng, self.failed = app, 0.0, random.Random(0), {"503": 0, "cut": 0}

    def __call__(self, environ, start_response):
        fault = self.rng.choice(list(self.failed)) if self.rng.random() < self.share else ""
        if fault == "503":
            self.failed[fault] += 1
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.app(environ, start_response))
        if fault != "cut" or environ["REQUEST_METHOD"] != "GET" or len(body) < 2:
            return [body]
        self.failed[fault] += 1
        return [body[: len(body) // 2]]


@pytest.fixture(scope="session")
def s3_server():
    """The application of moto, as `Faulty`, on a server of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = Faulty(server._server.app)
    yield server
    server.stop()


@pytest.fixture
def s3_faults(s3_server):
    """Makes a fifth of the requests to s3://bucket fail; how many have, by kind."""
    app = s3_server._server.app
    app.share, app.rng, app.failed = 0.2, random.Random(0), dict.fromkeys(app.failed, 0)
    yield app.failed
    app.share = 0.0


@pytest.fixture(scope="session")
def s3_bucket(s3_server):
    """s3://bucket on `s3_server`; the variables that name it stay set."""
    host, port = s3_server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    import s3fs

    s3fs.S3FileSystem().mkdir("bucket")
    return "s3://bucket"
