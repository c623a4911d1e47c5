"""Gradient accumulation equals the whole batch."""

import jax
import numpy as np
import pytest
from helpers import opened, tiny, with_records

from unimm_jax import resolve, sharding, train
from unimm_jax.errors import ConfigError
from unimm_jax.objectives.accumulation import mean_loss, value_and_grad


def _unequal(batch):
    """The batch with loss weights that differ between rows; one row has none."""
    scale = np.linspace(0, 3, len(batch["weights"]), dtype=np.float32)[:, None]
    return batch | {"weights": batch["weights"] * scale}


def test_micro_batches_give_the_loss_and_the_update_of_the_whole_batch(run):
    found = {}
    for parts in (1, 2, 4):
        config = with_records("stage3", run, train__micro_batches=parts, seed=3)
        data, _ = opened(config)
        mesh = sharding.make_mesh(config.mesh)
        stage = train.build(config, data, mesh)
        with jax.set_mesh(mesh):
            shardings = jax.tree.map(lambda x: x.sharding, stage.state)
            params = jax.jit(stage.init, out_shardings=shardings["params"])(jax.random.key(0))
            opt = jax.jit(stage.init_optimizer, out_shardings=shardings["opt"])(params)
            zero = jax.device_put(np.int32(0), shardings["step"])
            state = {"params": params, "opt": opt, "step": zero, "bad_step": zero - 1}
            losses, metrics = [], {}
            for i in range(3):
                rows = _unequal(data.batch(i, multiple=4))
                state, metrics = stage.step(state, sharding.put_batch(rows, mesh, data.size(i, 4)))
                losses.append(float(metrics["loss"]))
        assert stage.step._cache_size() == 1
        found[parts] = (losses, {k: float(v) for k, v in metrics.items()}, jax.tree.map(np.asarray, state["params"]))
    losses, metrics, params = found[1]
    for parts in (2, 4):
        assert np.allclose(found[parts][0], losses, rtol=1e-6, atol=1e-6)
        for name, metric in metrics.items():
            assert found[parts][1][name] == pytest.approx(metric, rel=1e-5), name
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(found[parts][2]), strict=True):
            assert np.abs(a - b).max() < 1e-6


def test_micro_batches_of_padding_rows_change_nothing(run):
    """With 16 parts some micro-batches have no example at all."""
    found = {}
    for parts in (1, 16):
        config = with_records("stage3", run, train__micro_batches=parts)
        data, objective = opened(config)
        batch = data.batch(0, multiple=16)
        assert data.size(0, 16) == 16 and not batch["segments"][-1].any()
        params = objective.init(jax.random.key(0))

        def run_once(params, batch, objective=objective, parts=parts):
            loss = lambda params, rows, part: objective.loss(params, rows, jax.random.key(0), np.int32(0))
            return value_and_grad(loss, params, batch, parts)

        (loss, _), gradient = jax.jit(run_once)(params, batch)
        found[parts] = float(loss), jax.tree.leaves(gradient)
    assert found[16][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[1][1], found[16][1], strict=True):
        assert np.isfinite(b).all() and np.abs(a - b).max() < 1e-6


@pytest.mark.parametrize("stage", ["pixel_decoder", "unet_decoder"])
def test_image_decoders_accumulate(stage, run):
    """The loss and the gradient are the means over the micro-batches; each of these has noise of its own."""
    config = with_records(stage, run, train__micro_batches=2)
    data, objective = opened(config)
    params, batch, key = objective.init(jax.random.key(1)), data.batch(0, multiple=2), jax.random.key(0)

    def loss(params, rows, part):
        return objective.loss(params, rows, jax.random.fold_in(key, part), np.int32(0))

    (mean, aux), gradient = jax.jit(lambda p, b: value_and_grad(loss, p, b, 2))(params, batch)
    without_gradient = jax.jit(lambda p, b: mean_loss(loss, p, b, 2))(params, batch)
    for a, b in zip(jax.tree.leaves((mean, aux)), jax.tree.leaves(without_gradient), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = [both(params, part, i) for i, part in enumerate(parts)]
    assert mean == pytest.approx(np.mean([float(x) for (x, _), _ in found]), rel=1e-5)
    for mean, *each in zip(*map(jax.tree.leaves, (gradient, *(g for _, g in found))), strict=True):
        assert np.allclose(mean, np.mean(each, 0), rtol=1e-3, atol=1e-6)
    again = float(both(params, parts[0], 1)[0][0])
    assert (again == pytest.approx(float(found[0][0][0]), rel=1e-6)) is (stage == "pixel_decoder")


def test_the_held_out_loss_is_computed_in_micro_batches(run, monkeypatch):
    """As many as training has: packed rows are padded to them."""
    from unimm_jax import evals

    seen = []

    def counted(loss, params, batch, parts):
        seen.append(parts)
        return mean_loss(loss, params, batch, parts)

    monkeypatch.setattr("unimm_jax.evals.heldout_loss.accumulation.mean_loss", counted)
    found = {}
    for parts, size in ((1, 8), (4, 8), (16, 8)):
        config = with_records("stage3", run, train__micro_batches=parts, train__batch_size=size)
        data, objective = opened(config)
        evaluator = evals.get("loss")(evals.options_of({"type": "loss", "batches": 2}))
        mesh = sharding.make_mesh(config.mesh)
        params = objective.init(jax.random.key(0))
        with jax.set_mesh(mesh):
            context = evals.base.Context(config, objective, params, 1, mesh, run, data.header, data.text_tokenizer)
            found[parts] = evaluator.run(context).scores
    assert seen == [1, 4, 16]
    for parts in (4, 16):
        for name, number in (found[1] | {"fill": found[parts]["fill"]}).items():  # of rows with padding
            assert found[parts][name] == pytest.approx(number, rel=1e-4), name


def test_objectives_whose_loss_needs_the_whole_batch_refuse(run):
    with pytest.raises(ConfigError, match="contrastive does not accumulate gradients"):
        tiny("encoder", train__micro_batches=2)
    assert resolve.load("stage2:7b").train.micro_batches == 1
