"""Settings of a command's process, and how commands report errors.

`prepare()` runs before the first import of JAX. `run()` wraps what a command does.
"""

import contextlib
import ctypes
import errno
import logging
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from unimm_jax import __version__, storage
from unimm_jax.errors import StorageError, UserError

# Failures of the machine rather than of the code. The message of the operating system names the file.
_DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "give a directory that can be written",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EEXIST: "there is a file where a directory is needed; give another path",
    errno.ENOTDIR: "there is a file where a directory is needed; give another path",
    errno.EISDIR: "there is a directory where a file is needed; give another path",
    errno.ELOOP: "a symbolic link points to itself",
}
_DISK_WORDS = ("No space left on device", "Read-only file system", "Permission denied", "Disk quota exceeded")
LEAVE_SECONDS = 10  # how long a process that stops waits for the others to do so
LOST_PROCESS = 75  # exit status where another process of the run has ended; EX_TEMPFAIL: start it again


def prepare(keep_memory: bool = True) -> None:
    """Configures the platform, the compilation cache and logging. Must run before JAX is imported.

    Args:
      keep_memory: on CPUs, keep freed memory for the next step. Steps get faster, compilation gets slower.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # C++ logs from warnings on
    os.environ.setdefault("PILLOW_BLOCKS_MAX", "64")  # decoding threads reuse memory instead of mapping it again
    if sys.platform == "linux" and not has_accelerator():
        # An installed libtpu or CUDA plugin would otherwise print errors while it looks for devices.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        if "xla_cpu_opt_preset" not in os.environ.get("XLA_FLAGS", ""):
            preset = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_RUNTIME"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {preset}".strip()
        if keep_memory:
            _keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path.home() / ".cache" / "unimm_jax" / "xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def has_accelerator() -> bool:
    """Whether this machine has the device files of a TPU or a GPU."""
    patterns = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "dxg", "kfd")  # TPU, TPU, NVIDIA, WSL, AMD
    return any(True for pattern in patterns for _ in pathlib.Path("/dev").glob(pattern))


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory. XLA's CPU buffers would otherwise be mapped and zeroed again at each step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
        for name, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_arena_max, 1), (m_top_pad, 2**28)):
            mallopt(name, value)


def app(command: Callable[[], None], *, argv: list[str] | None = None) -> None:
    """Parses flags and runs a command under absl. `--version` prints the version instead.

    Args:
      command: what the command does, once flags are parsed.
      argv: command line; `sys.argv` if None.
    """
    from absl import app as absl_app
    from absl import logging as absl_logging

    if "--version" in (sys.argv if argv is None else argv):
        print(f"unimm_jax {__version__}")
        return

    def main(_: list[str]) -> None:
        absl_logging.set_verbosity(absl_logging.WARNING)  # absl resets its level when an app starts
        run(command)

    absl_app.run(main, argv=argv)


def run(command: Callable[[], None]) -> None:
    """Runs a command. A `UserError` prints one line and exits with status 1; a bug keeps its traceback.

    UNIMM_TRACEBACK=1 keeps the traceback of user errors, too.
    """
    shorten = _shorten_explained()
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(shorten)
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
    try:
        command()
    except UserError as error:
        if os.environ.get("UNIMM_TRACEBACK"):
            raise
        _stop(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except Exception as error:
        if (reason := explain(error)) is not None:
            _stop(f"error: {reason}")
        if (reason := _lost_process(error)) is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(LOST_PROCESS)  # a normal exit would wait for the other processes
        traceback.print_exc()
        _stop("error: this is a bug in unimm_jax, not in your input; please report it with the traceback above")


def _shorten_explained() -> Callable[[logging.LogRecord], bool]:
    """A filter for Orbax's threads and tasks, which all log a traceback if a write fails or another process ends: one
    line for an error that `run` would explain, once."""
    said = set()

    def is_new(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or os.environ.get("UNIMM_TRACEBACK"):
            return True
        reason = explain(error) or _lost_process(error)
        if reason is None:
            return True
        record.msg, record.args, record.exc_info = reason, (), None
        is_repeated = reason in said
        said.add(reason)
        return not is_repeated

    return is_new


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """An unraisable hook without what TensorStore's threads print when writes end after the first one has failed: their
    event loop is closed then. The failure itself is raised."""

    def show(found: Any) -> None:
        is_loop = found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"
        if not is_loop or os.environ.get("UNIMM_TRACEBACK"):
            hook(found)

    return show


def _stop(message: str) -> NoReturn:
    """Prints a message and exits with status 1.

    One of several processes waits until the others stop, too, but not for long. A normal exit would wait for a minute
    and be aborted by JAX, and the others, which wait for this process, would not hear of it until then.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)

    def leave() -> None:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
    sys.stdout.flush()
    os._exit(1)


def explain(error: BaseException) -> str | None:
    """One line for an error that a user can fix: a `UserError`, a disk, an object store; None for other errors."""
    if isinstance(error, UserError):
        return str(error)
    return _disk_failure(error) or _store_failure(error)


def _disk_failure(error: BaseException) -> str | None:
    """One line for a full, read-only or forbidden disk anywhere in the chain of causes; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRORS:
            where = f"{seen.filename}: " if seen.filename else ""
            return f"{where}{seen.strerror}; {_DISK_ERRORS[seen.errno]}"
        for line in str(seen).splitlines():
            if word := next((word for word in _DISK_WORDS if word in line), None):
                shown = line.strip() if len(line) <= 300 else f"{line.strip()[:240]} ...: {word}"
                return f"{shown}; free space or give a directory that can be written"
        seen = seen.__cause__ or seen.__context__
    return None


def _store_failure(error: BaseException) -> str | None:
    """One line for an object store that refuses or does not answer, anywhere in the chain of causes; else None."""
    seen: BaseException | None = error
    while seen is not None:
        modules = [type(seen).__module__]
        if isinstance(seen, OSError) and not isinstance(seen, FileNotFoundError):
            modules.append(_raised_in(seen))  # gcsfs raises an OSError for a forbidden bucket
        is_of_store = any(name.partition(".")[0] in storage.STORE_PACKAGES for name in modules)
        if isinstance(seen, StorageError) or is_of_store or re.search(r"Error \w+ (gs|s3)://", str(seen)):
            return str(seen) if isinstance(seen, StorageError) else storage.refusal(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def _raised_in(error: BaseException) -> str:
    """The module that raised an error; empty if it was not raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


def _lost_process(error: BaseException) -> str | None:
    """One line when another process of a run ended; None for other errors."""
    jax = sys.modules.get("jax")
    if jax is None or jax.process_count() == 1:
        return None
    if isinstance(error, TimeoutError) and error.__cause__ is not None:
        error = error.__cause__  # Orbax's, when processes wait for each other after a save
    cause = next(iter(str(error).splitlines()), "")
    # dispatch raises a ValueError where a collective fails at once
    is_collective = isinstance(error, ValueError) and re.match(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED): ", cause)
    if not isinstance(error, jax.errors.JaxRuntimeError) and not is_collective:
        return None
    if cause.startswith(("INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "NOT_FOUND")):
        return None  # of this process
    return (
        f"another process of this run has ended or cannot be reached ({cause}). Start all processes again; the run "
        "resumes from its newest checkpoint"
    )
