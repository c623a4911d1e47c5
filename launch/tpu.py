#!/usr/bin/env python3
"""Runs a command on Cloud TPUs: creates them, installs this clone, follows the run, and repeats it after preemption.

  python launch/tpu.py up my-run --zone=us-west4-a --type=v5litepod-16 --provisioning=spot -- \
    python -m unimm_jax.main --config=stage2:7b --workdir=gs://my-bucket/runs/stage2

`up` does what `create`, `install` and `run` do one by one. The command runs on every host in the same way, and must
resume when it is started again, as `unimm_jax.main` does with a workdir on object storage. The log of the first host is
shown. If the TPU is preempted, it is requested again and the command starts again. If a host is lost, the command
starts again on all hosts. With --dry-run, every command is printed and none is run. `render` prints the same run for
xpk, as a JobSet for GKE, or as a SkyPilot task.

It needs the Google Cloud CLI (gcloud) and nothing beyond Python's standard library. docs/tpu.md is a walk-through.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch import tpu_manifests  # noqa: E402
from launch.tpu_types import TpuType, tpu_type  # noqa: E402

PROVISIONING = ("on-demand", "spot", "reserved", "flex-start")
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
STOPPED = 143  # exit status of a command that was stopped by SIGTERM, as before a preemption
GONE = 255  # stands for a host on which the command neither runs nor has left a status, as after a restart of the host
REPEATED = tpu_manifests.RECOVERED | {GONE: "is gone"}  # after these, the command starts again
VAIN = 10  # attempts in a row that failed soon, on a TPU that is there
SOON_SECONDS = 1800
STUCK_SECONDS = 300  # how long hosts may go on after the command has failed on another one
FOLLOW_SECONDS = 120  # how long a connection shows the log until the hosts are asked whether the command still runs
LONGEST, SHORT = 3600, 120  # seconds until a call of gcloud is given up: one that installs, one that asks
TAIL = 30  # last lines of the log of a host on which the command failed
PATIENCE = 8  # calls of gcloud until an error that passes counts as one
LEAVING = ("SUSPENDING", "DELETING")  # states in which gcloud refuses to delete a request
LOST = ("FAILED", "SUSPENDED", *LEAVING)  # a request that will not become active again
REFUSED = 3  # requests in a row that failed before there was a TPU
TEXT: dict[str, Any] = dict(text=True, errors="replace")  # a log can have any bytes
TREE = "unimm"  # directory in the home directory of every host
INSTALL = (
    "python3 -m pip install --quiet --user uv && "
    "python3 -m uv venv --quiet --clear --python 3.12 venv && "
    "python3 -m uv pip install --quiet --python venv/bin/python './src[tpu,gcs]'"
)
# What gcloud says → what a user can do
REMEDIES = {
    "quota": "ask for more quota at console.cloud.google.com/iam-admin/quotas, or use another --type or --zone",
    "capacity": "try again later, in another --zone, or with --provisioning=spot or flex-start",
    "zone": "give a --zone that has this type: cloud.google.com/tpu/docs/regions-zones",
    "permission": "give the account the role roles/tpu.admin and run: gcloud services enable tpu.googleapis.com",
    "exists": "another request has this name; delete it with: python launch/tpu.py delete NAME --zone=ZONE",
    "login": "log in with: gcloud auth login",
}
SIGNS = {  # part of gcloud's message, lower case → key of REMEDIES; the first match counts
    "permission denied on 'locations": "zone",
    "has not been used in project": "permission",
    "authentication scopes": "login",
    "permission": "permission",
    "credentials": "login",
    "auth login": "login",
    "quota": "quota",
    "no more capacity": "capacity",
    "resource_exhausted": "capacity",
    "already exists": "exists",
    "unknown zone": "zone",
    "invalid zone": "zone",
    "does not have": "zone",
}
PASSING = (  # parts of messages about errors that pass, lower case
    "unavailable", "internal error", "internal: ", "deadline_exceeded", "deadline exceeded", "too many requests",
    "rate limit", "timed out", "timeout", "connection", "temporar", "name resolution", "could not reach",
    "unable to find the server", "httpsconnectionpool", "server error", f"no answer within {SHORT} s",
)  # fmt: skip


class LaunchError(Exception):
    """What a user can mend; the message is one line."""


class Unreachable(LaunchError):
    """Google Cloud does not answer, for as long as `Gcloud.ask` tries: nothing is known about the TPU."""


class Busy(LaunchError):
    """Another command is running on the TPU."""


class Lost(Exception):
    """The TPU is gone, or its hosts cannot be reached."""


class Ended(Lost):
    """The command has ended and has to start again, on all hosts."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say.

    Attributes:
      name: of the request and its nodes. zone, project: where; an empty project is that of gcloud's settings.
      kind: the type of the TPU. slices: number of slices, connected by the data center's network.
      provisioning: one of `PROVISIONING`. hours: longest run, for flex-start. wait_hours: after which a request that is
      still waiting ends, 0 for never. runtime: image of the hosts.
      command: what runs on every host, in the clone. env: variables for it, "NAME=VALUE".
      install: command that installs, in the directory `TREE`, where the clone is in `src`; it makes `venv`.
      retries: how often a TPU that was lost is requested again. poll: seconds between two looks at its state.
      dry_run: print the commands only.
    """

    name: str
    zone: str
    project: str
    kind: TpuType
    slices: int
    provisioning: str
    hours: int
    wait_hours: int
    runtime: str
    command: tuple[str, ...]
    env: tuple[str, ...]
    install: str
    retries: int
    poll: float
    dry_run: bool

    @property
    def nodes(self) -> list[str]:
        """Names of the TPU VMs, one for each slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    def line(self, action: str) -> str:
        """The command line of this launcher that does something else with the same TPU."""
        words = ["python launch/tpu.py", action, self.name, f"--zone={self.zone}"]
        words += [f"--project={self.project}"] if self.project else []
        return " ".join([*words, *([f"--slices={self.slices}"] if self.slices > 1 else [])])


