"""Checks of the environment of a run: versions, devices, workdir, disk, memory, data, network. Nothing is compiled."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from unimm_jax import checkpoint, distributed, memory, objectives, process, resolve, storage, tpu_hosts
from unimm_jax.config import Config
from unimm_jax.data.pipeline import Input
from unimm_jax.errors import UserError

OK, WARNING, BLOCKER = "ok", "warning", "blocker"
GIB = 2**30
CONNECT_SECONDS = 3
PAIRS = {"jaxlib": "", "libtpu": 'extra == "tpu"'}  # package → the marker of jax's requirement on it


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
      level: `OK`, `WARNING`, or `BLOCKER` if a run cannot work. check: its name. text: what is so. remedy: what to do.
    """

    level: str
    check: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """One line for the console."""
        return f"{self.level:8s} {self.check}: {self.text}" + (f". Remedy: {self.remedy}" if self.remedy else "")


def findings(config: Config | None, workdir: str, chips: int, platform: str) -> list[Finding]:
    """What all checks found.

    Args:
      config: of the stage to run; its memory, paths and data are checked if given. workdir: checked if not empty.
      chips: number of devices that there should be, 0 for any. platform: "tpu", "gpu", "cpu", or "" for any.
    """
    found = [*versions(), *coordinator(), *devices(chips, platform)]
    if workdir:
        found += workdir_checks(workdir, config)
    if config is not None:
        data, read = inputs(config, workdir) if workdir else (None, [])
        found += [*device_memory(config), *host_memory(config, data), *read]
    return found


def versions() -> Iterator[Finding]:
    """Whether jaxlib and libtpu are the versions that this jax is made for."""
    names = ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint")
    there = {name: version for name in names if (version := _version(name))}
    bad = False
    for name, marker in PAIRS.items():
        wanted = _requirement(name, marker)
        if name in there and wanted and not _satisfies(there[name], wanted):
            bad = True
            remedy = f"pip install 'jax{'[tpu]' if name == 'libtpu' else ''}=={there['jax']}'"
            yield Finding(BLOCKER, "versions", f"{name} {there[name]}, jax {there['jax']} needs {name}{wanted}", remedy)
    if not bad:
        yield Finding(OK, "versions", ", ".join(f"{name} {version}" for name, version in there.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirement(package: str, marker: str) -> str:
    """What jax requires of a package, such as "==0.0.35"; empty if nothing."""
    for line in importlib.metadata.requires("jax") or ():
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0] == package and condition.replace("'", '"') == marker:
            return requirement[len(package) :].strip()
    return ""


def _satisfies(version: str, wanted: str) -> bool:
    """Whether a version meets conditions like "<=0.10.2,>=0.10.2" or "==0.0.35.*"."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]

    here = numbers(version)
    for condition in wanted.split(","):
        operator, number = re.fullmatch(r"\s*([<>=!~]+)\s*(.+?)\s*", condition).groups()  # type: ignore[union-attr]
        there = numbers(number)
        length = len(there) if number.endswith("*") else max(len(there), len(here))
        a, b = ((part + [0] * length)[:length] for part in (here, there))
        met = {"==": a == b, "<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b, "!=": a != b}
        if not met.get(operator, True):
            return False
    return True


def coordinator() -> Iterator[Finding]:
    """Whether the first process can be reached, for a run whose processes are numbered by hand."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        yield Finding(OK, "network", f"{address} answers")
    except (OSError, ValueError) as error:
        remedy = "start process 0, open the port in the firewall, or correct JAX_COORDINATOR_ADDRESS"
        yield Finding(BLOCKER, "network", f"the coordinator {address} cannot be reached ({error})", remedy)


def devices(chips: int, platform: str) -> Iterator[Finding]:
    """Whether JAX uses the devices of the machine, and those that were asked for."""
    there = jax.devices()
    kind, text = there[0].platform, f"{len(there)} × {there[0].device_kind} in {jax.process_count()} processes"
    remedies = {
        "tpu": "pip install 'jax[tpu]'; end other processes that hold the TPU",
        "gpu": "pip install 'jax[cuda13]'",
    }
    on_cpu = kind == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu"
    if on_cpu and process.has_accelerator():
        has = "tpu" if tpu_hosts.has_tpu() else "gpu"
        yield Finding(BLOCKER, "devices", f"this machine has a {has.upper()}, and JAX uses the CPU", remedies[has])
    elif platform and kind != platform:
        yield Finding(BLOCKER, "devices", f"{text}, not {platform}", remedies.get(platform, "unset JAX_PLATFORMS"))
    elif chips and len(there) != chips:
        hosts = tpu_hosts.number_of_hosts()
        remedy = "check the type of the TPU"
        if hosts > jax.process_count():
            remedy = f"start the same command on all {hosts} hosts"
        yield Finding(BLOCKER, "devices", f"{text}, not {chips}", remedy)
    else:
        yield Finding(OK, "devices", text)


def workdir_checks(workdir: str, config: Config | None) -> Iterator[Finding]:
    """Whether the workdir can be written, is one for all processes, has room, and holds a usable checkpoint."""
    try:
        path = storage.absolute(storage.path(workdir))
        checkpoint.refuse_s3(path)
        probe = path / f".preflight-{os.getpid()}"
        began, is_new = time.perf_counter(), not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"-")
        probe.unlink()
        distributed.check_shared(path)
        text = f"{path} can be written ({time.perf_counter() - began:.1f} s), by {jax.process_count()} processes"
        yield Finding(OK, "workdir", text)
        if config is not None and not storage.is_remote(path):
            yield _disk(path, config)
        if is_new and not storage.is_remote(path):
            path.rmdir()
    except UserError as error:
        yield Finding(BLOCKER, "workdir", str(error))
        return
    except Exception as error:  # a store raises errors of its client library
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        yield Finding(
            BLOCKER, "workdir", f"{workdir} cannot be written: {reason}", "check the path and its permissions"
        )
        return
    if (path / "checkpoints").exists():
        yield _checkpoint(path)


