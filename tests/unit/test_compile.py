"""Compiling ahead of time: topologies, HLO, reports, and what would fit; nothing here needs libtpu."""

import dataclasses
import json

import jax
import pytest
from helpers import tiny

from unimm_jax import objectives, resolve, sharding, train
from unimm_jax.compile import fit, hardware, topology
from unimm_jax.compile.hlo import Collective, count_collectives
from unimm_jax.compile.topology import Topology
from unimm_jax.errors import ConfigError, OutOfMemoryError, UserError

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


def test_collectives_in_loops_count_once_per_iteration():
    found = count_collectives(PROGRAM)
    gathered, scattered, passed = 32 * 64 * 8 * 2, 32 * 64 * 32 * 2, 32 * 40
    assert found["all-gather"] == Collective(32, gathered, gathered)  # both parts of one channel are one
    assert found["reduce-scatter"] == Collective(32, scattered, scattered)
    assert found["collective-permute"] == Collective(32, passed, passed)
    assert found["all-reduce"] == Collective(1, 4, 8)
    assert found["all-to-all"] == Collective()


WINDOWED = """\
%cond (state: (bf16[4,8], u32[], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %state = (bf16[4,8]{1,0}, /*index=1*/u32[], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%state), index=1
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (state: (bf16[4,8], u32[], u32[])) -> (bf16[4,8], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %i = u32[] get-tuple-element(%state), index=1
  %one = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%x), channel_id=5
  %other = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%y), channel_id=6
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %t = (bf16[4,8]{1,0}, /*index=1*/u32[], u32[]) tuple(%z, /*index=1*/%next, %i), metadata={op_name="x"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (bf16[4,8]{1,0}, u32[], u32[]) while(%t), condition=%cond, body=%body, metadata={op_name="x"}
}
"""


def test_loops_of_windowed_products_advance_by_two_and_note_no_count():
    assert count_collectives(WINDOWED)["collective-permute"] == Collective(8, 8 * 64, 8 * 64)


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}",
        "mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
    ],
)
def test_what_a_chip_sends_depends_on_how_many_take_part(groups):
    def sent(operation):
        program = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %x = {operation}(%a), replica_groups={groups}, x=y\n}}\n"
        return next(found.sent for found in count_collectives(program).values() if found.runs)

    assert sent("f32[100]{0} all-gather") == 300  # three quarters of 400 bytes come from others
    assert sent("f32[25]{0} reduce-scatter") == 300
    assert sent("f32[100]{0} all-reduce") == 600


# ---- Config and mesh -------------------------------------------------------------------------------------------------


def test_the_mesh_is_that_of_training():
    """The rule for an empty mesh; docs/performance.md lists the results."""
    shapes = {(16, 1): (1, 16, 1), (64, 1): (2, 32, 1), (256, 1): (8, 32, 1), (32, 2): (2, 16, 1), (4, 1): (1, 4, 1)}
    for (devices, slices), shape in shapes.items():
        assert sharding.mesh_shape((), devices, slices) == shape


def test_flags_change_remat_and_nothing_else():
    config = resolve.parse(resolve.load("stage2:7b"))
    found = fit.with_remat(config, "dots")
    assert found.model["language"].remat == "dots"
    back = dataclasses.replace(found, model=config.model)
    assert back == config and found.model["encoder"] == config.model["encoder"]
    with pytest.raises(ConfigError, match="--remat=half: policies are none, full"):
        fit.with_remat(config, "half")
    with pytest.raises(ConfigError, match="has no language model"):
        fit.with_remat(tiny("tokenizer"), "full")


def test_the_compiled_step_is_that_of_training():
    """See tests/integration/test_aot.py for several devices and a language stage."""
    config = tiny("tokenizer")
    mesh = sharding.make_mesh(config.mesh)
    data = objectives.get(config.objective).open_input(config)
    stage = train.build(config, data, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, stage.state)
    params = jax.jit(stage.init, out_shardings=shardings["params"])(jax.random.key(0))
    opt = jax.jit(stage.init_optimizer, out_shardings=shardings["opt"])(params)
    zero = jax.device_put(jax.numpy.asarray(0, jax.numpy.int32), shardings["step"])
    state = {"params": params, "opt": opt, "step": zero, "bad_step": zero - 1}
    batch = sharding.put_batch(next(data.iterate()), mesh, 8)
    with jax.set_mesh(mesh):
        trained = stage.step.lower(state, batch).as_text()
    assert fit.lower_step(*fit.abstract_step(config, mesh), mesh).as_text() == trained


