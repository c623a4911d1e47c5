"""The training command as a user runs it: flags, configs, and one line for every mistake."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, STAGES, STEPS, command, link, main_command, tiny, xla_flags

from unimm_jax import metrics
from unimm_jax.errors import CheckpointError
from unimm_jax.train import train


def last_line(done):
    """The one line of a user's mistake."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    found = done.stderr.splitlines()
    assert sum(line.startswith("error:") for line in found) == 1, done.stderr
    return found[-1]


def test_the_published_size_says_what_it_needs_and_what_to_do(tmp_path):
    line = last_line(command("main", "--config=configs/stage2.py", f"--workdir={tmp_path / 'x'}"))
    for part in ("stage2:7b needs", "GiB", "this machine has", "configs/stage2.py:laptop"):
        assert part in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=configs/stage2.py:tabletop"], "there is no size 'tabletop'; sizes are 7b"),
        (["--config=stage2:laptop", "--config.train.stepz=3"], "config.train.stepz; did you mean config.train.steps"),
        (["--config=nothing.py"], "there is no config file nothing.py"),
        (["--config=stage2:laptop", "--config.train.steps=-3"], "config.train.steps is -3"),
        ([], "--config is missing"),
        (["--config=encoder:laptop", "--workdir=hdfs://bucket/run"], "neither a local path nor on gs:// or s3://"),
        (["--config=encoder:laptop", "--config.data.sources=/nowhere"], "neither an existing directory nor one of"),
        (["--config=encoder:laptop", "--config.mesh=(3,1,1)"], "put -1 for the axis"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, arguments, words):
    workdir = [] if any("workdir" in a for a in arguments) else [f"--workdir={tmp_path / 'x'}"]
    assert words in last_line(command("main", *arguments, *workdir))
    assert not (ROOT / "hdfs:").exists()


def test_a_config_is_printed_complete_from_anywhere(tmp_path):
    line = [
        sys.executable,
        "-m",
        "unimm_jax.main",
        "--config=stage2:7b",
        "--config.model.language.layers=2",
        "--print_config",
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.language.layers = 2" in done.stdout and "model.encoder.eps = 1e-06" in done.stdout
    golden = (ROOT / "tests/data/golden_configs/stage2_7b.txt").read_text()
    assert done.stdout == golden.replace("model.language.layers = 32", "model.language.layers = 2")


def test_a_bug_keeps_its_traceback_and_says_so(tmp_path):
    script = (
        "from unimm_jax import process; process.prepare()\n"
        "import jax.numpy as jnp\n"
        "process.run(lambda: jnp.ones((2, 3)) @ jnp.ones((2, 3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "dot_general" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: this is a bug in unimm_jax")


@pytest.mark.parametrize(
    "error", ["OSError(28, 'No space left on device', 'x/y')", "PermissionError(13, 'denied', 'x')"]
)
def test_a_full_or_read_only_disk_is_one_line(error):
    script = (
        "from unimm_jax import process\n"
        f"def fail():\n    try:\n        raise {error}\n    except OSError as cause:\n"
        "        raise RuntimeError('could not save') from cause\n"
        "process.run(fail)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ("free some space" if "28" in error else "x: denied; check the permissions") in last_line(done)


def test_resuming_with_another_model_is_refused(run, tmp_path):
    link(run, tmp_path, "encoder")
    shutil.copytree(run / "selector", tmp_path / "selector")
    with pytest.raises(CheckpointError, match="does not fit this config"):
        train(tiny("selector", train__steps=STEPS + 2, model__image_tokenizer__mlp_width=32), tmp_path / "selector")
    config = tmp_path / "selector" / "config.json"
    assert config.read_bytes() == (run / "selector" / "config.json").read_bytes()
    train(tiny("selector", optimizer__learning_rate=0.5), tmp_path / "selector")  # it is finished
    assert config.read_bytes() == (run / "selector" / "config.json").read_bytes()


def test_fewer_devices_than_the_mesh_are_one_line(run, tmp_path):
    link(run, tmp_path, "encoder", "tokenizer", "records")
    settings = main_command("selector", tmp_path / "selector", train__batch_size=7)[3:]
    assert "a batch of 7 rows does not divide over 2 devices" in last_line(
        command("main", *settings, XLA_FLAGS=xla_flags(2))
    )
    settings = main_command("pixel_decoder", tmp_path / "pixel_decoder", train__batch_size=16, train__micro_batches=3)
    assert "a batch of 16 rows does not divide over 1 devices (data × fsdp) and 3 micro-batches" in last_line(
        command("main", *settings[3:])
    )
    settings = main_command("selector", tmp_path / "selector", mesh=(1, 4, 1))[3:]
    assert "config.mesh asks for 1 × 4 × 1 = 4 devices, here are 1" in last_line(command("main", *settings))


def test_a_profile_is_written_by_setting(run, tmp_path):
    link(run, tmp_path, "encoder")
    train(tiny("selector", train__profile=2, train__profile_start=2), tmp_path / "selector")
    assert list((tmp_path / "selector" / "profile").rglob("*.xplane.pb"))


def test_logged_values_are_means_over_the_window(run, tmp_path):
    link(run, tmp_path, "encoder")
    train(tiny("selector"), tmp_path / "selector")
    fine = metrics.read(tmp_path / "selector")
    (tmp_path / "coarse").mkdir()
    link(run, tmp_path / "coarse", "encoder")
    train(tiny("selector", train__log_every=3), tmp_path / "coarse" / "selector")
    coarse = metrics.read(tmp_path / "coarse" / "selector")
    assert [row["step"] for row in coarse] == list(range(3, STEPS + 1, 3))
    for i, row in enumerate(coarse):
        for name in ("loss", "cosine", "grad_norm"):
            mean = sum(r[name] for r in fine[3 * i : 3 * i + 3]) / 3
            assert abs(row[name] - mean) < 1e-5 * max(1, abs(mean)), name


def test_every_stage_has_a_held_out_loss(run):
    for stage in STAGES:
        rows = metrics.read(run / stage, "evals.jsonl")
        assert [row["step"] for row in rows] == [STEPS] and rows[0]["eval"] == "held_out" and rows[0]["loss"] > 0, stage
        assert json.loads((run / stage / "config.json").read_text())["evals"]["held_out"]["type"] == "loss"


def test_sigterm_and_resume_give_main_exit_status_zero_without_warnings(run, tmp_path):
    """The command itself, once from start to end: exit 0, and no warning of a library on the way."""
    link(run, tmp_path, "encoder")
    done = subprocess.run(main_command("selector", tmp_path / "selector"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "held_out" in done.stdout
    assert "WARNING" not in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