def say(text: str) -> None:
    """Prints a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def error_of(message: str) -> str:
    """What gcloud's output says from its error on, without warnings before it."""
    lines = message.splitlines()
    return "\n".join(lines[next((i for i, line in enumerate(lines) if line.startswith("ERROR")), 0) :])


def remedy_of(message: str) -> str:
    """What a user can do about an error of gcloud; empty if it is not known."""
    error = error_of(message).lower()
    return REMEDIES.get(next((key for sign, key in SIGNS.items() if sign in error), ""), "")


def one_line(message: str) -> str:
    """The line of an output that states the error: that of the command on a host rather than gcloud's about it."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("#####")]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    of_command = [line for line in errors if not line.startswith("ERROR: (gcloud")]
    return next(iter([*of_command, *errors, *lines[-1:]]), "no output")


def passes(message: str) -> bool:
    """Whether an error of gcloud may be gone at the next call."""
    error = error_of(message).lower()
    lasting = any(sign in error for sign, key in SIGNS.items() if key != "login")  # a login needs the network, too
    return "per minute" in error or (any(sign in error for sign in PASSING) and not lasting)


def error_from(done: "subprocess.CompletedProcess[str]") -> LaunchError:
    """The error of a command of gcloud that has failed; `Unreachable` if it may be gone at the next call."""
    hint = remedy_of(done.stderr)
    kind = Unreachable if passes(done.stderr) else LaunchError
    message = f"gcloud failed: {one_line(done.stderr or done.stdout)}"
    return kind(message + (f". To mend it: {hint}" if hint else ""))


class Gcloud:
    """Calls gcloud for one zone and project."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def line(self, *words: str, track: str = "") -> list[str]:
        """A command with its zone and project; `track` is alpha or beta."""
        s = self.settings
        where = [f"--zone={s.zone}", *([f"--project={s.project}"] if s.project else [])]
        return ["gcloud", *([track] if track else []), "compute", "tpus", *words, *where, "--quiet"]

    def call(self, *words: str, track: str = "") -> str:
        """Runs a command and returns its output; in a dry run it is printed.

        Raises:
          LaunchError: it failed.
        """
        line = self.line(*words, track=track)
        if self.settings.dry_run:
            print(shlex.join(line))
            return ""
        done = self.ask(line)
        if done.returncode:
            raise error_from(done)
        return done.stdout

    def ask(self, line: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        """Runs a command line again, with pauses, while it fails with an error that passes."""
        for attempt in range(PATIENCE):
            done = self.run(line, SHORT if "describe" in line else LONGEST)
            if attempt and done.returncode and "create" in line and remedy_of(done.stderr) == REMEDIES["exists"]:
                return subprocess.CompletedProcess(line, 0, "", "")  # the attempt before made it
            if not done.returncode or not passes(done.stderr) or attempt == PATIENCE - 1:
                break
            say(f"gcloud: {one_line(done.stderr)}; trying again")
            time.sleep(min(self.settings.poll, 60) * 2**attempt / 16)
        return done

    def run(self, line: Sequence[str], seconds: float = LONGEST) -> "subprocess.CompletedProcess[str]":
        """Runs a command line with its output captured; a host that vanishes does not end a connection, so it has a
        limit of `seconds`."""
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            with subprocess.Popen(line, start_new_session=True, **TEXT, **pipes) as process:  # type: ignore[call-overload]
                try:
                    said, error = process.communicate(timeout=seconds)
                except subprocess.TimeoutExpired:
                    end(process)
                    said, error = process.communicate()
                    error += f"\nERROR: no answer within {seconds:.0f} s"
                except BaseException:
                    end(process)
                    raise
                return subprocess.CompletedProcess(line, process.returncode, said, error)
        except FileNotFoundError:
            raise LaunchError("gcloud is not installed: cloud.google.com/sdk/docs/install") from None


def git(*words: str) -> str:
    """What git says about this clone.

    Raises:
      LaunchError: it is no clone, or git is not installed.
    """
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError("git is not installed; install needs it to know which files to copy") from None
    if done.returncode:
        raise LaunchError(
            f"git {words[0]} failed in {ROOT}: {one_line(done.stderr)}. To mend it: install needs a git clone"
        )
    return done.stdout.strip()


def end(process: "subprocess.Popen[str]") -> None:
    """Ends a process and its children."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Tpu:
    """A request for TPUs, and what runs on its hosts."""

    def __init__(self, settings: Settings):
        self.settings, self.gcloud = settings, Gcloud(settings)
        self.failed_requests = 0  # in a row
        self.is_requested = False  # then the TPU is there without this machine, and it is the one that was asked for

    # ---- The request -------------------------------------------------------------------------------------------------

    def state(self) -> str:
        """State of the request, empty if there is none."""
        state: str = self.describe().get("state", {}).get("state", "")
        return state

    def describe(self) -> dict[str, Any]:
        """The request as Google Cloud's API gives it, empty if there is none.

        Once the TPU is requested, it waits while Google Cloud cannot be reached: a command on the TPU goes on.

        Raises:
          Unreachable: gcloud fails with an error that passes. LaunchError: with another one.
        """
        while True:
            try:
                return self._describe()
            except Unreachable as error:
                if not self.is_requested:
                    raise
                say(f"{error}; waiting until Google Cloud answers, what runs on the TPU goes on")
                time.sleep(self.settings.poll)

    def _describe(self) -> dict[str, Any]:
        if self.settings.dry_run:
            return {}
        done = self.gcloud.ask(self.gcloud.line("queued-resources", "describe", self.settings.name, "--format=json"))
        error = error_of(done.stderr).lower()
        if done.returncode and "not_found" not in error and "not found" not in error:
            raise error_from(done)
        found: dict[str, Any] = json.loads(done.stdout) if not done.returncode else {}
        return found

    def create(self) -> None:
        """Requests the TPU."""
        s = self.settings
        nodes = [f"--node-id={s.name}"]
        if s.slices > 1:
            nodes = [f"--node-count={s.slices}", f"--node-prefix={s.name}"]
        tier = {
            "on-demand": [],
            "spot": ["--spot"],
            "reserved": ["--reserved"],
            "flex-start": ["--provisioning-model=flex-start", f"--max-run-duration={s.hours}h"],
        }[s.provisioning]
        tier += [f"--valid-until-duration={s.wait_hours}h"] if s.wait_hours else []
        kind = [f"--accelerator-type={s.kind.name}", f"--runtime-version={s.runtime}"]
        track = "alpha" if s.provisioning == "flex-start" else ""  # the only one that has its flags
        self.gcloud.call("queued-resources", "create", s.name, *nodes, *kind, *tier, track=track)
        self.is_requested = True

    def delete(self) -> None:
        """Deletes the request and its nodes."""
        self.gcloud.call("queued-resources", "delete", self.settings.name, "--force")

    def wait(self) -> None:
        """Waits until the TPU is there.

        Raises:
          Lost: the request failed, or ended.
          LaunchError: it waited for as long as it may, or `REFUSED` requests in a row failed.
        """
        began, before = time.monotonic(), ""
        while not self.settings.dry_run:
            found = self.describe()
            state = found.get("state", {}).get("state", "")
            if state != before:
                say(f"{self.settings.name}: {state or 'deleted'} after {time.monotonic() - began:.0f} s")
                before = state
            if state == "ACTIVE":
                self.failed_requests = 0
                return
            if state == "FAILED":
                self.failed_requests += 1
                reason = found["state"].get("failedData", {}).get("error", {}).get("message", "no reason is given")
                hours, limit = (time.monotonic() - began) / 3600, self.settings.wait_hours
                if limit and hours > 0.95 * limit:
                    raise LaunchError(f"the request waited for {limit} h (--wait-hours) without getting a TPU")
                if self.failed_requests == REFUSED:
                    raise LaunchError(f"{REFUSED} requests in a row failed: {one_line(reason)}")
                raise Lost(f"the request is FAILED: {one_line(reason)}")
            if state not in WAITING:
                raise Lost(f"the request is {state or 'deleted'}")
            time.sleep(self.settings.poll)

    # ---- Its hosts ---------------------------------------------------------------------------------------------------

    def ssh(self, node: str, command: str, seconds: float = LONGEST) -> str:
        """Runs a shell command on all hosts of a node, for so many seconds at most, and returns the output.

        Raises:
          Lost: a host cannot be reached, or the command fails there; names the host.
        """
        words = ("tpu-vm", "ssh", node, "--worker=all", f"--command={command}")
        if self.settings.dry_run:
            return self.gcloud.call(*words)
        done = self.gcloud.run(self.gcloud.line(*words), seconds)
        if done.returncode:
            which = self._unreachable(node) or "a worker"
            raise Lost(f"{which} of {node}: {one_line(done.stderr or done.stdout)}")
        return done.stdout

    def copy(self, file: pathlib.Path, node: str) -> None:
        """Copies a file to the home directory of all hosts of a node.

        Raises:
          Lost: a host cannot be reached; names the host.
        """
        try:
            self.gcloud.call("tpu-vm", "scp", str(file), f"{node}:{file.name}", "--worker=all")
        except LaunchError as error:
            raise Lost(f"{self._unreachable(node) or 'a worker'} of {node}: {error}") from None

    def _unreachable(self, node: str) -> str:
        """The hosts of a node that do not answer, such as "worker 3"; empty if all do."""
        hosts = range(self.settings.kind.hosts)
        lines = {i: self.gcloud.line("tpu-vm", "ssh", node, f"--worker={i}", "--command=true") for i in hosts}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            done = pool.map(lambda line: self.gcloud.run(line, SHORT).returncode, lines.values())
        bad = [str(i) for i, status in zip(lines, done, strict=True) if status]
        return f"worker {', '.join(bad)}" if bad else ""

    @functools.cached_property
    def version(self) -> str:
        """The commit of this clone when it was first asked for: a run that starts again does not change its code.

        Raises:
          LaunchError: it is no clone.
        """
        return git("rev-parse", "HEAD")

    def install(self) -> None:
        """Copies this clone (what is committed) to every host and installs it there; nothing on a host where it is, or
        where the command is running."""
        version = self.version
        mark = hashlib.sha256(f"{version} {self.settings.install}".encode()).hexdigest()[:16]
        with tempfile.TemporaryDirectory() as folder:
            archive = pathlib.Path(folder) / "unimm_jax.tar.gz"
            git("archive", "-o", str(archive), version)
            for node in self.settings.nodes:
                say(f"{node}: installing {version[:12]}")
                self.copy(archive, node)
                self.ssh(node, install_script(self.settings.install, mark))

    def start(self) -> None:
        """Starts the command on every host where it is not running.

        Its variables are copied as a file that only their owner can read: other users of a machine see command lines.

        Raises:
          Busy: another command is running there.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "unimm_jax.env"
            pairs = (entry.partition("=") for entry in self.settings.env)
            file.touch(0o600)
            lines = [f"export {name}={shlex.quote(value)}\n" for name, _, value in pairs]
            file.write_text("".join([f"export UNIMM_COMMIT={self.version}\n", *lines]))  # for the run card
            for node in self.settings.nodes:
                self.copy(file, node)
                if OTHER in self.ssh(node, start_script(self.settings.command)):
                    raise Busy(f"another command is running on {node}; stop it with: {self.settings.line('stop')}")

    def stop(self) -> None:
        """Stops the command on every host where it is running."""
        for node in self.settings.nodes:
            self.ssh(node, STOP_SCRIPT, 2 * SHORT)

    def log(self, worker: int, line: int, seconds: float) -> int:
        """Shows the log of a host of the first node from a line (from 1) on, until the command or the time ends.

        Returns:
          The number of the next line.
        """
        command = follow_script(line, seconds)
        words = ["tpu-vm", "ssh", self.settings.nodes[0], f"--worker={worker}", f"--command={command}"]
        if self.settings.dry_run:
            self.gcloud.call(*words)
            return line
        first, where = line, subprocess.DEVNULL
        with subprocess.Popen(
            self.gcloud.line(*words),
            stdin=where,
            stdout=subprocess.PIPE,
            stderr=where,
            start_new_session=True,
            **TEXT,
        ) as process:
            assert process.stdout is not None
            timer = threading.Timer(seconds + 60, end, [process])  # a host that vanishes does not end the connection
            timer.start()
            try:
                for text in process.stdout:
                    number, colon, said = text.partition(":")
                    # gcloud repeats a command whose connection broke, so lines can come twice
                    if colon and number.isdigit() and first + int(number) - 1 == line:
                        line += 1
                        print(said, end="", flush=True)
            finally:
                timer.cancel()
                end(process)
        return line

    def show(self, worker: int) -> None:
        """Shows the whole log of a host of the first node, until the command ends there."""
        self.log(worker, 1, 7 * 24 * 3600)

    def follow(self) -> int:
        """Shows the log of the first host until the command has ended everywhere; its exit status.

        When the command has failed on a host and does not end on the others, it is stopped there.

        Raises:
          Lost: the hosts are gone.
          Ended: the command has to start again.
        """
        self.is_requested = True
        line, failures, failed_at = self.log(0, 1, FOLLOW_SECONDS), 0, 0.0
        while not self.settings.dry_run:
            if (state := self.state()) != "ACTIVE":
                raise Lost(f"the request is {state or 'deleted'}")
            try:
                statuses = self.statuses()
                failures = 0
            except Lost:  # a network failure; the state says whether the TPU is there
                failures += 1
                if failures > 5:
                    raise
                statuses = {"": "running"}
            if "running" not in statuses.values():
                self.log(0, line, FOLLOW_SECONDS)  # what a broken connection has not shown
                return self._judge(statuses)
            if any(status not in ("0", "running") for status in statuses.values()):
                failed_at = failed_at or time.monotonic()  # the other hosts stop by themselves
                if time.monotonic() - failed_at > STUCK_SECONDS:
                    status = self._judge(statuses)
                    say("stopping the command on the other hosts")
                    with contextlib.suppress(Lost):
                        self.stop()
                    return status
            time.sleep(min(self.settings.poll, 5))
            line = self.log(0, line, min(FOLLOW_SECONDS, STUCK_SECONDS / 5) if failed_at else FOLLOW_SECONDS)
        return 0

    def statuses(self) -> dict[str, str]:
        """Exit status of the command on every host, by host; "running" where it has not ended."""
        found = {}
        for node in self.settings.nodes:
            for text in self.ssh(node, STATUS_SCRIPT, SHORT).splitlines():
                mark, _, rest = text.partition(" ")
                if mark == "unimm-status":
                    host, _, status = rest.rpartition(" ")
                    is_known = status == "running" or status.isdigit()  # not empty, as after a full disk
                    found[f"{node} {host}"] = status if is_known else str(GONE)
        if not found:
            raise Lost("no host says whether the command is running")
        return found

    def _judge(self, statuses: dict[str, str]) -> int:
        """The exit status of the command; shows the last lines of the log of hosts on which it failed.

        Raises:
          Ended: it has to start again.
        """
        bad = {host: int(status) for host, status in statuses.items() if status not in ("0", "running")}
        for host, status in bad.items():
            say(f"{host}: the command " + ("is gone" if status == GONE else f"ended with status {status}"))
        final = {host: status for host, status in bad.items() if status not in REPEATED}
        if set(bad.values()) - {STOPPED}:
            self.show_failures(final or bad)
        if final:
            return next(iter(final.values()))
        if bad:
            host, status = next(iter(bad.items()))
            raise Ended(f"the command {REPEATED[status]} on {host}")
        return 0

    def show_failures(self, hosts: Collection[str], most: int = 3) -> None:
        """Shows the last lines of the log of the first few of some hosts of each node."""
        for node in self.settings.nodes:
            try:
                said = self.ssh(node, TAIL_SCRIPT, SHORT).splitlines()
            except Lost as error:
                say(f"{node}: no log ({error})")
                continue
            for host in [host for host in hosts if host.startswith(f"{node} ")][:most]:
                marked = f"unimm-log {host.removeprefix(f'{node} ')} "
                lines = [text.removeprefix(marked) for text in said if text.startswith(marked)]
                print("\n".join([f"---- the last lines of {host}:", *lines]), flush=True)


# ---- What the hosts run ----------------------------------------------------------------------------------------------


# The processes of the command inherit this variable. The shell around them ends before a process that saves on SIGTERM,
# and a process may have a session of its own.
MARK = f'UNIMM_LAUNCH="$HOME/{TREE}"'
ALIVE = f"grep -qszFx {MARK} /proc/[0-9]*/environ"
RUNNING = f"[ ! -s status ] && {ALIVE}"
OTHER = "unimm-other"  # what a host prints on which another command is running


def install_script(install: str, mark: str) -> str:
    """Unpacks the clone and installs it, unless this version is installed or the command is running."""
    return (
        f'set -e; mkdir -p "$HOME/{TREE}"; cd "$HOME/{TREE}"; if {RUNNING}; then exit 0; fi; '
        f'if [ "$(cat installed 2>/dev/null)" != {mark} ]; then '
        f'rm -rf installed src; mkdir src; tar -xzf "$HOME/unimm_jax.tar.gz" -C src; '
        f"bash -ec {shlex.quote(install)}; echo {mark} > installed; fi"
    )


def start_script(command: Sequence[str]) -> str:
    """Starts the command in the background, unless it is running; its output goes to `log`, its status to `status`.

    Prints `OTHER` if another command is running.
    """
    digest = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:16]
    body = f'. "$HOME/{TREE}/env"; export PATH="$HOME/{TREE}/venv/bin:$PATH"; cd "$HOME/{TREE}/src" && '
    body += f'{shlex.join(command)}; echo $? > "$HOME/{TREE}/status"'
    return (
        f'cd "$HOME/{TREE}" || exit; if ! {{ {RUNNING}; }}; then rm -f status; mv "$HOME/unimm_jax.env" env; '
        f"chmod 600 env; echo {digest} > started; "
        f"{MARK} nohup setsid bash -c {shlex.quote(body)} > log 2>&1 < /dev/null & "
        f'echo $! > "$HOME/{TREE}/pid"; else rm -f "$HOME/unimm_jax.env"; '
        f'[ "$(cat started 2>/dev/null)" = {digest} ] || echo {OTHER}; fi'
    )


