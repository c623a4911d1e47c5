"""Several processes: start-up with clear errors, preemption that stops all at one step, a watchdog for hangs."""

import contextlib
import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from unimm_jax import tpu_hosts, variables
from unimm_jax.errors import StartupError

START_SECONDS = 300  # how long processes wait for each other at the start
STOPPED = 128 + signal.SIGTERM  # exit status after SIGTERM: not 0, so that scripts stop and launchers start it again
PROBE_SECONDS = 10  # how long a shared disk may take to show a new file to another host
HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this long counts as lost, and all others exit


def start() -> None:
    """Connects to the other processes of a run, and finds the devices.

    Raises:
      StartupError: see `connect` and `find_devices`.
    """
    connect()
    find_devices()


def find_devices() -> list[jax.Device]:
    """The devices of all processes.

    Raises:
      StartupError: JAX finds none.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform that was asked for is there
        reason = " ".join(str(error).split())[:300] or "no such platform is installed"
        asked = f" (JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']})" if os.environ.get("JAX_PLATFORMS") else ""
        raise StartupError(
            f"JAX finds no devices{asked}: {reason}. Install what they need (pip install 'jax[tpu]' or 'jax[cuda13]'), "
            "and end other processes that hold them"
        ) from None


def connect(seconds: int = 0) -> None:
    """Connects to the other processes of a run; does nothing in a single process.

    On TPUs with several hosts, JAX finds them by itself. Elsewhere environment variables name them:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    Args:
      seconds: limit of the wait; UNIMM_START_SECONDS, or `START_SECONDS`, if 0.

    Raises:
      StartupError: not all processes connected in time, or the address is unusable.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    seconds = seconds or int(variables.number("UNIMM_START_SECONDS", START_SECONDS))
    hosts = 1 if address else tpu_hosts.number_of_hosts()
    if not address and hosts == 1:
        return
    named: dict[str, Any] = dict(initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if address:
        try:
            count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise StartupError(
                "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES and JAX_PROCESS_ID are not both numbers"
            ) from None
        if count == 1:
            return
        if not 0 <= index < count:
            raise StartupError(f"JAX_PROCESS_ID is {index}; with JAX_NUM_PROCESSES {count} it is 0 to {count - 1}")
        named |= dict(coordinator_address=address, num_processes=count, process_id=index)
        where = f"process {index} of {count}, coordinator {address}"
    else:
        where = f"{hosts} hosts of a TPU"
    causes = (
        f"the processes of this run did not connect ({where}, waited {{}} s). Likely causes: not every host "
        "was started with the same command and JAX_NUM_PROCESSES; the coordinator's port is taken or closed by a "
        "firewall; a TPU is held by an earlier process (end it, or remove a stale /tmp/libtpu_lockfile)"
    )
    # At its timeout JAX may abort the process without an exception, so the causes are printed just before.
    warning = threading.Timer(seconds * 0.9, _print_error, [causes.format(seconds)])
    warning.daemon = True
    warning.start()
    began = time.monotonic()
    try:
        jax.distributed.initialize(**named, shutdown_timeout_seconds=60)
    except Exception as error:
        waited = round(time.monotonic() - began)
        raise StartupError(f"{causes.format(waited)}. JAX says: {str(error).splitlines()[0]}") from None
    finally:
        warning.cancel()


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def check_shared(folder: pathlib.Path, flag: str = "workdir") -> None:
    """Checks that all processes see the same directory: the first one writes a file there, the others look for it.

    Processes that exchange data late call this while they are in step: their connections time out otherwise.

    Args:
      folder: created if missing. flag: that names it, for the message.

    Raises:
      StartupError: in every process; names those that do not see the file.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    token = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))
    file = folder / f".probe-{bytes(np.asarray(token)).hex()}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".probe-*"):  # by a process that was killed, or whose disk was full
            left.unlink(missing_ok=True)
        file.write_bytes(b"-")
    multihost_utils.sync_global_devices("the probe is written")
    began = time.monotonic()
    while not (found := file.exists()) and time.monotonic() - began < PROBE_SECONDS:
        time.sleep(0.5)
    seen = np.asarray(multihost_utils.process_allgather(np.array(found))).reshape(-1)
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(~seen).tolist()))
        raise StartupError(
            f"process {blind} of {len(seen)} does not see the {flag} {folder} of process 0: it is a directory of its "
            f"own there. Give --{flag} on a disk that all hosts share, or on an object store (gs://…)"
        )


def gather(data: bytes) -> list[bytes]:
    """The bytes that each process gives, of any length, by the number of the process; the same list in all of them."""
    if jax.process_count() == 1:
        return [data]
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(data)))).reshape(-1)
    padded = np.frombuffer(data.ljust(int(sizes.max()), b" "), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(found, sizes.tolist(), strict=True)]


def of_first_process(answers: Sequence[bool]) -> list[bool]:
    """The answers of process 0 to yes-or-no questions, in every process. Each process asks as many questions."""
    if jax.process_count() == 1:
        return list(answers)
    from jax.experimental import multihost_utils

    found = multihost_utils.broadcast_one_to_all(np.array(answers, np.int32))
    return [bool(x) for x in np.asarray(found)]


@contextlib.contextmanager
def stop_signal() -> Iterator[Any]:
    """A function of the step that says whether to stop there: SIGTERM reached this process, or any of several.

    Several processes agree on one step, some steps after the signal.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    seen: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    except ValueError:  # not the main thread, which alone can receive signals
        yield lambda step: False
        return
    try:
        yield lambda step: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


class Watchdog:
    """Prints the stacks of all threads when no step ends in time (`faulthandler.dump_traceback_later`).

    Args (constructor):
      seconds: without a `beat`; 0 is never.
    """

    REARM_SECONDS = 1.0  # arming starts a thread, so it is not done at every step

    def __init__(self, seconds: float):
        self.seconds, self._armed = seconds, 0.0
        self.beat()

    def beat(self) -> None:
        """Records that a step has ended."""
        now = time.monotonic()
        if self.seconds and now - self._armed > min(self.REARM_SECONDS, self.seconds / 4):
            self._armed = now
            faulthandler.dump_traceback_later(self.seconds, file=sys.stderr)

    def close(self) -> None:
        """Stops watching."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
