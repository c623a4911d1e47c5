import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unimm_jax import aot, hardware

PROGRAM = """\
HloModule jit_step

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[4,32] {
  %all-reduce.9 = bf16[64,32]{1,0} all-reduce(%p), channel_id=9, to_apply=%add
}

%piece (p: bf16[4,8]) -> bf16[64,8] {
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%p), channel_id=2, dimensions={0}
}

%cond.3 (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body.3 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = bf16[64,8]{1,0} fusion(%w), kind=kCustom, calls=%piece
  %done = bf16[64,8]{1,0} fusion(%start), kind=kCustom, calls=%piece
  %scattered = bf16[4,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %ring = (f32[10]{0}, f32[10]{0}) collective-permute-start(%x), channel_id=5
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond.3, body=%body.3, metadata={op_name="x"}
  %norm = f32[]{:T(128)} all-reduce(%n), channel_id=7, to_apply=%add
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    found = aot.count_collectives(PROGRAM)
    assert found["all-gather"] == aot.Collective(32, 32 * 64 * 8 * 2)  # both parts of one channel are one
    assert found["reduce-scatter"] == aot.Collective(32, 32 * 64 * 32 * 2)
    assert found["collective-permute"] == aot.Collective(32, 32 * 40)
    assert found["all-reduce"] == aot.Collective(1, 4)
    assert found["all-to-all"] == aot.Collective()


def test_a_topology_gives_mesh_batch_and_remat():
    from configs.stage2 import get_config

    config = get_config("7b")
    found = hardware.apply(config, "v5e:16x16")
    assert found.mesh == (4, 64, 1) and found.train.batch_size == 256 and found.model.language.remat == "full"
    found = hardware.apply(config, "v5e:4x4", slices=2, rows=3, remat="dots")
    assert found.mesh == (2, 16, 1) and found.train.batch_size == 96 and found.model.language.remat == "dots"
    assert hardware.apply(config, "v6e:2x4").mesh == (1, 8, 1)  # not in the table: all chips share the weights
    assert config.train.batch_size == 1024  # the experiment is not touched
    assert hardware.apply(get_config("laptop"), "v5e:4x4", remat="dots").model.language.remat == "dots"
    with pytest.raises(ValueError, match="named like v5e:8x8"):
        hardware.apply(config, "v5e")


def test_the_missing_compiler_is_explained(monkeypatch):
    monkeypatch.setattr(aot, "_has_libtpu", lambda: False)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]"'):
        aot.topology_devices("v5e:4x4", 1)


def test_bounds_and_ceiling_follow_the_chips_figures():
    chip = hardware.Chip("x", 100, flops=10.0, bandwidth=4.0, link=2.0)
    collectives = {"all-gather": aot.Collective(1, 4), "all-reduce": aot.Collective(1, 2)}
    report = aot.Report("c", "t", 2, chip, 1, 2, 6, 7, 50, collectives, model_flops=20.0, compile_seconds=1.0)
    assert report.bounds == {"compute": 1.0, "memory": 3.0, "links": 3.0} and report.ceiling == 1 / 3
    found = report.as_dict()
    assert found["fits"] and found["peak_bytes"] == 50 and found["hbm_bytes"] == 100 and found["model_flops"] == 20
    assert json.loads(json.dumps(found)) and any("MFU at most 33%" in line for line in report.lines())


@pytest.mark.parametrize("room, wanted", [(100, 1), (119, 1), (120, 2), (330, 12), (1000, 45)])
def test_the_largest_batch_is_found_and_its_neighbour_seen_not_to_fit(room, wanted):
    chip, tried = hardware.Chip("x", room, 1.0, 1.0, 1.0), []

    def compile_rows(rows):
        tried.append(rows)
        peak = 80 + 20 * rows + rows // 8  # nearly linear
        if peak > room:
            raise aot.DoesNotFit("too much")
        return aot.Report("c", "t", 1, chip, rows, rows, 0, 0, peak, {}, 1.0, 1.0)

    assert aot.largest(compile_rows).rows == wanted and wanted + 1 in tried and len(tried) < 9


@pytest.mark.slow
def test_drawing_compiles_for_a_slice():
    done = compiled("--config=configs/stage2.py:laptop", "--topology=v5e:2x2", "--generate", "--tensor=2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["chips"] == 4 and found["rows"] == 1 and found["collectives"]["all-reduce"]["runs"]
    for flag, words in (("--tensor=3", "no multiple of --tensor=3"), ("--slices=2", "draws on one slice")):
        done = compiled("--config=configs/stage2.py:laptop", "--topology=v5e:2x2", "--generate", flag)
        assert done.returncode == 1 and words in done.stderr
    done = compiled("--config=configs/text.py:laptop", "--topology=v5e:2x2", "--generate", "--tensor=2")
    assert done.returncode == 1 and "does not draw from prompts" in done.stderr


def compiled(*arguments):
    command = [sys.executable, "-m", "unimm_jax.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_stage_compiles_for_a_slice(tmp_path):
    """pytest -m slow tests/test_aot.py, with libtpu installed."""
    done = compiled("--config=configs/stage2.py:laptop", "--topology=v5e:2x2", "--rows=2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and 0 < found["peak_bytes"] < found["hbm_bytes"] and found["batch"] == 8
    assert found["collectives"]["all-gather"]["runs"] > 0 and found["model_flops"] > 0
    done = compiled("--config=configs/stage2.py:laptop", "--topology=v5e:3x5")
    assert done.returncode == 1 and "does not know the topology 'v5e:3x5'" in done.stderr


@pytest.fixture
def low_effort():
    """The compiler in a hurry."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
def test_what_would_fit_is_tried_before_it_is_said(monkeypatch, low_effort):
    from configs.stage2 import get_config

    aot.prepare_compiler()
    report = aot.compile_step(hardware.apply(get_config("laptop"), "v5e:2x2", rows=2), "v5e:2x2")
    small = dataclasses.replace(report.chip, memory=report.peak)
    monkeypatch.setitem(hardware.CHIPS, "TPU v5 lite", small)
    config = hardware.apply(get_config("laptop"), "v5e:2x2", rows=8)
    with pytest.raises(aot.DoesNotFit):
        aot.compile_step(config, "v5e:2x2")
    assert "it fits with --rows=2" in aot.suggest(config, "v5e:2x2", 1, 8)


@pytest.mark.slow
def test_this_compiler_sums_what_it_should_scatter():
    """Why there are all-reduces of gradients at 64 chips (docs/performance.md). Failing is good news: look again."""
    aot.prepare_compiler()
    mesh = aot.mesh_of((1, 64, 1), aot.topology_devices("v5e:8x8", 1), 1)
    scatter = lambda x: jax.lax.psum_scatter(x[0], "fsdp", tiled=True)
    whole = jax.ShapeDtypeStruct((64, 4096, 11008), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    run = jax.jit(jax.shard_map(scatter, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")))
    found = aot.count_collectives(run.lower(whole).compile().as_text())
    assert found["all-reduce"] == aot.Collective(1, 4096 * 11008 * 2) and not found["reduce-scatter"].runs