def follow_script(line: int, seconds: float) -> str:
    """Prints the lines of the log from a line (from 1) on, numbered from 1, until the command or the time ends."""
    show = f'tail -n +{line} -F --pid="$(cat pid)" log 2>/dev/null'
    return f'cd "$HOME/{TREE}" && timeout {max(round(seconds), 1)} {show} | grep --line-buffered -an ""'


STATUS_SCRIPT = (
    f'cd "$HOME/{TREE}"; if {RUNNING}; then s=running; else s=$(cat status 2>/dev/null || echo {GONE}); fi; '
    'echo "unimm-status $(hostname) $s"'
)
STOP_SCRIPT = (
    f'cd "$HOME/{TREE}" || exit 0; for signal in TERM KILL; do '
    f'found=$(grep -lszFx {MARK} /proc/[0-9]*/environ | cut -d/ -f3); if [ -z "$found" ]; then exit 0; fi; '
    f"kill -$signal $found; for i in $(seq 60); do {ALIVE} || exit 0; sleep 1; done; done; exit 1"
)
TAIL_SCRIPT = f'cd "$HOME/{TREE}" && tail -n {TAIL} log | sed "s/^/unimm-log $(hostname) /"'


# ---- Commands --------------------------------------------------------------------------------------------------------


def up(tpu: Tpu, delete: bool) -> int:
    """Creates, installs and runs, again after every loss, up to `retries` times.

    Gives up after `VAIN` attempts in a row that failed within `SOON_SECONDS` on a TPU that is there: a command may be
    wrong.
    """
    s, began, active, in_vain, has_ended = tpu.settings, time.monotonic(), 0.0, 0, False
    say(f"{s.name}: commit {tpu.version[:12]}")  # what cannot be installed ends here, before there is a TPU
    try:
        for attempt in range(s.retries + 1):
            seconds = 0.0
            try:
                _request(tpu, is_first=attempt == 0)
                began_active = time.monotonic()
                try:
                    if has_ended:
                        tpu.stop()  # on other hosts, it may wait for those that have ended
                        has_ended = False
                    tpu.install()
                    tpu.start()
                    status = tpu.follow()
                    break
                finally:
                    seconds = time.monotonic() - began_active
                    active += seconds
            except Lost as error:
                has_ended = has_ended or isinstance(error, Ended)
                in_vain = in_vain + 1 if seconds < SOON_SECONDS and tpu.state() == "ACTIVE" else 0
                if attempt == s.retries or in_vain == VAIN:
                    raise LaunchError(f"{s.name} was lost {attempt + 1} times, the last time because {error}") from None
                say(f"{s.name} is lost: {error}; attempt {attempt + 2} of {s.retries + 1}")
                time.sleep(s.poll)
    except Exception as error:
        _leave(tpu, delete, f"ended with an error after {(time.monotonic() - began) / 3600:.2f} h", active, error)
        raise
    _leave(tpu, delete, f"ended with status {status} after {(time.monotonic() - began) / 3600:.2f} h", active)
    return status


