"""The objective of the selector and tokenizer stages: gradients, dtypes, codebook updates, warnings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from unimm_jax import optim, sharding
from unimm_jax.models.tokenizer import BidirectionalDecoder, FeatureDecoder, ImageTokenizerConfig
from unimm_jax.models.tokenizer.quantizer import l2_normalize
from unimm_jax.objectives.tokenization import Tokenization, collapse_warning, keep_rate_warning

# ILLUME's tokenizer as it was before it had an architecture of its own: LaVIT's merger with all patches kept
OLD_ILLUME = dict(
    model__image_tokenizer__selection="all",
    model__image_tokenizer__eps=1e-6,
    model__image_tokenizer__sink=0.0,
    model__image_tokenizer__decoder_sink=0.0,
)


def opened(stage, variant="laptop", **changes):
    config = tiny(stage, variant, **changes)
    return Tokenization(config, Tokenization.abstract_input(config))


def images(count=4):
    return {"images": jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))}


def gradients(objective):
    """Path → gradient of every trained parameter, layers of stacks apart."""
    params = objective.init(jax.random.key(0))
    trained, frozen, _ = optim.split(params, objective.config.optimizer.rules)

    @jax.jit
    def run(trained):
        return jax.grad(
            lambda t: objective.loss(optim.join(t, frozen), images(), jax.random.key(1), jnp.asarray(1))[0]
        )(trained)

    found = {}
    for path, grad in sharding.flatten(run(trained)):
        layers = grad if "blocks/" in path else grad[None]
        found |= {f"{path}[{i}]": layer for i, layer in enumerate(layers)}
    return found


def without_gradient(objective):
    """Trained parameters whose gradient is zero up to rounding."""
    found = gradients(objective)
    norms = {path: float(jnp.linalg.norm(x)) / x.size**0.5 for path, x in found.items()}
    typical = np.median(list(norms.values()))
    return {path for path, norm in norms.items() if not norm > 1e-4 * typical}


@pytest.mark.parametrize("quantizer", ["ema", "simvq"])
def test_every_trained_parameter_of_illumes_tokenizer_has_a_gradient(quantizer):
    changes = dict(model__image_tokenizer__quantizer=quantizer, loss__restart_below=0.0)
    changes["model__image_tokenizer__merger_depth"] = 2
    assert without_gradient(opened("tokenizer", "laptop-illume", **changes)) == set()


def test_the_merger_with_all_patches_kept_has_parameters_without_gradient():
    """Why ILLUME's tokenizer has an architecture of its own."""
    dead = without_gradient(opened("tokenizer", **OLD_ILLUME))
    assert {"merger/blocks/cross/q/kernel[0]", "merger/blocks/cross/k/kernel[0]"} <= dead


@pytest.mark.parametrize("stage, variant", [("selector", "laptop"), ("tokenizer", "laptop"),
                                            ("tokenizer", "laptop-illume")])  # fmt: skip
def test_the_decoder_runs_in_the_dtype_of_the_activations(stage, variant, monkeypatch):
    seen = []
    for kind in (FeatureDecoder, BidirectionalDecoder):

        def recorded(self, z, *rest, inner=kind.__call__):
            found = inner(self, z, *rest)
            seen.append((z.dtype, found.dtype))
            return found

        monkeypatch.setattr(kind, "__call__", recorded)
    objective = opened(stage, variant, dtype="bfloat16")
    params = jax.eval_shape(objective.init, jax.random.key(0))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    loss, _ = jax.eval_shape(objective.loss, params, images(), jax.eval_shape(lambda: jax.random.key(0)), step)
    assert seen == [(jnp.bfloat16, jnp.bfloat16)] and loss.dtype == jnp.float32


def test_simvqs_loss_trains_the_matrix_and_leaves_the_codebook():
    simvq = dict(model__image_tokenizer__quantizer="simvq", loss__restart_below=0.0)
    objective = opened("tokenizer", "laptop-illume", **simvq)
    params, batch = objective.init(jax.random.key(0)), images()
    loss, aux = objective.loss(params, batch, jax.random.key(1), jnp.asarray(1))
    assert set(aux.updates) == {"quantizer/count"}
    model = objective.module(params)
    x = model.features(model.encoder.normalize(batch["images"]))
    z = model.project(x, jnp.ones(x.shape[:2]))
    codes = model.quantizer.lookup(z)
    q = params["quantizer"]["codebook"] @ params["quantizer"]["code_map"]["kernel"]
    found = model.decoder(q[codes])
    cosine = (l2_normalize(found) * l2_normalize(x)).sum(-1).mean()
    gap = jnp.abs(found - x)
    smooth = jnp.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    distance = ((z - q[codes]) ** 2).mean()
    assert float(loss) == pytest.approx(float(1 - cosine + smooth + 1.25 * distance), rel=1e-4)
    hits = np.bincount(np.asarray(codes).ravel(), minlength=objective.settings.codes)
    decay = objective.config.loss.ema_decay
    assert np.allclose(aux.updates["quantizer/count"], decay + (1 - decay) * hits, atol=1e-5)
    # k-means would have nothing to start
    assert objective.prepare(params, iter(())) is params


