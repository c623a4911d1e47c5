import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import opened, tiny_dict, with_records

from unimm_jax import resolve
from unimm_jax.models import denoiser as D
from unimm_jax.models.keys import Keys


def test_shuffling_is_undone_and_keeps_neighbours():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    y = D.pixel_unshuffle(x, 4)
    assert y.shape == (2, 2, 2, 48) and jnp.array_equal(D.pixel_shuffle(y, 4), x)
    assert set(np.asarray(y[0, 0, 0]).tolist()) == set(np.asarray(x[0, :4, :4]).ravel().tolist())


@pytest.mark.parametrize("clip", [None, 3.0])
def test_ddim_with_the_true_noise_returns_the_signal(clip):
    clean = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3), minval=-1, maxval=1)
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    start = D.add_noise(clean, noise, jnp.array([981, 981]))

    def predict(x, t):
        a = jnp.asarray(D.alphas())[t][:, None, None, None]
        return (x - jnp.sqrt(a) * clean) / jnp.sqrt(1 - a)

    # the last step ends at the schedule's first level, not at zero noise (set_alpha_to_one False)
    assert jnp.abs(D.ddim(predict, start, 50, clip) - D.add_noise(clean, noise, jnp.array([0, 0]))).max() < 1e-3


def test_the_schedule_is_stable_diffusions():
    a = D.alphas()
    assert a.shape == (1000,) and a[0] == pytest.approx(1 - 0.00085, rel=1e-5)
    assert a[-1] == pytest.approx(0.0046602, rel=1e-3)
    assert (np.diff(a) < 0).all()


@pytest.mark.parametrize("kinds", [("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnDownBlock2D",) * 2])
def test_every_block_type_keeps_the_shape_and_reads_its_context(kinds):
    up = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    config = D.UNetConfig(
        in_channels=12, out_channels=12, block_out_channels=(16, 32), down_block_types=kinds, up_block_types=up,
        layers_per_block=1, attention_head_dim=2, cross_attention_dim=8, norm_num_groups=4,
    )  # fmt: skip
    unet = D.UNet(config, rngs=Keys(params=0))
    x, context = jax.random.normal(jax.random.key(0), (2, 8, 8, 12)), jax.random.normal(jax.random.key(1), (2, 5, 8))
    y = unet(x, jnp.array([10, 500]), context)
    assert y.shape == x.shape
    assert not jnp.allclose(y, unet(x, jnp.array([10, 500]), context[::-1]), atol=1e-6)
    assert not jnp.allclose(y, unet(x, jnp.array([10, 700]), context), atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_both_predictions_train_and_draw(run, prediction):
    data, objective = opened(with_records("unet_decoder", run, loss__prediction=prediction))
    params = objective.init(jax.random.key(0))
    batch = next(data.iterate())
    loss, _ = objective.loss(params, batch, jax.random.key(0), 0)
    assert jnp.isfinite(loss)
    drawn = objective.decode(params, batch["codes"], batch["keep"], jax.random.key(0))
    assert drawn.shape == (8, 64, 64, 3) and drawn.dtype == jnp.uint8


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_denoising_in_latent_space(run, kind):
    """Both of LaVIT's conditionings: gradients reach U-Net and conditioner alone, any aspect ratio is drawn."""
    from unimm_jax import optim

    settings = dict(loss__prediction="epsilon", data__records=str(run / "records"), data__pixel_size=32)
    config = tiny_dict("unet_decoder", **settings)
    unet = config.model.unet
    unet.in_channels = unet.out_channels = 4
    config.model.vae = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    if kind == "sd15":
        config.model.conditioner = dict(context=24, empty=5)
        unet.cross_attention_dim = 24
    else:
        config.model.conditioner = dict(context=24, pooled=16, heads=2)
        unet.cross_attention_dim, unet.addition_embed_type = 40, "text_time"
        unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim = 8, 16 + 6 * 8
    config.optimizer.rules = [("(image_tokenizer|vae)/.*", None), ("unet/.*", 1.0), ("conditioner/.*", 1.0)]
    data, objective = opened(resolve.parse(config))
    params = objective.init(jax.random.key(0))
    batch = next(data.iterate())
    assert batch["images"].shape == (8, 32, 32, 3)
    trained, frozen, _ = optim.split(params, list(objective.config.optimizer.rules))

    def loss(t):
        return objective.loss(optim.join(t, frozen), batch, jax.random.key(1), 0)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(trained)
    assert jnp.isfinite(value)
    moved = {part: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[part])) for part in grads}
    assert set(moved) == {"unet", "conditioner"} and all(v > 0 for v in moved.values()), moved
    for size in (None, (32, 48), (64, 16)):
        drawn = objective.decode(params, batch["codes"], batch["keep"], jax.random.key(0), size=size)
        assert drawn.shape == (8, *(size or (32, 32)), 3) and drawn.dtype == jnp.uint8


def test_the_negative_is_the_stored_empty_prompt():
    from unimm_jax.models.conditioner import Conditioner, ConditionerConfig

    c = Conditioner(16, 9, ConditionerConfig(context=8, empty=4), rngs=Keys(params=0))
    c.empty[...] = jnp.ones((4, 8))
    context, mask = c.negative(c(jnp.ones((2, 9, 16)))[0])
    assert (context[:, :4] == 1).all() and (context[:, 4:] == 0).all() and mask.sum(-1).tolist() == [4, 4]
