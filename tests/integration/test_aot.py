"""The command aot, and that it compiles the step that training runs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, STAGES, command, link, xla_flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unimm_jax import resolve, sharding
from unimm_jax.compile import fit, hardware, topology
from unimm_jax.compile.hlo import count_collectives
from unimm_jax.compile.topology import Topology
from unimm_jax.errors import OutOfMemoryError
from unimm_jax.models import partitioning

# Trains two steps on 8 devices, keeps the lowered text of the step that ran, and compares it with that of `fit`.
SAME_STEP = """
import dataclasses, sys
sys.path.insert(0, "tests")
from helpers import opened, tiny
from unimm_jax import sharding, train
from unimm_jax.compile import fit

workdir, mesh = sys.argv[1], eval(sys.argv[2])
config = tiny("stage2", train__steps=2, mesh=mesh, init_from=(), evals={}, model__encoder__width=64)
build, ran = train.build, []

def spied(*arguments):
    stage = build(*arguments)

    def step(state, batch):
        if not ran:
            ran.append(stage.step.lower(state, batch).as_text())
        return stage.step(state, batch)

    return dataclasses.replace(stage, step=step)

train.build = spied
train.train(config, workdir)
train.build = build
data = dataclasses.replace(config.data, records=workdir + "/../records")
vocabulary = opened(dataclasses.replace(config, data=data))[0].vocabulary
mesh = sharding.make_mesh(config.mesh)
stage, batch = fit.abstract_step(config, mesh, vocabulary.text_rows, vocabulary.codes)
text = fit.lower_step(stage, batch, mesh).as_text()
assert len(text) > 10_000 and "mesh" in text, text[:500]
assert text == ran[0]
print(mesh.shape)
"""


SLOW = pytest.param((), "'fsdp': 8", marks=pytest.mark.slow)


@pytest.mark.parametrize("mesh, shape", [((2, 2, 2), "'tensor': 2"), SLOW])
def test_aot_compiles_the_step_that_main_runs(run, tmp_path, mesh, shape):
    link(run, tmp_path, "records")
    env = os.environ | {"XLA_FLAGS": xla_flags(8), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", SAME_STEP, str(tmp_path / "stage2"), repr(mesh)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert shape in done.stdout


def test_wrong_flags_are_one_line():
    for flags, words in (
        (("--config=stage2:laptop", "--topology=v5e"), "a name such as v5e:8x8"),
        (("--config=stage2:laptop", "--remat=half"), "policies are none, full"),
        (("--config=stage9",), "there is no config file stage9"),
    ):
        done = command("aot", *flags)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


# ---- With libtpu: python -m pytest -m slow tests/integration/test_aot.py ---------------------------------------------


@pytest.mark.slow
def test_a_stage_compiles_for_a_slice():
    done = command("aot", "--config=stage2:laptop", "--topology=v5e:2x2", "--rows=2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and 0 < found["peak_bytes"] < found["hbm_bytes"] and found["batch"] == 8
    assert found["collectives"]["all-gather"]["runs"] > 0 and found["model_flops"] > 0
    done = command("aot", "--config=stage2:laptop", "--topology=v5e:3x5")
    assert done.returncode == 1 and "does not know the topology 'v5e:3x5'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", STAGES)
def test_colab_fits_one_chip(stage):
    """The steps of size colab. About a minute each; text_rows is the vocabulary of the scenes' text tokenizer."""
    flags = (f"--config={stage}:colab", "--topology=v5e:1x1", "--text_rows=512", "--json")
    done = command("aot", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chips"] == 1 and 0 < found["peak_bytes"] <= 15 * 2**30


@pytest.mark.slow
def test_generation_compiles_for_a_slice():
    flags = ("--config=stage2:laptop", "--topology=v5e:2x2", "--generate")
    done = command("aot", *flags, "--tensor=2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["chips"] == 4 and found["rows"] == 1 and found["collectives"]["all-reduce"]["runs"]
    for flag, words in (("--tensor=3", "no multiple of --tensor=3"), ("--slices=2", "--generate uses one slice")):
        done = command("aot", *flags, flag)
        assert done.returncode == 1 and words in done.stderr
    done = command("aot", "--config=text:laptop", "--topology=v5e:2x2", "--generate", "--tensor=2")
    assert done.returncode == 1 and "does not generate images from prompts" in done.stderr


@pytest.fixture
def quick_compiler():
    """The environment for libtpu, low effort, and no cache: this machine cannot load the programs."""
    environment = dict(os.environ)
    values = {"jax_exec_time_optimization_effort": -1.0, "jax_enable_compilation_cache": False}
    before = {name: getattr(jax.config, name) for name in values}
    topology.prepare()
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.slow
def test_a_suggestion_was_compiled(monkeypatch, quick_compiler):
    config, where = resolve.parse(resolve.load("stage2:laptop")), Topology("v5e:2x2")
    one = fit.compile_step(fit.with_remat(config, "full"), where, 1)
    monkeypatch.setitem(hardware.CHIPS, "TPU v5 lite", hardware.Chip("small", one.peak, 1.0, 1.0, 1.0))
    with pytest.raises(OutOfMemoryError):
        fit.compile_step(config, where, 8)
    assert "it fits with --remat=full --rows=1" in fit.suggest(config, where, 8, fit.compile_step)


@pytest.mark.slow
def test_this_compiler_all_reduces_where_it_should_reduce_scatter(quick_compiler):
    """Why `MAX_FSDP` is below 64 (docs/performance.md). If this fails, the compiler has improved."""
    mesh = sharding.make_mesh((1, 64, 1), Topology("v5e:8x8").devices())

    def scatter(x):
        return jax.lax.psum_scatter(x[0], "fsdp", tiled=True)

    whole = jax.ShapeDtypeStruct((64, 4096, 11008), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    run = jax.jit(jax.shard_map(scatter, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")))
    found = count_collectives(run.lower(whole).compile().as_text())
    assert found["all-reduce"].bytes == 4096 * 11008 * 2 and not found["reduce-scatter"].runs


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_gradients_are_reduce_scattered_over_half_a_slice(quick_compiler, axes):
    """Along whichever axis a weight is stored in shards; only shards are summed over the data axis."""
    mesh = sharding.make_mesh((), Topology("v5e:8x8").devices())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 32, "tensor": 1}
    width, inner = 4096, 11008
    shape = tuple({"embed": width, "mlp": inner}[axis] for axis in axes)

    def gradient(w, x):
        return jax.grad(lambda w: jnp.square(x @ partitioning.weight(w, axes, jnp.bfloat16)).sum().astype(jnp.float32))(
            w
        )

    def place(spec):
        return NamedSharding(mesh, spec)

    stored = place(partitioning.spec(shape, axes, mesh.shape, partitioning.STORED))
    w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=stored)
    x = jax.ShapeDtypeStruct((64, 2048, shape[0]), jnp.bfloat16, sharding=place(P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        found = count_collectives(jax.jit(gradient, out_shardings=stored).lower(w, x).compile().as_text())
    size = 2 * width * inner
    assert found["reduce-scatter"].bytes == size
    assert found["all-reduce"].bytes <= size / 32 + 1024
