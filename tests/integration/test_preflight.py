"""Faults of the environment, each of them one line with a remedy."""

import collections
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
import types

import jax
import pytest
from helpers import ROOT, arguments, faults, free_port, link, peak_memory, tiny

from unimm_jax import environment, memory, process, reproduction, resolve, storage, tpu_hosts
from unimm_jax.checkpoint import Checkpoints
from unimm_jax.errors import ConfigError, CorruptCheckpointError, StorageError
from unimm_jax.train import train


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
    found = [*environment.versions(), *environment.findings(config, str(path), 0, "cpu")]
    assert not blockers(found) and not path.exists()
    names = {"versions", "devices", "workdir", "disk", "mesh", "device memory", "host memory", "data"}
    assert names == set(levels(found))


@pytest.mark.parametrize(
    "package, remedy",
    [
        ("jaxlib", "'jax=="),
        ("libtpu", "'jax[tpu]=="),
        ("jax-cuda13-plugin", "'jax[cuda13]=="),
    ],
)
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
    monkeypatch.setattr(environment, "CONNECT_SECONDS", 1)
    one(environment.coordinator(), "network", "cannot be reached", "firewall")


def test_a_workdir_that_cannot_be_written(workdir, tmp_path):
    path, config = workdir
    path.write_text("a file")
    one(environment.workdir_checks(str(path), config), "workdir", "cannot be written", "permissions")


def test_a_workdir_of_an_unknown_scheme():
    one(environment.workdir_checks("hdfs://x/y", None), "workdir", "hdfs://x/y is neither a local path nor on gs://")


def test_an_object_store_that_refuses_or_is_silent_is_a_blocker(workdir, bucket, monkeypatch):
    """One line each, soon, and the data on the store is not asked for."""
    _, config = workdir
    monkeypatch.setattr(environment, "STORE_SECONDS", 60)
    try:
        faults(forbid="run")
        one(environment.findings(config, f"{bucket}/run", 0, "cpu"), "workdir", "cannot be read", "Forbidden", "login")
        with pytest.raises(StorageError, match="Forbidden"):
            reproduction.saved_config(storage.path(f"{bucket}/run"))
        with pytest.raises(OSError, match="Forbidden") as raised:
            storage.path(f"{bucket}/run").exists()
        assert "the object store refuses" in process.explain(raised.value)
        with pytest.raises(FileNotFoundError) as raised:
            storage.read(storage.path(f"{bucket}/missing"))
        assert process.explain(raised.value) is None  # missing is not refused
        faults(seconds=3)
        monkeypatch.setattr(environment, "STORE_SECONDS", 1)
        one(environment.workdir_checks(f"{bucket}/run", config), "workdir", "no answer within 1 s")
    finally:
        faults()


def test_main_warns_of_versions_and_of_a_disk_before_it_compiles(workdir, monkeypatch, caplog):
    path, config = workdir
    environment.warn(config, path, 1)
    assert not caplog.messages
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage(10, 10, 3 * 2**30))
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "0.0.1" if name == "jaxlib" else real(name))
    environment.warn(config, path, 2**30)
    versions, disk = caplog.messages[-2:]
    assert "jaxlib 0.0.1" in versions and "3.0 GiB free, 4 checkpoints need 4.0 GiB" in disk

    def stop(*arguments):
        raise ConfigError("warned")

    monkeypatch.setattr(environment, "warn", stop)
    with pytest.raises(ConfigError, match="warned"):
        train(config, path)


def test_a_full_disk(workdir, monkeypatch):
    path, config = workdir
    usage = collections.namedtuple("usage", "total used free")
    size = memory.needs(config).checkpoint
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage(10, 10, 3 * size))
    assert config.train.keep == 2
    one(environment.workdir_checks(str(path), config), "disk", "4 checkpoints need", "config.train.keep")
    (path / "checkpoints" / "7").mkdir(parents=True)
    (path / "checkpoints" / "7" / "state").write_bytes(bytes(size))  # what is there needs no more room
    assert levels(environment.workdir_checks(str(path), config))["disk"] == "ok"


