"""Many processes: a start that explains itself, preemption that stops all at one step, a watchdog over hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

START_SECONDS = 300  # how long the hosts wait for one another
SILENCE_SECONDS = 30  # after this long without a sign of life a process counts as gone, and all others end


class StartFailed(Exception):
    """The processes did not find one another; the message names the likely causes."""


def start() -> None:
    """Joins the other processes of a run; alone, does nothing.

    On TPU pods JAX finds the hosts by itself. Elsewhere the environment names them: JAX_COORDINATOR_ADDRESS (host:port
    of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID. UNIMM_START_SECONDS bounds the wait.

    Raises:
      StartFailed: not all came in time, or the address cannot be used.
    """
    address, seconds = (
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        int(os.environ.get("UNIMM_START_SECONDS", START_SECONDS)),
    )
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    if not address and not pod:
        return
    named: dict[str, Any] = dict(initialization_timeout=seconds, heartbeat_timeout_seconds=SILENCE_SECONDS)
    if address:
        try:
            count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise StartFailed(
                "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES and JAX_PROCESS_ID are not both numbers"
            ) from None
        if count == 1:
            return
        if not 0 <= index < count:
            raise StartFailed(f"JAX_PROCESS_ID is {index}; with JAX_NUM_PROCESSES {count} it is 0 to {count - 1}")
        named |= dict(coordinator_address=address, num_processes=count, process_id=index)
        where = f"process {index} of {count}, coordinator {address}"
    else:
        where = "a TPU pod"
    causes = (
        f"the processes of this run did not find one another ({where}, waited {{}} s). Likely causes: not every host "
        "was started with the same command and JAX_NUM_PROCESSES; the coordinator's port is taken or closed by a "
        "firewall; a TPU is held by an earlier process (end it, or remove a stale /tmp/libtpu_lockfile)"
    )
    # When its own time is over JAX may abort the process without an exception, so the causes are said just before.
    say = lambda: print(f"error: {causes.format(seconds)}", file=sys.stderr, flush=True)
    last_word = threading.Timer(seconds * 0.9, say)
    last_word.daemon = True
    last_word.start()
    began = time.monotonic()
    try:
        jax.distributed.initialize(**named, shutdown_timeout_seconds=60)
    except Exception as error:
        waited = round(time.monotonic() - began)
        raise StartFailed(f"{causes.format(waited)}. JAX says: {str(error).splitlines()[0]}") from None
    finally:
        last_word.cancel()


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
    except ValueError:  # not the main thread: nobody can send us the signal
        yield lambda step: False
        return
    try:
        yield lambda step: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


class Watchdog:
    """Prints the stacks of all threads when no step ends in time, once a silence.

    Args (constructor):
      seconds: without a `beat`; 0 is never.
    """

    def __init__(self, seconds: float):
        self.seconds, self._last, self._told, self._end = seconds, time.monotonic(), False, threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        """A step has ended."""
        self._last, self._told = time.monotonic(), False

    def close(self) -> None:
        """Stops watching."""
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(min(self.seconds / 4, 5)):
            silent = time.monotonic() - self._last
            if silent > self.seconds and not self._told:
                self._told = True
                print(f"watchdog: no step has ended for {silent:.0f} s; what every thread is doing:", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
