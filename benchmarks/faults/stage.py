"""A tiny text stage, and its processes on loopback."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from benchmarks.claims.stages import QUICK, ROOT, flags_of, overrides_of
from benchmarks.faults.plan import EVALUATE_EVERY, SAVE_EVERY, STEPS

# Over all processes of a run. Each sum is over two devices, so that it does not depend on the order in which processes
# add; with four, the runs of 1 and 4 processes differ in the last bits.
DEVICES, MESH = 4, (1, 2, 2)
START_SECONDS = 60  # how long processes wait for each other
# fake devices of one process wait for each other; on a busy machine they would give up after 40 seconds
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
COMPILE_FAST = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
_STEP = re.compile(r"^\S+ +(\d+)/\d+  loss ", re.M)


def command(
    workdir: str, records: str, stage: str = "text", mesh: tuple[int, ...] = MESH, **changes: object
) -> list[str]:
    """The command that trains a tiny stage; `changes` are settings by dotted name with "__" for "."."""
    settings = {
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.checkpoint_every": SAVE_EVERY,
        "evals.held_out.every": EVALUATE_EVERY,
        "data.records": records,
        "mesh": mesh,
    }
    settings = overrides_of(stage, "laptop", QUICK) | settings | {k.replace("__", "."): v for k, v in changes.items()}
    line = [sys.executable, "-m", "unimm_jax.main", f"--config={stage}:laptop", f"--workdir={workdir}"]
    return [*line, *flags_of(settings)]


def environment(processes: int, index: int, port: int, folder: pathlib.Path) -> dict[str, str]:
    """The environment of one process. Copies and temporary files are in `folder`, compiled programs beside it."""
    own = ("JAX_", "UNIMM_", "XLA_FLAGS")
    found = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    temporary, compiled = folder / "tmp", folder.parent / f"compiled{processes}"
    temporary.mkdir(parents=True, exist_ok=True)
    found |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COMPILE_FAST} {PATIENT} --xla_force_host_platform_device_count={DEVICES // processes}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "UNIMM_CACHE_DIR": str(folder / "copies"),
        "UNIMM_START_SECONDS": str(START_SECONDS),
        "TMPDIR": str(temporary),
    }
    if processes > 1:
        # Only the first process finds its programs in the cache. On a busy machine, the others would compile for longer
        # than the 30 s that the CPU backend waits for them.
        found["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        found["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        found |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
    return found


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Launch:
    """One start of all processes of a run.

    Args (constructor):
      line: the command. processes: how many. folder: for caches and logs. number: of the start, for the logs' names.
    """

    def __init__(self, line: list[str], processes: int, folder: pathlib.Path, number: int):
        self.began, port = time.monotonic(), free_port()
        self.logs = [folder / f"start{number}-process{index}.log" for index in range(processes)]
        self.processes, self.sent = [], [set() for _ in range(processes)]
        for index, log in enumerate(self.logs):
            with log.open("w") as stream:
                env = environment(processes, index, port, folder)
                self.processes.append(
                    subprocess.Popen(line, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT)
                )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def has_ended(self) -> bool:
        """Whether all processes have ended."""
        return all(p.poll() is not None for p in self.processes)

    def wait(self, seconds: float) -> bool:
        """Waits until all processes have ended, at most so long; whether they have."""
        until = time.monotonic() + seconds
        while not self.has_ended() and time.monotonic() < until:
            time.sleep(0.05)
        return self.has_ended()

    def send(self, number: signal.Signals, target: int = -1) -> None:
        """Sends a signal to a process, or to all with -1."""
        for index in range(len(self.processes)) if target < 0 else [target]:
            self.processes[index].send_signal(number)
            self.sent[index].add(int(number))

    def end(self) -> None:
        """Kills what still runs."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def said(self, index: int = 0) -> str:
        """What a process has printed."""
        return self.logs[index].read_text(errors="replace")

    def step(self) -> int:
        """The last step that was logged, 0 before the first."""
        found = _STEP.findall(self.said())
        return int(found[-1]) if found else 0

    def phase(self) -> str:
        """The phase that process 0 is in by its output; see `plan.Point`."""
        said = self.said()
        if step := self.step():
            return "end" if step == STEPS else "train"
        return "compile" if " parameters, " in said else "start"