def test_a_mesh_that_does_not_fit_the_devices_and_a_batch_that_does_not_fit_the_mesh(workdir, monkeypatch):
    path, config = workdir
    data, _ = environment.inputs(config, str(path))
    assert levels(environment.mesh(config, data)) == {"mesh": "ok"}
    one(environment.mesh(dataclasses.replace(config, mesh=(3, 5, 1)), data), "mesh", "config.mesh", "devices")
    monkeypatch.setattr(environment.sharding, "batch_ways", lambda mesh: 8)
    odd = types.SimpleNamespace(size=lambda *_: 12)
    one(environment.mesh(config, odd), "mesh", "12 rows does not divide over 8")


def test_more_processes_than_rows(workdir, monkeypatch):
    """Rows are padded in training, so the last processes have rows of padding."""
    path, config = workdir
    monkeypatch.setattr(environment.jax, "process_index", lambda: 999)
    _, found = environment.inputs(config, str(path))
    assert levels(found)["data"] == "ok"


def test_a_cache_that_its_disk_cannot_hold(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UNIMM_CACHE_GIB", "0.001")
    assert environment._cache().level == "ok"
    monkeypatch.setenv("UNIMM_CACHE_GIB", "1e9")
    found = environment._cache()
    assert found.level == "warning" and "UNIMM_CACHE_GIB" in found.remedy and str(tmp_path) in found.text


def test_too_little_memory_on_the_host_and_on_the_devices(workdir, monkeypatch):
    _, config = workdir
    monkeypatch.setattr(environment, "_available", lambda: 1000)
    one(environment.host_memory(config, None), "host memory", "0.0 GiB are free")
    large = resolve.parse(resolve.load("stage2:7b"))
    one(environment.device_memory(large, None), "device memory", "stage2:7b needs")
    (found,) = environment.host_memory(config, None)
    assert re.search(r"about 1\.\d GiB to load, 1\.\d GiB to step, 1\.\d GiB to save", found.text)


def test_the_least_memory_of_a_device(monkeypatch):
    """That of stage 2 at 7B on 64 chips with the memory of a v5e. The peak of the compiled step is 4.88 GiB."""
    config, mesh = (
        resolve.parse(resolve.load("stage2:7b")),
        types.SimpleNamespace(shape={"data": 2, "fsdp": 32, "tensor": 1}),
    )
    monkeypatch.setattr(environment.sharding, "make_mesh", lambda shape: mesh)
    monkeypatch.setattr(environment.memory, "check_devices", lambda config: memory.needs(config))
    monkeypatch.setattr(environment.memory, "device_limit", lambda: int(15.75 * 2**30))
    (found,) = environment.device_memory(config, None)
    least = re.search(r"at least ([\d.]+) GiB of the 15.75 GiB", found.text)
    assert found.level == "ok" and 3.5 < float(least[1]) < 4.88
    monkeypatch.setattr(environment.memory, "device_limit", lambda: int(3.6 * 2**30))
    one(environment.device_memory(config, None), "device memory", "or a larger config.train.micro_batches")
    monkeypatch.setattr(environment.memory, "device_limit", lambda: 3 * 2**30)
    one(environment.device_memory(config, None), "device memory", "on the axis fsdp or tensor")


@pytest.mark.parametrize("names", environment.CONTROL_GROUPS)
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, names):
    assert environment._available() > 10**9
    limit, used, cache = names
    monkeypatch.setattr(environment, "CONTROL_GROUP", tmp_path)
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("500000000\n")
    (tmp_path / used).write_text("400000000\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon 1\n{cache} 300000000\n")
    assert environment._available() == 400_000_000
    (tmp_path / limit).write_text("max\n")
    assert environment._available() > 10**9


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