def test_the_batch_of_a_language_stage_is_estimated_and_padded():
    mesh = jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES)
    config = tiny("stage3", train__batch_size=40, train__micro_batches=3)
    _, batch = fit.abstract_step(config, mesh)
    rows = batch["tokens"].shape[0]
    assert rows % 12 == 0 and rows >= objectives.get(config.objective).batch_rows(config) > 5
    _, batch = fit.abstract_step(config, mesh, rows=2)
    assert batch["tokens"].shape[0] == 2 * 4 * 3  # rows per device and micro-batch
    stage1 = resolve.parse(resolve.load("stage1:7b"))
    assert objectives.get("language_modeling").batch_rows(stage1) == 256 // 8  # each example reads an image


def test_a_batch_that_does_not_divide_is_refused():
    config = tiny("tokenizer", train__batch_size=6)
    mesh = jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES)
    with pytest.raises(ConfigError, match="a batch of 6 rows does not divide over 4 devices"):
        fit.abstract_step(config, mesh)


# ---- Topologies ------------------------------------------------------------------------------------------------------


def test_topologies_are_named():
    for name in ("v5e", "v5e:", "8x8", "v5e:8"):
        with pytest.raises(UserError, match="a name such as v5e:8x8"):
            Topology(name)
    assert str(Topology("v5e:4x4")) == "v5e:4x4" and str(Topology("v5e:4x4", 2)) == "2 slices of v5e:4x4"
    assert [t.name for t in Topology("v6e:4x8", 2).larger()] == ["v6e:8x8", "v6e:8x16", "v6e:16x16"]
    assert not Topology("v5p:2x4x4").larger()


def test_a_missing_compiler_is_explained(monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"'):
        Topology("v5e:4x4").devices()


# ---- Report, largest, suggest ----------------------------------------------------------------------------------------


def report(rows=1, peak=50, arguments=6, memory=100, **changes):
    chip = hardware.Chip("x", memory, flops=10.0, bandwidth=4.0, link=2.0)
    given = dict(
        config="c",
        topology="t",
        chips=2,
        chip=chip,
        rows=rows,
        batch=2 * rows,
        arguments=arguments,
        temporaries=7,
        peak=peak,
        collectives={},
        model_flops=20.0,
        compile_seconds=1.0,
    )
    return fit.Report(**(given | changes))


def test_bounds_follow_from_the_figures_of_the_chip():
    found = report(collectives={"all-gather": Collective(1, 4, 4), "all-reduce": Collective(1, 1, 2)})
    assert found.bounds == {"compute": 1.0, "memory": 3.0, "links": 3.0} and found.max_mfu == 1 / 3
    fields = found.as_dict()
    assert fields["fits"] and fields["peak_bytes"] == 50 and fields["hbm_bytes"] == 100 and fields["model_flops"] == 20
    assert json.loads(json.dumps(fields)) and any("MFU at most 33%" in line for line in found.lines())


@pytest.mark.parametrize("room, wanted", [(100, 1), (119, 1), (120, 2), (330, 12), (1000, 45)])
def test_the_largest_batch_is_found_and_the_next_does_not_fit(room, wanted):
    tried = []

    def compile_rows(rows):
        tried.append(rows)
        peak = 80 + 20 * rows + rows // 8  # nearly linear
        if peak > room:
            raise OutOfMemoryError("too much")
        return report(rows, peak, arguments=0, memory=room)

    assert fit.largest(compile_rows).rows == wanted and wanted + 1 in tried and len(tried) < 9


def suggestion(config, rows, fits, name="v5e:4x4"):
    """(the suggestion, what was compiled for it), where `fits` tells (remat, chips, rows) that fit."""
    tried = []

    def compile_rows(config, where, rows):
        remat = config.model["language"].remat if "language" in config.model else ""
        tried.append((remat, where.name, rows))
        if not fits(*tried[-1]):
            raise OutOfMemoryError("too much")
        return report(rows, peak=2**30)

    return fit.suggest(config, Topology(name), rows, compile_rows), tried


def test_likely_changes_are_tried_first():
    config = fit.with_remat(tiny("stage2"), "none")
    text, tried = suggestion(config, 0, lambda remat, where, rows: remat == "full")
    assert text == "it fits with --remat=full (1.00 GiB per chip)" and tried == [("full", "v5e:4x4", 0)]
    text, tried = suggestion(config, 8, lambda remat, where, rows: rows == 1)
    assert "it fits with --remat=full --rows=1 (1.00 GiB per chip); add --largest" in text and len(tried) == 2
    text, tried = suggestion(fit.with_remat(config, "full"), 1, lambda remat, where, rows: where == "v5e:8x8")
    assert "it fits with --topology=v5e:8x8 --rows=1" in text
    assert tried == [("full", "v5e:4x8", 1), ("full", "v5e:8x8", 1)]
    text, tried = suggestion(tiny("tokenizer"), 1, lambda *_: False, "v5e:8x16")
    assert text == "nothing that was tried fits: --topology=v5e:16x16 --rows=1" and len(tried) == 1
