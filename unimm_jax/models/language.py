"""The language model: a LLaMA-style decoder over text and image codes, with and without a key/value cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.attention import (
    Attend,
    apply_rope,
    causal_attention,
    heads_attention,
    rope_cos_sin,
    rope_table,
)
from unimm_jax.models.keys import Keys
from unimm_jax.models.partitioning import constrain, weight
from unimm_jax.models.transformer import Linear, OutputProjection, RMSNorm, run_stack, stack, truncated, unstacked

Cache = tuple[Any, ...]
KeysValues = tuple[jax.Array, jax.Array]
LayerCache = tuple[Any, jax.Array, jax.Array]  # (slot of the first new position, keys, values)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Shape of the decoder; the defaults are LLaMA-7B's.

    Attributes:
      kv_heads: number of key/value heads; divides `heads`.
      rope_scaling: LLaMA 3.1's (factor, low_freq_factor, high_freq_factor, original_max_positions), or ().
      biases: which of q, k, v, o have a bias ("qkv" in Qwen2, none in LLaMA).
      mlp_bias: whether the feed-forward layers have biases.
      qk_norm: RMSNorm on the queries and keys of every head (Qwen3).
      tied: the output head is the embedding (SmolLM2, small Qwen models).
      scan: scan over the layers, so that only one is compiled.
      remat: what is recomputed in the backward pass, a name of `transformer.REMAT`.
    """

    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    mlp_width: int = 11008
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()
    biases: str = ""
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    scan: bool = True
    remat: str = "none"

    def flops(self, length: int, rows: int) -> float:
        """Floating-point operations per position of the forward pass in a row of `length` tokens.

        Counts 2 per weight, 4 N H per attended position with length / 2 attended positions on average (causal), and the
        output head over `rows` vocabulary rows.
        """
        heads = self.heads * self.head_width
        kernels = 2 * self.width * heads + 2 * self.width * self.kv_heads * self.head_width
        layer = 2 * (kernels + 3 * self.width * self.mlp_width) + 4 * heads * length / 2
        return self.layers * layer + 2 * self.width * rows


class SelfAttention(nnx.Module):
    """Causal self-attention with rotary position embeddings and grouped queries."""

    def __init__(self, c: LanguageConfig, *, rngs: Keys):
        axes = ("embed", "heads", None)
        self.q = Linear(c.width, (c.heads, c.head_width), axes=axes, rngs=rngs, bias="q" in c.biases)
        self.k = Linear(c.width, (c.kv_heads, c.head_width), axes=axes, rngs=rngs, bias="k" in c.biases)
        self.v = Linear(c.width, (c.kv_heads, c.head_width), axes=axes, rngs=rngs, bias="v" in c.biases)
        self.o = OutputProjection(c.heads, c.head_width, c.width, rngs=rngs, bias="o" in c.biases)
        self.q_norm = RMSNorm(c.head_width, eps=c.eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_width, eps=c.eps) if c.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, rope: jax.Array, attend: Attend, cache: LayerCache | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """[B, T, D] → ([B, T, D], (keys, values)).

        Args:
          rope: from `rope_cos_sin`.
          attend: (queries [B, T, N, H], keys, values [B, T, K, H]) → [B, T, N, H]; with a cache, heads precede
            positions in all four.
          cache: (slot, keys, values); keys and values are [B, K, S, H]. The new ones are written from `slot` on and
            returned with the old ones.
        """
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            slot, old_k, old_v = cache
            k = jax.lax.dynamic_update_slice_in_dim(old_k, k.swapaxes(1, 2).astype(old_k.dtype), slot, 2)
            v = jax.lax.dynamic_update_slice_in_dim(old_v, v.swapaxes(1, 2).astype(old_v.dtype), slot, 2)
            return self.o(attend(q.swapaxes(1, 2), k, v).swapaxes(1, 2)), (k, v)
        return self.o(attend(q, k, v)), (k, v)