def test_the_chip_hours_of_a_large_run(workdir):
    assert not [*environment.cost(workdir[1], None)]
    (found,) = environment.cost(resolve.parse(resolve.load("stage2:7b")), None)
    flops, steps, hours = (
        float(x.replace(",", "")) for x in re.findall(r"([\d.,]+) (?:PFLOP|steps|of v5e)", found.text)
    )
    assert hours == pytest.approx(flops * 1e15 * steps / (197e12 * 0.4) / 3600, rel=0.01)
    assert 6 * 6.7e9 * 2048 * 32 < flops * 1e15 < 6 * 8e9 * 2048 * 128  # 6 operations per parameter and token


def test_where_a_run_with_damaged_checkpoints_would_resume(run, tmp_path):
    """By the rule of the training command: see `Checkpoints.newest`."""
    place, config = tmp_path / "text", tiny("text")
    shutil.copytree(run / "text", place)

    def checks(config=config):
        return [f for f in environment.workdir_checks(str(place), config) if f.check == "checkpoint"]

    assert checks()[0].line() == "ok       checkpoint: the run would resume from step 30"
    file = next((place / "checkpoints" / "30" / "state").rglob("d/*"))
    file.rename(file.with_name("other"))
    (found,) = checks()
    assert found.level == "warning" and "from step 20, because" in found.text and "is missing" in found.text
    strict = tiny("text", train__use_previous_checkpoint=False)
    one(checks(strict), "checkpoint", "is missing", "use_previous_checkpoint")
    with pytest.raises(CorruptCheckpointError):
        Checkpoints(place, use_previous=False).newest()
    for step in ("10", "20"):
        (place / "checkpoints" / step / "digests.json").write_text("{}")
    one(checks(), "checkpoint", "is missing", "to start from the beginning")
    with pytest.raises(CorruptCheckpointError):
        Checkpoints(place).newest()
    for step in ("10", "20", "30"):
        (place / "checkpoints" / step / "digests.json").unlink()
    assert checks()[0].level == "ok" and "would start from the beginning" in checks()[0].text
    assert Checkpoints(place).newest() is None


def preflight(*flags, **env):
    """The command with variables: (exit status, its lines that are not ok, seconds)."""
    began = time.monotonic()
    words = [sys.executable, "-m", "unimm_jax.preflight", *flags]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert lines and all(line.split()[0] in ("ok", "warning", "blocker") for line in lines), done.stderr
    assert not done.stderr.strip(), done.stderr
    return done.returncode, [line for line in lines if not line.startswith("ok")], time.monotonic() - began


def test_the_command_prints_a_line_for_each_check_and_fails_for_a_blocker(tmp_path):
    status, bad, seconds = preflight("--config=stage2:7b", f"--workdir={tmp_path / 'new'}", "--chips=16")
    assert status == 1 and [line for line in bad if line.startswith("blocker  devices: ") and "not 16" in line]
    assert seconds < 30  # 10 s on a machine without other work


