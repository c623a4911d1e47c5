"""Several meshes of fake devices, in processes of their own (the device count is fixed at start-up)."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import PartitionSpec as P

from unimm_jax import sharding

SCRIPT = """
import json, sys
sys.path.insert(0, "tests")
from conftest import tiny
from unimm_jax import metrics
from unimm_jax.train import train
stage, mesh, workdir, steps = sys.argv[1], tuple(map(int, sys.argv[2].split("x"))), sys.argv[3], int(sys.argv[4])
config = tiny(stage, mesh=mesh, train__steps=steps, train__checkpoint_every=5, model__encoder__width=64,
              model__language__width=64, model__language__heads=4, model__language__kv_heads=2)
config.init_from = ()
if stage == "tokenizer":
    config.loss.restart_below = 0.0
train(config, workdir)
print(json.dumps([row["loss"] for row in metrics.read(workdir)]))
"""


def _losses(stage, mesh, workdir, steps=5, devices=8):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, stage, mesh, str(workdir), str(steps)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("stage", ["tokenizer", "stage2"])
def test_sharding_changes_nothing_and_checkpoints_move(run, tmp_path, stage):
    for name in ("records", "stage1", "selector"):
        (tmp_path / name).symlink_to(run / name)
    one = _losses(stage, "1x1x1", tmp_path / "one", devices=1)
    for mesh in ("8x1x1", "1x8x1", "2x2x2"):
        many = _losses(stage, mesh, tmp_path / mesh)
        assert np.abs(many / one - 1).max() < 1e-4, (mesh, many, one)
    # saved on 8 (2x2x2), restored on 4 and on 1, going on as one device would
    on = _losses(stage, "1x1x1", tmp_path / "one", steps=8, devices=1)
    for mesh, devices in (("1x4x1", 4), ("1x1x1", 1)):
        copy = tmp_path / f"moved_{devices}"
        subprocess.run(["cp", "-r", tmp_path / "2x2x2", copy], check=True)
        moved = _losses(stage, mesh, copy, steps=8, devices=devices)
        assert len(moved) == 8 and np.abs(moved / on - 1).max() < 2e-4, (moved, on)


def test_specs_fall_back_to_whole():
    class Mesh:
        shape = {"data": 1, "fsdp": 4, "tensor": 2}

    assert sharding.spec((8, 6), ("embed", "mlp"), Mesh) == P("fsdp", "tensor")
    assert sharding.spec((3, 8, 6), ("embed", "mlp"), Mesh) == P(None, "fsdp", "tensor")
    assert sharding.spec((6, 5), ("embed", "mlp"), Mesh) == P(None, None)
    assert sharding.spec((8, 8), ("heads", "mlp"), Mesh) == P("tensor", None)


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match="put -1"):
        sharding.make_mesh((3, 1, 1))
    assert sharding.make_mesh((1, -1, 1)).shape["fsdp"] == len(jax.devices())
