"""The quantizer: nearest-code lookup in a low-dimensional space, EMA codebook (LaVIT §3.1; BEiT-2) or SimVQ."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Linear


def l2_normalize(x: jax.Array) -> jax.Array:
    """x divided by its Euclidean norm along the last axis; norms below 1e-12 count as 1e-12."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _identity(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    del key
    return jnp.eye(*shape)


class Quantizer(nnx.Module):
    """Projects to unit vectors of the code space and looks up the nearest code.

    Kinds:

    - "ema": the codes are unit vectors; `codebook` [K, C] is updated by `ema_update`, not by the optimizer. Lookups use
      the codebook as stored, without normalization (as LaVIT).
    - "simvq" (arXiv 2411.02038; ILLUME+'s code): `codebook` is a frozen sample of N(0, 1/C), and the codes are its rows
      times the trained matrix `code_map` [C, C], which starts as the identity. An update of the matrix moves all codes,
      so codes without hits do not stay behind. SimVQ's code does not normalize inputs; here their norm is that of the
      codes from the first step on.

    `count` [K] are the EMA cluster sizes; the objective updates them.

    Args (constructor):
      kind: "ema" or "simvq".
    """

    def __init__(self, width: int, codes: int, code_width: int, *, rngs: Keys, kind: str = "ema"):
        self.proj1 = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)
        self.proj2 = Linear(width, code_width, axes=("embed", None), rngs=rngs)
        start = jax.random.normal(rngs.params(), (codes, code_width))
        start = l2_normalize(start) if kind == "ema" else start * code_width**-0.5
        self.codebook = nnx.Param(start, axes=(None, None))
        self.count = nnx.Param(jnp.ones((codes,)), axes=(None,))
        options: dict[str, Any] = dict(axes=(None, None), rngs=rngs, bias=False, init=_identity)
        self.code_map = Linear(code_width, code_width, **options) if kind == "simvq" else None

    @property
    def vectors(self) -> jax.Array:
        """The codes' vectors [K, C], which lookups and decoders use; every reader of the codebook uses this."""
        book = self.codebook[...]
        return book if self.code_map is None else self.code_map(book)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., D] → unit vectors [..., C], float32."""
        return l2_normalize(self.proj2(jnp.tanh(self.proj1(x))).astype(jnp.float32))

    def lookup(self, z: jax.Array) -> jax.Array:
        """[..., C] → ids of the nearest codes, int32 [...], by squared distance; ties go to the lower id."""
        book = self.vectors
        distance = (z * z).sum(-1, keepdims=True) + (book * book).sum(-1) - 2 * jnp.einsum("...c,kc->...k", z, book)
        return distance.argmin(-1).astype(jnp.int32)

    def rows(self, codes: jax.Array) -> jax.Array:
        """Code ids [...] → vectors of the codes [..., C]."""
        return self.vectors[codes]


def ema_update(
    codebook_KC: jax.Array, count_K: jax.Array, z_MC: jax.Array, ids_M: jax.Array, weight_M: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """BEiT-2's codebook update. The vectors of codes without hits do not change.

    Under `jax.jit` on a mesh, sums are over the batch of all devices.

    Args:
      codebook_KC, count_K: current codebook and EMA cluster sizes, float32.
      z_MC: unit vectors.
      ids_M: code ids of `z_MC`.
      weight_M: 1 for rows that count, else 0.
      decay: EMA decay.

    Returns:
      (new codebook [K, C], new EMA cluster sizes [K], hits of this batch [K]).
    """
    one_hot_MK = jax.nn.one_hot(ids_M, codebook_KC.shape[0]) * weight_M[:, None]
    hits_K = one_hot_MK.sum(0)
    mean_KC = l2_normalize(jnp.einsum("mk,mc->kc", one_hot_MK, z_MC) / jnp.maximum(hits_K, 1)[:, None])
    moved_KC = l2_normalize(codebook_KC * decay + mean_KC * (1 - decay))
    codebook_KC = jnp.where(hits_K[:, None] > 0, moved_KC, codebook_KC)
    return codebook_KC, count_K * decay + hits_K * (1 - decay), hits_K


def code_hits(ids_M: jax.Array, weight_M: jax.Array, codes: int) -> jax.Array:
    """How often each of K = `codes` codes occurs in `ids_M`, weighted by `weight_M`: float32 [K]."""
    return jnp.zeros((codes,)).at[ids_M].add(weight_M)


def restart_dead(
    codebook_KC: jax.Array, count_K: jax.Array, z_MC: jax.Array, weight_M: jax.Array, threshold: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces codes with an EMA count below `threshold` by random vectors of the batch, with a count of 1.

    Args:
      z_MC, weight_M: unit vectors and the weights that they are sampled with.

    Returns:
      (codebook [K, C], count [K]).
    """
    chosen = jax.random.choice(key, z_MC.shape[0], (codebook_KC.shape[0],), p=weight_M / jnp.maximum(weight_M.sum(), 1))
    dead_K = count_K < threshold
    return jnp.where(dead_K[:, None], z_MC[chosen], codebook_KC), jnp.where(dead_K, 1.0, count_K)


def cosine_kmeans(z_MC: jax.Array, start_KC: jax.Array, iterations: int = 10) -> tuple[jax.Array, jax.Array]:
    """k-means with cosine similarity: (means [K, C], cluster sizes [K]). Empty clusters keep their mean.

    Args:
      z_MC: unit vectors.
      start_KC: initial means, unit vectors.
      iterations: number of iterations.
    """

    def step(means: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        ids = jnp.einsum("mc,kc->mk", z_MC, means).argmax(-1)
        sums = jnp.zeros_like(means).at[ids].add(z_MC)
        hits = jnp.zeros(means.shape[0]).at[ids].add(1.0)
        return jnp.where(hits[:, None] > 0, l2_normalize(sums), means), hits

    means, hits = jax.lax.scan(step, start_KC, None, length=iterations)
    return means, hits[-1]