def _request(tpu: Tpu, is_first: bool) -> None:
    """Requests the TPU, unless it is requested, and waits for it.

    Raises:
      Lost: the request failed, or gcloud refused a request after an earlier one: capacity and quota come back.
      LaunchError: the first request was refused, or the TPU that has the name is of another type.
    """
    s, found = tpu.settings, tpu.describe()
    state = found.get("state", {}).get("state", "")
    if state in LEAVING:
        say(f"{s.name}: {state}")
        while state in LEAVING:
            time.sleep(s.poll)
            state = tpu.state()
    try:
        if state in LOST:
            tpu.delete()
            state = ""
        if not state:
            say(f"requesting {s.slices} × {s.kind.name} ({s.kind.chips * s.slices} chips), {s.provisioning}")
            tpu.create()
        elif (kind := _type_of(found)) not in ("", s.kind.name):
            raise LaunchError(f"{s.name} is of the type {kind}; give --type={kind}, or another name")
        elif (slices := _slices_of(found)) not in (0, s.slices):
            raise LaunchError(f"{s.name} was requested with --slices={slices}; give that, or another name")
    except LaunchError as error:
        if is_first:
            raise
        raise Lost(str(error)) from None
    tpu.is_requested = True
    tpu.wait()


def _type_of(request: dict[str, Any]) -> str:
    """The type of the TPUs of a request, empty if the request does not say it."""
    nodes = request.get("tpu", {}).get("nodeSpec") or [{}]
    found: str = nodes[0].get("node", {}).get("acceleratorType", "")
    return found


