"""Settings of a process and how errors are reported."""

import errno
import os
import subprocess
import sys
import threading
import time
import types

import pytest
from helpers import ROOT

from unimm_jax import process
from unimm_jax.errors import ConfigError


def test_without_an_accelerator_the_platform_is_cpu_before_jax_is_imported(monkeypatch):
    """An installed libtpu would otherwise print errors while it looks for a TPU."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(process, "has_accelerator", lambda: False)
    process.prepare(keep_memory=False)
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(process, "has_accelerator", lambda: True)
    process.prepare(keep_memory=False)
    assert "JAX_PLATFORMS" not in os.environ


def test_importing_process_imports_no_jax():
    script = "import sys, unimm_jax.process; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_errors_of_an_object_store_are_one_line(monkeypatch):
    import aiohttp

    monkeypatch.delenv("UNIMM_TRACEBACK", raising=False)

    def unreachable():
        try:
            raise aiohttp.ClientConnectionError("Cannot connect to host storage.googleapis.com:443\nmore")
        except aiohttp.ClientConnectionError as error:
            raise RuntimeError("a library in between") from error

    def refused():
        raise ValueError('Error opening "zarr" driver: Error reading gs://bucket/run/x: PERMISSION_DENIED: no access')

    for failing, part in ((unreachable, "Cannot connect to host"), (refused, "PERMISSION_DENIED")):
        with pytest.raises(SystemExit) as error:
            process.run(failing)
        line = str(error.value.code)
        assert line.startswith("error: the object store refuses or cannot be reached") and "\n" not in line
        assert part in line and "gcloud auth application-default login" in line


def test_user_errors_are_one_line_and_others_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.delenv("UNIMM_TRACEBACK", raising=False)

    def mistake():
        raise ConfigError("config.train.steps is 0; it must be at least 1")

    with pytest.raises(SystemExit) as error:
        process.run(mistake)
    assert error.value.code == "error: config.train.steps is 0; it must be at least 1"

    with pytest.raises(SystemExit) as error:
        process.run(lambda: 1 / 0)
    assert "this is a bug in unimm_jax" in error.value.code
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setenv("UNIMM_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        process.run(mistake)


def test_the_version_is_printed(capsys):
    process.app(lambda: 1 / 0, argv=["x", "--version"])
    from unimm_jax import __version__

    assert capsys.readouterr().out == f"unimm_jax {__version__}\n"


def test_one_of_several_processes_does_not_wait_long_for_the_others(monkeypatch, capsys):
    """JAX would wait for a minute and then abort the process."""

    def never(*args):
        threading.Event().wait()

    distributed = types.SimpleNamespace(is_initialized=lambda: True, shutdown=never)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(distributed=distributed))
    monkeypatch.delenv("UNIMM_TRACEBACK", raising=False)
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(f"status {status}")))

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/metrics.jsonl")

    began = time.monotonic()
    with pytest.raises(SystemExit, match="status 1"):
        process.run(full)
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == "error: /disk/metrics.jsonl: No space left on device; free some space\n"


def test_threads_log_a_failed_write_once_in_one_line(monkeypatch, caplog):
    """Orbax's threads log tracebacks."""
    from absl import logging as absl_logging

    monkeypatch.delenv("UNIMM_TRACEBACK", raising=False)

    def log(error):
        try:
            raise error
        except type(error):
            absl_logging.exception("thread 3: %s", error)

    def command():
        for _ in range(2):
            log(OSError(errno.ENOSPC, "No space left on device", "/disk/x"))
        log(KeyError("a bug"))

        log(Lost("DEADLINE_EXCEEDED: GetKeyValue() timed out"))

    class Lost(Exception):
        pass

    errors = types.SimpleNamespace(JaxRuntimeError=Lost)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(errors=errors, process_count=lambda: 2))
    process.run(command)
    full, bug, lost = caplog.records
    assert lost.getMessage().startswith("another process of this run has ended") and not lost.exc_info
    assert (full.getMessage(), full.exc_info) == ("/disk/x: No space left on device; free some space", None)
    assert bug.getMessage() == "thread 3: 'a bug'"
    assert bug.exc_info


@pytest.mark.parametrize(
    "error, is_lost",
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:59053"), True),
        (ValueError("could not broadcast input array"), False),
        (ValueError(""), False),
        (KeyError("UNKNOWN: x"), False),
    ],
)
def test_a_collective_that_fails_when_it_is_dispatched(monkeypatch, error, is_lost):
    errors = types.SimpleNamespace(JaxRuntimeError=type("JaxRuntimeError", (Exception,), {}))
    jax = types.SimpleNamespace(errors=errors, process_count=lambda: 2)
    monkeypatch.setitem(sys.modules, "jax", jax)
    assert (process._lost_process(error) is not None) is is_lost
    jax.process_count = lambda: 1
    assert process._lost_process(error) is None


def test_a_process_that_is_lost_while_others_save(monkeypatch):
    errors = types.SimpleNamespace(JaxRuntimeError=type("JaxRuntimeError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(errors=errors, process_count=lambda: 2))
    error = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    assert process._lost_process(error) is None
    error.__cause__ = errors.JaxRuntimeError(
        "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE\nmore"
    )
    assert "has ended or cannot be reached (INTERNAL: Barrier failed" in process._lost_process(error)
    error.__cause__ = OSError("no route to host")
    assert process._lost_process(error) is None


def test_what_tensorstore_prints_after_a_failed_write_is_dropped(monkeypatch):
    monkeypatch.delenv("UNIMM_TRACEBACK", raising=False)
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    process.run(lambda: None)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(found.exc_value) for found in shown] == ["another"]