def _disk(path: pathlib.Path, config: Config) -> Finding:
    needed, free = memory.needs(config).checkpoint * (config.train.keep + 1), shutil.disk_usage(path).free
    text = f"{free / GIB:.1f} GiB free, {config.train.keep + 1} checkpoints need {needed / GIB:.1f} GiB"
    if needed > free:
        return Finding(BLOCKER, "disk", text, "free space, lower config.train.keep, or give a --workdir elsewhere")
    return Finding(OK, "disk", text)


def _checkpoint(path: pathlib.Path) -> Finding:
    try:
        return Finding(OK, "checkpoint", f"the run would resume from step {checkpoint.find(path).name}")
    except UserError as error:
        text = str(error).replace("\n", " ")
        return Finding(WARNING, "checkpoint", text, f"remove {path / 'checkpoints'} to start from the beginning")


def device_memory(config: Config) -> Iterator[Finding]:
    """Whether parameters, gradients and optimizer state fit the devices; activations are not counted."""
    try:
        text = f"{memory.check_devices(config).checkpoint / GIB:.2f} GiB of parameters and optimizer state fit"
        yield Finding(OK, "device memory", f"{text}; python -m unimm_jax.aot adds activations")
    except UserError as error:
        yield Finding(BLOCKER, "device memory", str(error))


def host_memory(config: Config, data: Input | None) -> Iterator[Finding]:
    """Whether this process fits the memory of the host."""
    needed, free = memory.host_peak(config, data), _available()
    of = "" if data else " with a vocabulary of the published size"
    text = f"about {needed / GIB:.1f} GiB at the peak{of}, {free / GIB:.1f} GiB are free"
    if needed > free:
        yield Finding(BLOCKER, "host memory", text, "end other programs, or use more hosts")
    else:
        yield Finding(OK, "host memory", text)


def _available() -> int:
    for line in _lines(pathlib.Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lines(file: pathlib.Path) -> Iterable[str]:
    return file.read_text().splitlines() if file.exists() else ()


def inputs(config: Config, workdir: str) -> tuple[Input | None, list[Finding]]:
    """The stage's data, and whether the records and checkpoints of the config are there, and a batch can be read."""
    try:
        resolve.check_paths(config, workdir)
        began = time.perf_counter()
        parsed: Any = config
        if hasattr(config.data, "records"):
            records = str(storage.at(workdir, config.data.records))
            parsed = dataclasses.replace(config, data=dataclasses.replace(config.data, records=records))
        data = objectives.get(parsed.objective).open_input(parsed, None)
        opened = time.perf_counter()
        next(data.iterate())
        text = f"opened in {opened - began:.1f} s, a batch read in {time.perf_counter() - opened:.2f} s"
        return data, [Finding(OK, "data", text)]
    except UserError as error:
        return None, [Finding(BLOCKER, "data", str(error).replace("\n", " "))]
