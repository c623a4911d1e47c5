"""U-Nets, autoencoder and DDIM against `diffusers`, random weights, every block type of the published configs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peers import SDXL, randomize

from unimm_jax.errors import UnsupportedConfigError
from unimm_jax.interop import diffusion
from unimm_jax.interop.table import compare, foreign_shapes, to_ours, to_theirs
from unimm_jax.models.denoiser import UNet, UNetConfig, ddim
from unimm_jax.models.keys import Keys
from unimm_jax.models.vae import VAE, VAEConfig
from unimm_jax.sharding import flatten, unflatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD15 = dict(
    sample_size=8,
    block_out_channels=(32, 64, 64),
    down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    attention_head_dim=8,
    cross_attention_dim=24,
    norm_num_groups=8,
)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def load(make, prefix, peer, linear=False):
    abstract = nnx.eval_shape(make)
    state = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    shapes = {f"{prefix}{p}": tuple(leaf.shape) for p, leaf in flatten(state)}
    table = diffusion.table(shapes, prefix, linear)
    source = {k: v.numpy() for k, v in peer.state_dict().items()}
    compare(foreign_shapes(table, shapes), {k: v.shape for k, v in source.items()}, lambda name: False)
    flat = {e.ours: jnp.asarray(to_ours(e, source.__getitem__, shapes[e.ours])) for e in table}
    back = dict(to_theirs(table, flat.__getitem__, source))
    assert all(np.array_equal(back[k], source[k]) for k in source)  # export is the inverse
    return nnx.merge(nnx.graphdef(abstract), unflatten({k.removeprefix(prefix): v for k, v in flat.items()}))


@functools.cache
def unets(kind):
    settings = SD15 if kind == "sd15" else SDXL
    peer = randomize(diffusers.UNet2DConditionModel(**settings), 0)
    config, linear = diffusion.unet_config(dict(peer.config))
    return peer, load(lambda: UNet(UNetConfig(**config), rngs=Keys(params=0)), "unet/", peer, linear)


def inputs(kind, b=2):
    rng = np.random.default_rng(1)
    f32 = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, context = f32(b, 8, 16, 4), f32(b, 9, 24 if kind == "sd15" else 40)
    extra = (f32(b, 20), np.array([[1024, 512, 0, 0, 1024, 512]] * b, np.float32)) if kind == "sdxl" else ()
    return x, context, extra


def theirs(peer, x, t, context, extra):
    added = dict(zip(("text_embeds", "time_ids"), map(torch.tensor, extra), strict=True)) if extra else None
    with torch.no_grad():
        y = peer(
            torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
            torch.tensor(np.asarray(t)),
            torch.tensor(context),
            added_cond_kwargs=added,
        ).sample
    return y.permute(0, 2, 3, 1).numpy()


def gap(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / max(1.0, np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_unet_and_ten_steps_of_ddim(kind):
    peer, ours = unets(kind)
    x, context, extra = inputs(kind)
    t = np.array([7, 903])
    run = jax.jit(lambda x, t: ours(x, t, context, *extra))
    assert gap(run(x, t), theirs(peer, x, t, context, extra)) < 1e-4

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(10)
    y = torch.tensor(x)
    for step in scheduler.timesteps:
        eps = theirs(peer, y, np.full(len(x), int(step)), context, extra)
        y = scheduler.step(torch.tensor(eps), step, y).prev_sample
    found = ddim(lambda x, t: ours(x, t, context, *extra), jnp.asarray(x), 10)
    assert gap(found, y.numpy()) < 1e-4


def test_autoencoder():
    settings = dict(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )
    peer = randomize(diffusers.AutoencoderKL(**settings), 2)
    config = VAEConfig(**diffusion.vae_config(dict(peer.config)))
    ours = load(lambda: VAE(config, rngs=Keys(params=0)), "vae/", peer)
    x = np.random.default_rng(3).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = peer.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
        back = peer.decode(posterior.mean).sample.permute(0, 2, 3, 1).numpy()
    mean, log_variance = jax.jit(ours.moments)(x)
    assert gap(mean, posterior.mean.permute(0, 2, 3, 1).numpy()) < 1e-4
    assert gap(log_variance, posterior.logvar.permute(0, 2, 3, 1).numpy()) < 1e-4
    z = ours.encode(x)
    assert gap(z, np.asarray(mean) * 0.13025) < 1e-6
    assert gap(jax.jit(ours.decode)(z), back) < 1e-4


def test_settings_without_a_counterpart_are_refused_by_name():
    with pytest.raises(UnsupportedConfigError, match="class_embed_type.*AttnDownBlock2D"):
        diffusion.unet_config(dict(SD15, class_embed_type="timestep", down_block_types=("AttnDownBlock2D",)))
    with pytest.raises(UnsupportedConfigError, match="layers_per_block '2'; down_block_types has 1 val"):
        diffusion.unet_config(dict(SD15, layers_per_block="2", down_block_types=("DownBlock2D",)))
    with pytest.raises(UnsupportedConfigError, match="use_quant_conv False"):
        diffusion.vae_config(dict(use_quant_conv=False))
