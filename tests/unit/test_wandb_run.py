"""Weights & Biases with a stand-in for its package: what is logged, the id after a restart, and failures."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest
from helpers import tiny

from unimm_jax import metrics, storage, train, wandb_run
from unimm_jax.errors import ConfigError
from unimm_jax.evals.base import Result


class FakeRun:
    def __init__(self):
        self.logged, self.metrics, self.finished = [], [], False

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """The package; `starts` has the arguments of every `init`, `runs` what they returned."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.starts, module.runs, module.Image = [], [], lambda x: ("image", x.shape)

    def init(**arguments):
        module.starts.append(arguments)
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(workdir, start=0, active=True):
    """A writer of two steps, an evaluation with an image, and an end."""
    config = tiny("encoder", train__wandb="project")

    def open_wandb():
        return wandb_run.WandbRun(config, workdir)

    writer = metrics.Writer(workdir, config.name, 10, start, active, open_wandb)
    writer.scalars(start + 1, {"loss": 2.0}, {"examples": 8.0})
    writer.evaluation(start + 1, "held_out", Result({"loss": 3.0}, {"sheet": np.zeros((4, 6, 3), np.uint8)}))
    writer.close()


def test_metrics_evaluations_and_images_are_logged_under_one_id(fake, tmp_path):
    write(tmp_path)
    write(tmp_path, start=1)
    first, second = fake.starts
    assert first["project"] == "project" and first["config"]["optimizer"]["learning_rate"] > 0
    assert first["dir"] == str(tmp_path)
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text() and second["resume"] == "allow"
    run = fake.runs[0]
    assert ("*", {"step_metric": "step"}) in run.metrics and run.finished
    assert run.logged[0]["step"] == 1 and run.logged[0]["loss"] == 2.0 and "step_ms" in run.logged[0]
    assert run.logged[1:] == [{"step": 1, "held_out/loss": 3.0}, {"step": 1, "held_out_sheet": ("image", (4, 6, 3))}]
    assert [values["step"] for values in fake.runs[1].logged] == [2, 2, 2]


def test_files_that_grow_are_not_in_a_workdir_on_an_object_store(fake, bucket):
    workdir = storage.path(f"{bucket}/wandb")
    write(workdir)
    assert fake.starts[0]["dir"] is None and fake.starts[0]["id"] == (workdir / "wandb_id.txt").read_text()
    assert metrics.read(workdir)[0]["loss"] == 2.0


def test_other_processes_open_no_run(fake, tmp_path):
    write(tmp_path, active=False)
    assert not fake.starts and not (tmp_path / "wandb_id.txt").exists()


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_failure_is_one_warning_and_the_rest_is_written(fake, tmp_path, monkeypatch, caplog, failing):
    def fail(*_, **__):
        raise RuntimeError("no network\nmore")

    monkeypatch.setattr(*((fake, "init") if failing == "init" else (FakeRun, "log")), fail)
    write(tmp_path)
    warnings = [r.getMessage() for r in caplog.records if "Weights & Biases" in r.getMessage()]
    assert len(warnings) == 1 and "(no network); training continues without it" in warnings[0]
    assert metrics.read(tmp_path)[0]["loss"] == 2.0 and metrics.read(tmp_path, "evals.jsonl")[0]["loss"] == 3.0


def test_a_missing_package_is_named_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "build", None)  # not reached
    with pytest.raises(ConfigError, match=r"config.train.wandb is 'p', .*; run pip install wandb, or set"):
        train.train(tiny("encoder", train__wandb="p"), tmp_path / "encoder")
    wandb_run.check("")  # not asked for


@pytest.mark.slow
def test_the_package_itself_takes_what_is_logged(tmp_path, monkeypatch, caplog):
    """pip install wandb; pytest -m slow tests/unit/test_wandb_run.py: offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path)
    assert not [r for r in caplog.records if "Weights & Biases" in r.getMessage()]
    (file,) = tmp_path.rglob("run-*.wandb")
    assert file.stat().st_size > 1000 and (tmp_path / "wandb_id.txt").read_text() in file.name
