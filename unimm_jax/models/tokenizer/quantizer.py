"""The quantizer: low-dimensional, l2-normalised code lookup with an EMA codebook (LaVIT §3.1; BEiT-2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.transformer import Linear


def l2_normalize(x: jax.Array) -> jax.Array:
    """x over its Euclidean norm along the last axis (norms under 1e-12 count as 1e-12)."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantizer(nnx.Module):
    """Projects to the code space and looks up the nearest code.

    `codebook` [K, C] and `count` [K] (EMA cluster sizes) are parameters that no optimiser touches: `ema_update` gives
    their next values. Rows are used as stored (LaVIT looks up the raw codebook).
    """

    def __init__(self, width: int, codes: int, code_width: int, *, rngs: nnx.Rngs):
        self.proj1 = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)
        self.proj2 = Linear(width, code_width, axes=("embed", None), rngs=rngs)
        start = l2_normalize(jax.random.normal(rngs.params(), (codes, code_width)))
        self.codebook = nnx.Param(start, axes=(None, None))
        self.count = nnx.Param(jnp.ones((codes,)), axes=(None,))

    def project(self, x: jax.Array) -> jax.Array:
        """[..., D] → unit vectors [..., C], float32."""
        return l2_normalize(self.proj2(jnp.tanh(self.proj1(x))).astype(jnp.float32))

    def lookup(self, z: jax.Array) -> jax.Array:
        """Ids of the nearest codes, int32 [...], by squared distance to the raw rows; ties go to the lower id."""
        book = self.codebook[...]
        distance = (z * z).sum(-1, keepdims=True) + (book * book).sum(-1) - 2 * jnp.einsum("...c,kc->...k", z, book)
        return distance.argmin(-1).astype(jnp.int32)

    def rows(self, codes: jax.Array) -> jax.Array:
        """Codebook rows of ids: [..., C]."""
        return self.codebook[...][codes]


def ema_update(
    codebook_KC: jax.Array, count_K: jax.Array, z_MC: jax.Array, ids_M: jax.Array, weight_M: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """BEiT-2's codebook update: (codebook, count, hits of this batch). Unused codes stay as they are.

    Sums run over the whole (sharded) batch; under `jax.jit` on a mesh they are sums over all devices.

    Args:
      z_MC: unit vectors; `ids_M` their codes; `weight_M` 1 where the row counts.
    """
    one_hot_MK = jax.nn.one_hot(ids_M, codebook_KC.shape[0]) * weight_M[:, None]
    hits_K = one_hot_MK.sum(0)
    mean_KC = l2_normalize(jnp.einsum("mk,mc->kc", one_hot_MK, z_MC) / jnp.maximum(hits_K, 1)[:, None])
    moved_KC = l2_normalize(codebook_KC * decay + mean_KC * (1 - decay))
    codebook_KC = jnp.where(hits_K[:, None] > 0, moved_KC, codebook_KC)
    return codebook_KC, count_K * decay + hits_K * (1 - decay), hits_K


def restart_dead(
    codebook_KC: jax.Array, count_K: jax.Array, z_MC: jax.Array, weight_M: jax.Array, threshold: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces codes whose EMA count fell under `threshold` by random rows of the batch, their count by one."""
    chosen = jax.random.choice(key, z_MC.shape[0], (codebook_KC.shape[0],), p=weight_M / jnp.maximum(weight_M.sum(), 1))
    dead_K = count_K < threshold
    return jnp.where(dead_K[:, None], z_MC[chosen], codebook_KC), jnp.where(dead_K, 1.0, count_K)


def cosine_kmeans(z_MC: jax.Array, start_KC: jax.Array, iterations: int = 10) -> tuple[jax.Array, jax.Array]:
    """k-means on the sphere: (means [K, C], cluster sizes [K]). Empty clusters keep their mean.

    Args:
      z_MC: unit vectors; `start_KC` initial means.
    """

    def step(means, _):
        ids = jnp.einsum("mc,kc->mk", z_MC, means).argmax(-1)
        sums = jnp.zeros_like(means).at[ids].add(z_MC)
        hits = jnp.zeros(means.shape[0]).at[ids].add(1.0)
        return jnp.where(hits[:, None] > 0, l2_normalize(sums), means), hits

    means, hits = jax.lax.scan(step, start_KC, None, length=iterations)
    return means, hits[-1]
