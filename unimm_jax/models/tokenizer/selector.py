"""The selector: predicts which patches to keep (LaVIT §3.1; the predictor of DynamicViT)."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import LayerNorm, Linear

KEEP = 0  # index of "keep" in the log-probabilities


class Selector(nnx.Module):
    """Predicts keep and drop log-probabilities per patch.

    Half of the hidden width is averaged over all patches, so that each prediction depends on the whole image.
    """

    def __init__(self, width: int, *, rngs: Keys):
        half = width // 2
        self.norm = LayerNorm(width, eps=1e-5)
        self.inner = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)
        self.out1 = Linear(width, half, axes=("embed", "mlp"), rngs=rngs)
        self.out2 = Linear(half, half // 2, axes=("embed", "mlp"), rngs=rngs)
        self.out3 = Linear(half // 2, 2, axes=("embed", None), rngs=rngs)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """Patch features [B, P, D] → log-probabilities float32 [B, P, 2]; index `KEEP` is keep, the other is drop."""

        def gelu(x: jax.Array) -> jax.Array:
            return jax.nn.gelu(x, approximate=False)

        u = gelu(self.inner(self.norm(x_BPD)))
        local, glob = jnp.split(u, 2, axis=-1)
        glob = jnp.broadcast_to(glob.mean(1, keepdims=True), glob.shape)
        u = gelu(self.out2(gelu(self.out1(jnp.concatenate([local, glob], -1)))))
        return jax.nn.log_softmax(self.out3(u).astype(jnp.float32), -1)


def argmax_mask(log_probs_BP2: jax.Array) -> jax.Array:
    """Keeps patches that are more likely kept than dropped, at least the most probable one: boolean [B, P]."""
    return _at_least_one(log_probs_BP2[..., KEEP] > log_probs_BP2[..., 1], log_probs_BP2)


def bernoulli_mask(log_probs_BP2: jax.Array, noise_BP: jax.Array) -> jax.Array:
    """Keeps each patch with its keep probability, at least the most probable patch: boolean [B, P].

    LaVIT's code selects like this at inference (by Gumbel-max, which has the same distribution).

    Args:
      noise_BP: uniform numbers in [0, 1), for images from `selection_noise`.
    """
    return _at_least_one(jnp.exp(log_probs_BP2[..., KEEP]) > noise_BP, log_probs_BP2)


def _at_least_one(keep_BP: jax.Array, log_probs_BP2: jax.Array) -> jax.Array:
    best = jax.nn.one_hot(log_probs_BP2[..., KEEP].argmax(-1), keep_BP.shape[-1], dtype=bool)
    return jnp.where(keep_BP.any(-1, keepdims=True), keep_BP, best)


def selection_noise(images: np.ndarray, num_patches: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for `bernoulli_mask`, float32 [N, P].

    They are a function of the pixels of each image, so its mask is the same in every batch, process, run and program.

    Args:
      images: uint8 [N, S, S, 3]. num_patches: P.
    """
    seeds = [zlib.crc32(image.tobytes()) for image in images]
    return np.stack([np.random.default_rng(seed).random(num_patches, np.float32) for seed in seeds])


def top_k_mask(log_probs_BP2: jax.Array, k: int) -> jax.Array:
    """Keeps the `k` most probable patches of each image: boolean [B, P]; ties go to the earlier patch."""
    order = jnp.argsort(-log_probs_BP2[..., KEEP], -1, stable=True)
    return jnp.argsort(order, -1, stable=True) < k


def sample_mask(log_probs_BP2: jax.Array, key: jax.Array, noise: jax.Array | float = 1.0) -> jax.Array:
    """Gumbel-softmax sample with a straight-through gradient: float [B, P], exactly 0 or 1 (LaVIT §3.1, tau = 1).

    Args:
      key: random key.
      noise: scale of the Gumbel noise; 1 samples from the probabilities, 0 is the argmax.
    """
    gumbel = jax.random.gumbel(key, log_probs_BP2.shape) * noise
    return straight_through(log_probs_BP2 + gumbel)


@jax.custom_vjp
def _clip_gradient(x: jax.Array, limit: float) -> jax.Array:
    return x


_clip_gradient.defvjp(lambda x, limit: (x, limit), lambda limit, g: (jnp.clip(g, -limit, limit), None))


def straight_through(logits_BP2: jax.Array) -> jax.Array:
    """Hard decisions in the forward pass, the gradient of the softmax in the backward pass: float [B, P]."""
    soft_BP = jax.nn.softmax(logits_BP2, -1)[..., KEEP]
    hard_BP = (logits_BP2[..., KEEP] > logits_BP2[..., 1]).astype(soft_BP.dtype)
    return hard_BP + (soft_BP - jax.lax.stop_gradient(soft_BP))  # exactly 0 or 1


def clip_mask_gradient(mask_BP: jax.Array, limit: float) -> jax.Array:
    """Returns the mask; in the backward pass each element of its gradient is clipped to ±`limit` (0 does not clip)."""
    return _clip_gradient(mask_BP, limit) if limit else mask_BP
