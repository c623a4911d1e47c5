"""Several meshes of fake devices, in processes of their own (the device count is fixed at start-up)."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, link, xla_flags
from jax.sharding import PartitionSpec as P

from unimm_jax import sharding
from unimm_jax.errors import ConfigError
from unimm_jax.models import partitioning

SCRIPT = """
import json, sys
sys.path.insert(0, "tests")
from unimm_jax import metrics, process
process.prepare(keep_memory=False)
from helpers import tiny
from unimm_jax.train import train
found = []
for stage, mesh, workdir, steps in json.loads(sys.argv[1]):
    changes = dict(model__language__width=64, model__language__heads=4, model__language__kv_heads=2)
    if stage == "tokenizer":
        changes = dict(loss__restart_below=0.0)
    if stage == "stage2" and mesh == "2x2x2":
        changes |= dict(train__micro_batches=2)
    config = tiny(stage, mesh=tuple(map(int, mesh.split("x"))), train__steps=steps, train__checkpoint_every=5,
                  model__encoder__width=64, init_from=(), evals={}, **changes)
    train(config, workdir)
    found.append([row["loss"] for row in metrics.read(workdir)])
print(json.dumps(found))
"""


def _losses(runs, devices):
    """Losses of several runs (stage, mesh, workdir, steps) in one process with so many fake devices."""
    env = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps([[s, m, str(w), n] for s, m, w, n in runs])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.array(row) for row in json.loads(done.stdout.splitlines()[-1])]


FEW = {"tokenizer": ("2x2x2",), "stage2": ("2x2x2",)}, {"tokenizer": [], "stage2": ["1x4x1"]}
ALL = (
    dict.fromkeys(("tokenizer", "stage2"), ("8x1x1", "1x8x1", "2x2x2")),
    dict.fromkeys(("tokenizer", "stage2"), ["1x4x1", "1x1x1"]),
)


@pytest.mark.parametrize("meshes, restored", [FEW, pytest.param(*ALL, marks=pytest.mark.slow)])
def test_sharding_changes_nothing_and_checkpoints_move(run, tmp_path, meshes, restored):
    """Losses on 8 devices are those of one; a run saved on 2x2x2 continues on other meshes as one device would."""
    stages = tuple(meshes)
    for stage in stages:
        link(run, tmp_path / stage, "records", "stage1", "selector")

    def place(stage, name):
        return tmp_path / stage / name

    # On one device: 5 steps, and then 3 more.
    single = _losses([(s, "1x1x1", place(s, "one"), n) for s in stages for n in (5, 8)], devices=1)
    one, on = dict(zip(stages, single[::2], strict=True)), dict(zip(stages, single[1::2], strict=True))
    many = [(s, mesh, place(s, mesh), 5) for s in stages for mesh in meshes[s]]
    for (stage, mesh, _, _), losses in zip(many, _losses(many, devices=8), strict=True):
        assert np.abs(losses / one[stage] - 1).max() < 1e-4, (stage, mesh, losses, one[stage])
    # Saved on 8 (2x2x2), restored on 4 and on 1, continued as one device would.
    for mesh, devices in (("1x4x1", 4), ("1x1x1", 1)):
        moved = [(s, mesh, place(s, f"moved_{devices}"), 8) for s in stages if mesh in restored[s]]
        if not moved:
            continue
        for stage, _, copy, _ in moved:
            subprocess.run(["cp", "-r", place(stage, "2x2x2"), copy], check=True)
        for (stage, *_), losses in zip(moved, _losses(moved, devices), strict=True):
            assert len(losses) == 8 and np.abs(losses / on[stage] - 1).max() < 2e-4, (stage, losses, on[stage])


def test_a_split_model_generates_the_same(run):
    script = f"""
import numpy as np
from unimm_jax import process
process.prepare(keep_memory=False)
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.sampling import Sampling
prompts = ["a red circle", "two blue squares"]
drawn = [
    Generator(load_model("{run / "stage3"}", n), batch=2).generate_image_tokens(prompts, Sampling(2.0, 0.0))
    for n in (1, 2)
]
assert drawn[0].any() and (drawn[0] == drawn[1]).all()
"""
    env = os.environ | {"XLA_FLAGS": xla_flags(2), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_specs_fall_back_to_whole():
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}

    assert partitioning.spec((8, 6), ("embed", "mlp"), sizes, partitioning.STORED) == P("fsdp", "tensor")
    assert partitioning.spec((3, 8, 6), ("embed", "mlp"), sizes, partitioning.STORED) == P(None, "fsdp", "tensor")
    assert partitioning.spec((6, 5), ("embed", "mlp"), sizes, partitioning.STORED) == P(None, None)
    assert partitioning.spec((8, 8), ("heads", "mlp"), sizes, partitioning.STORED) == P("tensor", None)


def test_mesh_must_fit_the_devices():
    with pytest.raises(ConfigError, match="put -1"):
        sharding.make_mesh((3, 1, 1))
    assert sharding.make_mesh((1, -1, 1)).shape["fsdp"] == len(jax.devices())


def test_the_default_mesh_shards_over_64_chips_of_a_slice_at_most():
    cases = {(1, 1): (1, 1, 1), (8, 1): (1, 8, 1), (64, 1): (2, 32, 1), (256, 1): (8, 32, 1), (32, 2): (2, 16, 1)}
    for (devices, slices), wanted in cases.items():
        assert sharding.mesh_shape((), devices, slices) == wanted
    assert sharding.mesh_shape((2, -1, 2), 16) == (2, 4, 2)