def _slices_of(request: dict[str, Any]) -> int:
    """The number of slices of a request, 0 if the request does not say it."""
    nodes = request.get("tpu", {}).get("nodeSpec") or [{}]
    if "multisliceParams" in nodes[0]:
        return int(nodes[0]["multisliceParams"].get("nodeCount", 0))
    return len(nodes) if "nodeId" in nodes[0] else 0


def _leave(tpu: Tpu, delete: bool, text: str, active: float, error: Exception | None = None) -> None:
    """Deletes the TPU if that is wanted, and prints what the run took.

    It is not deleted while a command may be running on it, nor if it is not the one that was asked for.
    """
    s, hours = tpu.settings, active / 3600
    delete = delete and tpu.is_requested and not isinstance(error, Unreachable | Busy)
    try:
        if delete and (error is None or tpu.state()):
            tpu.delete()
    except LaunchError as second:  # the first error counts
        if error is None:
            raise
        say(f"the TPU could not be deleted: {second}")
    if isinstance(error, Unreachable) and not active:
        say(f"if there is a TPU, it is charged for: {s.line('delete')}")
    if not s.dry_run and (active or error is None):
        chips = s.kind.chips * s.slices
        say(f"{text}, of which {hours:.2f} h on {chips} chips: {hours * chips:.1f} chip-hours")
        if not delete:
            say(f"the TPU is still there and is charged for: {s.line('delete')}")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = found.add_subparsers(dest="action", required=True)
    helps = {
        "up": "create, install and run; again after preemption",
        "create": "request the TPU and wait until it is there",
        "install": "copy this clone to every host and install it",
        "run": "start the command on every host and show the log of the first",
        "stop": "stop the command on every host",
        "logs": "show the log of a host from its beginning, until the command ends",
        "delete": "delete the TPU",
        "render": "print the run for another launcher",
    }
    for name, text in helps.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("name", help="name of the TPU: lower-case letters, digits and dashes")
        action.add_argument("--zone", required=name != "render", default="")
        action.add_argument("--project", default="", help="if not that of gcloud's settings")
        action.add_argument(
            "--type", default="v5litepod-8", help="accelerator type, such as v5litepod-16, v6e-8, v5p-8"
        )
        action.add_argument("--slices", type=int, default=1)
        action.add_argument("--provisioning", choices=PROVISIONING, default="on-demand")
        action.add_argument("--hours", type=int, default=24, help="longest run, for flex-start")
        action.add_argument("--wait-hours", type=int, default=0, help="how long the request may wait; 0 is no limit")
        action.add_argument("--runtime", default="", help="image of the hosts; by the type if empty")
        action.add_argument(
            "--env",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="variable of the command; NAME alone takes it from here",
        )
        action.add_argument("--install", default=INSTALL, help="command that installs src into venv on a host")
        action.add_argument("--retries", type=int, default=100)
        action.add_argument("--poll", type=float, default=30, help="seconds between two looks at the state")
        action.add_argument("--dry-run", action="store_true", help="print every command and run none")
        action.add_argument("--delete", action="store_true", help="delete the TPU when the command has ended")
        if name == "logs":
            action.add_argument("--worker", type=int, default=0, help="number of the host")
        if name == "render":
            action.add_argument("--target", choices=tuple(tpu_manifests.TARGETS), required=True)
            action.add_argument("--image", default="", help="container image with unimm_jax")
            action.add_argument("--cluster", default="", help="GKE cluster, for xpk")
    return found