class DecoderLayer(nnx.Module):
    """RMSNorm, attention, RMSNorm, SwiGLU."""

    def __init__(self, c: LanguageConfig, *, rngs: Keys):
        self.norm1, self.norm2 = RMSNorm(c.width, eps=c.eps), RMSNorm(c.width, eps=c.eps)
        self.attention = SelfAttention(c, rngs=rngs)
        self.gate = Linear(c.width, c.mlp_width, axes=("embed", "mlp"), rngs=rngs, bias=c.mlp_bias)
        self.up = Linear(c.width, c.mlp_width, axes=("embed", "mlp"), rngs=rngs, bias=c.mlp_bias)
        self.down = Linear(c.mlp_width, c.width, axes=("mlp", "embed"), rngs=rngs, bias=c.mlp_bias)

    def __call__(
        self, x_BTD: jax.Array, rope: jax.Array, attend: Attend, cache: LayerCache | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """[B, T, D] → ([B, T, D], (keys, values)); see `SelfAttention`."""
        y_BTD, kv = self.attention(self.norm1(x_BTD), rope, attend, cache)
        x_BTD = constrain(x_BTD + y_BTD, "batch", None, None)
        y_BTD = self.norm2(x_BTD)
        y_BTD = self.down(jax.nn.silu(self.gate(y_BTD)) * self.up(y_BTD))
        return constrain(x_BTD + y_BTD, "batch", None, None), kv


class LanguageModel(nnx.Module):
    """Decoder over one vocabulary whose text rows and visual rows are separate parameters.

    This lets a parameter rule train the visual rows only (ILLUME, stage 1), without optimizer state for the text rows.
    Ids below `text_rows` are text, the others visual. A tied model has no separate head parameters.
    """

    def __init__(self, config: LanguageConfig, text_rows: int, visual_rows: int, *, rngs: Keys):
        c = self.config = config
        self.text_rows, self.visual_rows = text_rows, visual_rows

        def rows(n: int) -> nnx.Param:
            return nnx.Param(truncated(rngs.params(), (n, c.width)), axes=("vocab", "embed"))

        self.embed_text, self.embed_visual = rows(text_rows), rows(visual_rows)
        self.layers = stack(lambda r: DecoderLayer(c, rngs=r), c.layers, rngs)
        self.norm = RMSNorm(c.width, eps=c.eps)
        self.head_text = None if c.tied else rows(text_rows)
        self.head_visual = None if c.tied else rows(visual_rows)

    def embed(self, tokens_BT: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Token ids → [B, T, D] in `dtype`."""
        text, visual = (weight(t[...], ("vocab", "embed"), dtype) for t in (self.embed_text, self.embed_visual))
        visual_BT = jnp.maximum(tokens_BT - self.text_rows, 0)
        is_text = (tokens_BT < self.text_rows)[..., None]
        x_BTD = jnp.where(is_text, text[jnp.minimum(tokens_BT, self.text_rows - 1)], visual[visual_BT])
        return constrain(x_BTD, "batch", None, None)

    def head(self, dtype: Any = jnp.float32) -> jax.Array:
        """The output head over the whole vocabulary: [V, D] in `dtype`."""
        text = self.embed_text if self.head_text is None else self.head_text
        visual = self.embed_visual if self.head_visual is None else self.head_visual
        return jnp.concatenate([weight(table[...], ("vocab", "embed"), dtype) for table in (text, visual)])

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """Input embeddings of packed rows → final hidden states [B, T, D]; multiply by `head` for logits.

        Args:
          positions_BT: int32 positions for the rotary embedding, below T.
          segments_BT: int32 segment ids; 0 is padding. A position attends to earlier positions of its own segment.
        """
        attend = causal_attention(segments_BT)
        rope = rope_cos_sin(self._table(x_BTD.shape[1]), positions_BT)

        def step(layer: DecoderLayer, x: jax.Array) -> jax.Array:
            return layer(x, rope, attend)[0]

        x_BTD = run_stack(self.layers, x_BTD, step, scan=self.config.scan, remat=self.config.remat)
        return self.norm(x_BTD)

    def _table(self, length: int) -> jax.Array:
        c = self.config
        return rope_table(length, c.head_width, c.rope_theta, c.rope_scaling)

    def incremental(self, batch: int, length: int, dtype: Any = jnp.float32) -> tuple[Callable[..., Any], Cache]:
        """Returns (extend, empty cache of `length` slots) for generation; call once, before the generation loop.

        The cache holds keys and values, [B, K, length, H] each: stacked over the layers if `scan`, else one pair per
        layer. Layers that are not scanned are unstacked here instead of at every token.

        extend(x_BTD, positions_BT, mask_BTS, cache, slot) → (hidden [B, T, D], new cache) processes T new positions and
        writes them to the cache from `slot` on. `mask_BTS` (boolean) selects the slots that each new position attends
        to, its own included.
        """
        c = self.config
        shape = (batch, c.kv_heads, length, c.head_width)

        def empty(*stack: int) -> KeysValues:
            return jnp.zeros((*stack, *shape), dtype), jnp.zeros((*stack, *shape), dtype)

        layers = self.layers if c.scan else unstacked(self.layers)
        table = self._table(length)

        def extend(
            x_BTD: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array, cache: Cache, slot: Any
        ) -> tuple[jax.Array, Cache]:
            rope = rope_cos_sin(table, positions_BT)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return heads_attention(q, k, v, mask_BTS)

            def step(x: jax.Array, layer_and_kv: Any) -> tuple[jax.Array, KeysValues]:
                layer, kv = layer_and_kv
                return layer(x, rope, attend, (slot, *kv))

            if c.scan:
                x_BTD, cache = jax.lax.scan(step, x_BTD, (layers, cache))
                return self.norm(x_BTD), cache
            found = []
            for pair in zip(layers, cache, strict=True):
                x_BTD, kv = step(x_BTD, pair)
                found.append(kv)
            return self.norm(x_BTD), tuple(found)

        return extend, empty(c.layers) if c.scan else tuple(empty() for _ in range(c.layers))