def test_sampled_selection_trains_and_depends_on_the_step():
    objective = opened("tokenizer", model__image_tokenizer__selection="sample")
    params = objective.init(jax.random.key(0))
    loss = jax.jit(objective.loss)
    kept = {float(loss(params, images(), jax.random.key(i), jnp.asarray(1))[1].metrics["kept"]) for i in range(4)}
    assert len(kept) > 1 and all(1 <= n <= 16 for n in kept)


# ---- Codebook collapse -----------------------------------------------------------------------------------------------


def test_codebook_usage_shows_collapse_without_restarts():
    """Published sizes restart no codes: an EMA count never becomes 0, so a threshold of 0 counts dead codes as used."""
    objective = opened("tokenizer", loss__restart_below=0.0, loss__ema_decay=0.9)
    params = objective.init(jax.random.key(0))
    projection = params["quantizer"]["proj2"]
    params["quantizer"]["proj2"] = dict(kernel=projection["kernel"] * 0, bias=projection["bias"] + 1)  # one code is hit
    loss, usage = jax.jit(objective.loss), []
    for _ in range(80):
        metrics, updates = (aux := loss(params, images(), jax.random.key(1), jnp.asarray(1))[1]).metrics, aux.updates
        usage.append(float(metrics["codebook_usage"]))
        params["quantizer"]["count"] = updates["quantizer/count"]
    assert usage[0] == 1 and usage[-1] == 1 / 32 and metrics["perplexity"] == pytest.approx(1)
    assert (params["quantizer"]["count"] > 0).all()


@pytest.mark.parametrize("restart_by", ["uniform", "distance"])
def test_restarts_by_distance_leave_out_what_the_codes_already_represent(restart_by):
    objective = opened("tokenizer", loss__restart_below=1e9, loss__restart_by=restart_by)  # every code is restarted
    model = objective.module(objective.init(jax.random.key(0)))
    book = model.quantizer.codebook[...]
    far = l2_normalize(jax.random.normal(jax.random.key(1), (4, book.shape[-1])))
    z = jnp.concatenate([book[jnp.zeros(60, int)], far])  # 60 vectors that equal code 0, and 4 others
    ids = model.quantizer.lookup(z)
    updates, _ = objective._update_codebook(model, z, ids, jnp.ones(len(z)), jax.random.key(2))
    gaps = jnp.linalg.norm(updates["quantizer/codebook"][:, None] - z[None], axis=-1)
    assert jnp.allclose(gaps.min(-1), 0, atol=1e-3)
    chosen = np.asarray(gaps.argmin(-1))
    assert (chosen >= 60).all() if restart_by == "distance" else (chosen < 60).mean() > 0.5


def test_collapse_is_one_line_with_cause_and_remedy():
    settings = ImageTokenizerConfig()
    healthy = dict(perplexity=6000.0, codebook_usage=0.9)
    collapsed = dict(perplexity=210.0, codebook_usage=0.02)
    assert collapse_warning(healthy, settings, 170_000) is None
    text = collapse_warning(collapsed, settings, 170_000)
    assert text.startswith("codebook collapse: 2.0% of the 16384 codes are used, with a perplexity of 210 of at")
    assert "restart_below" in text and "\n" not in text
    assert "restart_below" not in collapse_warning(collapsed, dataclasses.replace(settings, quantizer="simvq"), 170_000)
    assert collapse_warning(collapsed, settings, 1000) is None  # a batch of 1,000 tokens has at most 1,000 codes


def test_a_collapse_is_reported_in_the_second_half_of_the_run():
    objective = opened("tokenizer")
    metrics = dict(perplexity=1.2, codebook_usage=0.06, kept=4.0, cosine=0.5)
    assert objective.warnings(14, metrics) == {}  # of 30 steps
    assert "codebook collapse: 6.0% of the 32 codes" in objective.warnings(15, metrics)["codebook"]
    assert objective.warnings(15, metrics | dict(perplexity=20.0)) == {}


# ---- Keep rate -------------------------------------------------------------------------------------------------------


def test_an_argmax_rate_off_the_target_is_a_warning():
    """A selector with a mean keep probability of 1/3 can keep far fewer patches by argmax."""
    keep = np.random.default_rng(0).beta(5, 10, (64, 16))
    argmax, sampled = float((keep > 0.5).mean()), float(keep.mean())
    assert sampled == pytest.approx(1 / 3, abs=0.02) and argmax < 0.15
    assert keep_rate_warning(sampled, 1 / 3) is None
    text = keep_rate_warning(argmax, 1 / 3)
    assert "its target is 33.3%" in text and "selection=sample" in text and "\n" not in text
    published = opened("selector", "laptop-lavit")  # constant target of 1/3
    metrics = dict(keep_rate_argmax=argmax, keep_rate_sampled=sampled)
    assert published.warnings(10, metrics) == {}  # of 30 steps
    assert published.warnings(15, metrics) == {"keep_rate": text}
    assert published.warnings(30, dict(keep_rate_argmax=0.3)) == {}
    moving = opened("selector")  # the target falls until 70% of the run
    assert moving.warnings(24, metrics) == {} and moving.warnings(30, dict(keep_rate_argmax=0.3))
