"""Faults of the environment, each of them one line with a remedy."""

import collections
import shutil
import sys
import time

import jax
import pytest
from helpers import ROOT, command, free_port, link, peak_memory, tiny

from unimm_jax import environment, memory, process, resolve, tpu_hosts
from unimm_jax.checkpoint import find


def levels(findings):
    return {finding.check: finding.level for finding in findings}


def blockers(findings):
    return [finding for finding in findings if finding.level == environment.BLOCKER]


def one(findings, check, *parts):
    """The only blocker, of the given check; its line has the parts."""
    (found,) = blockers(findings)
    line = found.line()
    assert found.check == check and "\n" not in line and all(part in line for part in parts), line


@pytest.fixture
def workdir(run, tmp_path):
    """A workdir beside finished stages, and the config of stage 3."""
    root = link(run, tmp_path, "stage2", "tokenizer", "pixel_decoder")
    shutil.copytree(run / "records", root / "records")
    return root / "stage3", tiny("stage3")


def test_a_good_environment_has_no_blocker(workdir):
    path, config = workdir
    found = environment.findings(config, str(path), 0, "cpu")
    assert not blockers(found) and not path.exists()
    assert {"versions", "devices", "workdir", "disk", "device memory", "host memory", "data"} == set(levels(found))


@pytest.mark.parametrize("package, remedy", [("jaxlib", "'jax=="), ("libtpu", "'jax[tpu]==")])
def test_a_package_that_does_not_fit_jax(monkeypatch, package, remedy):
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "0.0.1" if name == package else real(name))
    one(environment.versions(), "versions", f"{package} 0.0.1, jax {jax.__version__} needs {package}", remedy)


@pytest.mark.parametrize(
    "version, wanted, met",
    [
        ("0.10.2", "<=0.10.2,>=0.10.1", True),
        ("0.10.0", "<=0.10.2,>=0.10.1", False),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.41", "==0.0.42.*", False),
        ("1.2+cuda", "==1.2", True),
        ("1.10", ">1.9", True),
    ],
)
def test_conditions_of_versions(version, wanted, met):
    assert environment._satisfies(version, wanted) is met


def test_devices_that_are_not_those_asked_for(monkeypatch):
    one(environment.devices(0, "tpu"), "devices", "not tpu", "jax[tpu]")
    one(environment.devices(16, ""), "devices", "not 16", "check the type")
    monkeypatch.setattr(tpu_hosts, "number_of_hosts", lambda: 4)
    one(environment.devices(16, ""), "devices", "not 16", "start the same command on all 4 hosts")


@pytest.mark.parametrize("has_tpu, name", [(True, "TPU"), (False, "GPU")])
def test_a_machine_whose_accelerator_jax_does_not_use(monkeypatch, has_tpu, name):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(process, "has_accelerator", lambda: True)
    monkeypatch.setattr(tpu_hosts, "has_tpu", lambda: has_tpu)
    one(environment.devices(0, ""), "devices", f"this machine has a {name}, and JAX uses the CPU", "pip install")


def test_a_coordinator_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free_port()}")
    one(environment.coordinator(), "network", "cannot be reached", "firewall")


def test_a_workdir_that_cannot_be_written(workdir, tmp_path):
    path, config = workdir
    path.write_text("a file")
    one(environment.workdir_checks(str(path), config), "workdir", "cannot be written", "permissions")


def test_a_workdir_of_an_unknown_scheme():
    one(environment.workdir_checks("hdfs://x/y", None), "workdir", "hdfs://x/y is neither a local path nor on gs://")


def test_a_full_disk(workdir, monkeypatch):
    path, config = workdir
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    one(environment.workdir_checks(str(path), config), "disk", "0.0 GiB free", "config.train.keep")


def test_too_little_memory_on_the_host_and_on_the_devices(workdir, monkeypatch):
    _, config = workdir
    monkeypatch.setattr(environment, "_available", lambda: 1000)
    one(environment.host_memory(config, None), "host memory", "0.0 GiB are free")
    one(environment.device_memory(resolve.parse(resolve.load("stage2:7b"))), "device memory", "stage2:7b needs")


def test_missing_and_damaged_inputs(workdir):
    path, config = workdir
    file = path.parent / "records" / "blocks" / "000000.array_record"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    one(environment.inputs(config, str(path))[1], "data", "records")
    file.write_bytes(data)
    (path.parent / "stage2").unlink()
    one(environment.inputs(config, str(path))[1], "data", "there is no checkpoint at", "train that stage first")
    shutil.rmtree(path.parent / "records")
    one(environment.inputs(config, str(path))[1], "data", "holds no finished records")


def test_a_damaged_checkpoint_is_a_warning(run, tmp_path):
    shutil.copytree(run / "text", tmp_path / "text")
    for step in (tmp_path / "text" / "checkpoints").iterdir():
        if step.name.isdigit() and step != find(run / "text"):
            (step / "digests.json").unlink()
    found = levels(environment.workdir_checks(str(tmp_path / "text"), None))
    assert found == {"workdir": "warning", "checkpoint": "warning"} or found["checkpoint"] in ("ok", "warning")


def test_the_command_prints_a_line_for_each_check_and_fails_for_a_blocker(run, tmp_path):
    began = time.monotonic()
    done = command("preflight", "--config=stage2:7b", f"--workdir={tmp_path / 'new'}", "--chips=16")
    assert time.monotonic() - began < 30  # 10 s on a machine without other work
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and all(line.split()[0] in ("ok", "warning", "blocker") for line in lines)
    assert [line for line in lines if line.startswith("blocker  devices: ") and "not 16" in line]
    assert not done.stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_the_peak_of_host_memory_is_predicted_within_a_fifth(stage, tmp_path):
    """pytest -m slow tests/integration/test_preflight.py; needs a finished quickstart (bash launch/quickstart.sh)."""
    before = ("encoder", "tokenizer", "pixel_decoder", "records", "text", "stage1", "stage2")
    root = link(ROOT / "runs" / "quickstart", tmp_path, *before[: 6 if stage == "stage2" else 7])
    settings = [f"--config.train.{name}" for name in ("steps=60", "log_every=20", "checkpoint_every=20")]
    words = [sys.executable, "-m", "unimm_jax.main", f"--config={stage}:laptop", f"--workdir={root / stage}", *settings]
    measured = peak_memory(words)
    data, _ = environment.inputs(config := resolve.parse(resolve.load(f"{stage}:laptop")), str(root / stage))
    predicted = memory.host_peak(config, data)
    print(f"{stage}: predicted {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    assert abs(predicted / measured - 1) < 0.2