def test_all_processes_say_which_one_cannot_write_the_workdir(tmp_path):
    """The one that could write waited for the other, and was told that its own workdir cannot be written."""
    (tmp_path / "file").write_text("")

    def both(first, second):
        env = os.environ | dict(JAX_NUM_PROCESSES="2", JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}")
        words = [[sys.executable, "-m", "unimm_jax.preflight", f"--workdir={w}"] for w in (first, second)]
        started = [
            subprocess.Popen(line, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
            for i, line in enumerate(words)
        ]
        said = [process.communicate(timeout=100)[0] for process in started]
        return [p.returncode for p in started], [s[s.index("workdir: ") :].splitlines()[0] for s in said]

    statuses, lines = both(tmp_path / "new", tmp_path / "new")
    assert statuses == [0, 0] and all("can be written" in line and "2 processes" in line for line in lines)
    assert not (tmp_path / "new").exists()
    statuses, lines = both(tmp_path / "new", tmp_path / "file" / "run")
    assert statuses == [1, 1] and all("cannot be written (process 1: " in line for line in lines), lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.slow
def test_faults_of_the_environment_are_a_line_each_in_ten_seconds(run, tmp_path, bucket):
    """pytest -s -m slow tests/integration/test_preflight.py -k ten_seconds prints the lines and the seconds."""
    good = tmp_path / "good"
    link(run, good, "stage2", "tokenizer", "pixel_decoder", "records")
    config, changes = ["--config=stage3:laptop", *arguments("stage3")], tmp_path / "changes"
    changes.mkdir()
    for name in ("damaged", "missing"):
        link(run, changes / name, "stage2", "tokenizer", "pixel_decoder")
    shutil.copytree(run / "records", changes / "damaged" / "records")
    block = changes / "damaged" / "records" / "blocks" / "000000.array_record"
    block.write_bytes(block.read_bytes()[:50])
    link(run, changes / "untrained", "tokenizer", "pixel_decoder", "records")
    for name in ("checkpoints", "digests"):
        link(run, changes / name, "stage2", "tokenizer", "pixel_decoder", "records")
        shutil.copytree(run / "stage3", changes / name / "stage3")
    for file in (changes / "checkpoints" / "stage3").rglob("d/*"):
        file.unlink()
    for file in (changes / "digests" / "stage3").rglob("digests.json"):
        file.write_text("{}")
    (tmp_path / "file").write_text("")
    for name in ("jaxlib", "libtpu"):
        (tmp_path / name / f"{name}-0.0.1.dist-info").mkdir(parents=True)
        (tmp_path / name / f"{name}-0.0.1.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 0.0.1\n")
    numbered = dict(JAX_NUM_PROCESSES="2", JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}")
    wrong = [
        ("versions", [], dict(PYTHONPATH=str(tmp_path / "jaxlib"))),
        ("versions", [], dict(PYTHONPATH=str(tmp_path / "libtpu"))),
        ("network", [], numbered | dict(JAX_PROCESS_ID="1")),
        ("network", [], numbered | dict(JAX_PROCESS_ID="0", UNIMM_START_SECONDS="3")),
        ("network", [], numbered | dict(JAX_PROCESS_ID="x")),
        ("devices", [], dict(JAX_PLATFORMS="cuda")),
        ("devices", ["--platform=tpu"], {}),
        ("devices", ["--chips=16"], {}),
        ("workdir", [f"--workdir={tmp_path / 'file' / 'run'}"], {}),
        ("workdir", ["--workdir=hdfs://x/y"], {}),
        ("workdir", ["--workdir=s3://bucket/run"], {}),
        ("workdir", ["--workdir=gs://bucket/closed/run"], {}),
        (
            "workdir",
            [*config, "--workdir=gs://bucket/run"],
            dict(STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{free_port()}"),
        ),
        ("mesh", [*config, "--config.mesh=(3,1,1)", f"--workdir={good / 'stage3'}"], {}),
        ("device memory", ["--config=stage2:7b"], {}),
        ("data", [*config, f"--workdir={changes / 'damaged' / 'stage3'}"], {}),
        ("data", [*config, f"--workdir={changes / 'missing' / 'stage3'}"], {}),
        ("data", [*config, f"--workdir={changes / 'untrained' / 'stage3'}"], {}),
        ("checkpoint", [*config, f"--workdir={changes / 'checkpoints' / 'stage3'}"], {}),
        ("checkpoint", [*config, f"--workdir={changes / 'digests' / 'stage3'}"], {}),
    ]
    for flags in ([*config, f"--workdir={good / 'stage3'}"], ["--workdir=gs://bucket/run"]):  # nothing is wrong
        status, bad, seconds = preflight(*flags)
        print(f"{seconds:4.1f} s  {flags[-1]}")
        assert (status, bad) == (0, []) and seconds < 10
    faults(forbid="closed")
    try:
        for check, flags, env in wrong:
            status, bad, seconds = preflight(*flags, **env)
            print(f"{seconds:4.1f} s  {bad}")
            blockers = [line for line in bad if line.startswith("blocker")]
            assert status == 1 and seconds < 10 and f" {check}: " in blockers[0], bad
            assert len(blockers) == 1 or check == "device memory", bad  # which is host memory on a CPU
    finally:
        faults()


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
    predicted = max(memory.host_phases(config, data).values())
    print(f"{stage}: predicted {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    assert abs(predicted / measured - 1) < 0.2