def settings_of(flags: argparse.Namespace, command: Sequence[str]) -> Settings:
    """Checked settings.

    Raises:
      LaunchError: a flag is wrong.
    """
    if not flags.name.replace("-", "").isalnum() or flags.name != flags.name.lower() or not flags.name[0].isalpha():
        raise LaunchError(f"the name {flags.name!r} is not of lower-case letters, digits and dashes, a letter first")
    if flags.action in ("up", "run", "render") and not command:
        raise LaunchError(f"{flags.action} needs the command after --, such as: -- python -m unimm_jax.main --config=…")
    try:
        kind = tpu_type(flags.type)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    low = dict(slices=1, hours=1, wait_hours=0, retries=0, poll=0.001)
    for name, least in low.items():
        if getattr(flags, name) < least:
            raise LaunchError(f"--{name.replace('_', '-')}={getattr(flags, name):g} is below {least}")
    env = [f"{e}={os.environ[e]}" if "=" not in e and e in os.environ else e for e in flags.env]
    if wrong := [entry for entry in env if not entry.partition("=")[0].isidentifier() or "=" not in entry]:
        raise LaunchError(f"--env={wrong[0]} is neither NAME=VALUE nor the name of a variable that is set here")
    return Settings(
        name=flags.name,
        zone=flags.zone,
        project=flags.project,
        kind=kind,
        slices=flags.slices,
        provisioning=flags.provisioning,
        hours=flags.hours,
        wait_hours=flags.wait_hours,
        runtime=flags.runtime or kind.runtime,
        command=tuple(command),
        env=tuple(env),
        install=flags.install,
        retries=flags.retries,
        poll=flags.poll,
        dry_run=flags.dry_run,
    )


def act(flags: argparse.Namespace, command: Sequence[str]) -> int:
    """Does what an action says; the exit status."""
    settings = settings_of(flags, command)
    tpu = Tpu(settings)
    if flags.action == "render":
        if problem := tpu_manifests.problem(settings, flags.target):
            raise LaunchError(problem)
        print(tpu_manifests.TARGETS[flags.target](settings, flags.image, flags.cluster), end="")
        return 0
    if flags.action == "up":
        return up(tpu, flags.delete)
    actions: dict[str, Callable[[], int | None]] = {
        "create": lambda: (tpu.create(), tpu.wait())[1],
        "install": tpu.install,
        "run": lambda: (tpu.start(), tpu.follow())[1],
        "stop": tpu.stop,
        "logs": lambda: tpu.show(flags.worker),
        "delete": tpu.delete,
    }
    return actions[flags.action]() or 0


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    ours, dashes, command = list(arguments), "--", []
    if dashes in ours:
        at = ours.index(dashes)
        ours, command = ours[:at], ours[at + 1 :]
    try:
        return act(parser().parse_args(ours), command)
    except (LaunchError, Lost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the command on the TPU goes on, and the same line follows it again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
