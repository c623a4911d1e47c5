"""Attention kernels and their dispatch, the selector's policy softmax, and rotary position embeddings.

Kernels run under `shard_map`, so this file reads the current mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from unimm_jax.models.partitioning import USED

CAUSAL_BLOCKS = 4  # number of query blocks in XLA's causal attention
CUDNN_WIDTH = 128  # largest head width that cuDNN's attention supports on every GPU
LANES = 128  # width of a TPU vector register; splash attention needs multiples of it

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values → outputs


def platform() -> str:
    """The target of the compilation, "tpu", "gpu" or "cpu": that of the current mesh, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    kind = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if kind in ("cuda", "rocm") else kind


def causal_attention(segments_BT: jax.Array) -> Attend:
    """Dispatches to an implementation: returns attend(q_BTNH, k_BTKH, v_BTKH) → [B, T, N, H], causal within segments.

    Splash attention on TPU (T a multiple of 128); cuDNN on GPU (half precision, T even, H a multiple of 8 and at most
    128); XLA otherwise. Segment 0 is padding: its outputs differ between the three and must not be used.

    Args:
      segments_BT: int32 segment ids of packed rows.
    """
    target, length = platform(), segments_BT.shape[1]
    if target == "tpu" and length % LANES == 0:
        return lambda q, k, v: splash_attention(q, k, v, segments_BT)
    mask_BTS = segment_mask(segments_BT, segments_BT, causal=True)
    size = max(-(-length // CAUSAL_BLOCKS), 64)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if target == "gpu" and half and length % 2 == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= CUDNN_WIDTH:
            return cudnn_attention(q, k, v, mask_BTS)
        # A block of queries needs no keys after its last query, so up to 3/8 of the scores are never computed.
        spans = [(start, min(start + size, length)) for start in range(0, length, size)]
        parts = [attention(q[:, i:j], k[:, :j], v[:, :j], mask_BTS[:, i:j, :j]) for i, j in spans]
        return jnp.concatenate(parts, 1)

    return attend


def cudnn_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """cuDNN's fused attention: [B, T, N, H] in the dtype of `q_BTNH`, which must be a half-precision dtype.

    Args:
      mask_BTS: boolean, True where query t may attend to key s; broadcast over heads.
    """
    mask = mask_BTS[:, None]
    found = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, implementation="cudnn")
    return checkpoint_name(found, "attention")


def splash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """Splash attention (Pallas, TPU), causal within segments, sharded over batch and heads of the current mesh.

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys, values; scores are divided by sqrt(H). T must be a multiple of `LANES`.
      segments_BT: int32 segment ids.
      interpret: run the kernel in Pallas' interpreter, without a TPU (for tests).

    Returns:
      [B, T, N, H].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = q_BTNH.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["tensor"]
    if k_BTKH.shape[2] % ways:  # too few key heads to shard: repeat them, one per query head
        k_BTKH, v_BTKH = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k_BTKH, v_BTKH))
    split = "tensor" if heads % ways == 0 else None
    local = heads // ways if split else heads
    pad = -width % LANES
    # [B, N, T, H]; queries are scaled, the head width is padded to a multiple of LANES
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0),) * 3 + ((0, pad),)) for x in (q_BTNH * width**-0.5, k_BTKH, v_BTKH))
    block = next(size for size in (512, 256, LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    attend = kernel.make_splash_mha(
        mask=masks.MultiHeadMask([masks.CausalMask((length, length))] * local),
        block_sizes=kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        def run_example(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
            return attend(q, k, v, segment_ids=kernel.SegmentIds(s, s))

        return jax.vmap(run_example)(q, k, v, segments)

    if not mesh.empty:
        rows, spec = P(USED["batch"]), P(USED["batch"], split)
        run = jax.shard_map(run, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)
    return checkpoint_name(run(q, k, v, segments_BT)[..., :width].swapaxes(1, 2), "attention")


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention with grouped queries (K divides N); softmax in float32.

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, keys, values; scores are divided by sqrt(H).
      mask_BTS: boolean, True where query t may attend to key s; broadcast over heads. None masks nothing. A query with
        all keys masked gets the mean of all values.

    Returns:
      [B, T, N, H], in the dtype of `q_BTNH`.
    """
    found = heads_attention(q_BTNH.swapaxes(1, 2), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask_BTS)
    return checkpoint_name(found.swapaxes(1, 2), "attention")


def heads_attention(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array | None = None
) -> jax.Array:
    """`attention` with heads before positions, the layout of a key/value cache: [B, N, T, H].

    The products are plain batched matrix products [G·T, H] × [H, S] with G = N / K.
    """
    b, n, t, h = q_BNTH.shape
    groups = k_BKSH.shape[1]
    q = (q_BNTH * h**-0.5).reshape(b, groups, n // groups * t, h)
    scores = jnp.einsum("bkth,bksh->bkts", q, k_BKSH, preferred_element_type=jnp.float32)
    if mask_BTS is not None:
        scores = jnp.where(jnp.tile(mask_BTS, (1, n // groups, 1))[:, None], scores, -1e30)
    p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    found = jnp.einsum("bkts,bksh->bkth", p.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return (found / p.sum(-1, keepdims=True)).astype(q_BNTH.dtype).reshape(b, n, t, h)


def segment_mask(q_segments_BT: jax.Array, k_segments_BS: jax.Array, causal: bool) -> jax.Array:
    """Boolean [B, T, S]: query and key share a non-zero segment and, if `causal`, the key is not later in the row."""
    mask = (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & (q_segments_BT[:, :, None] > 0)
    if causal:
        steps = jnp.arange(mask.shape[1])[:, None] >= jnp.arange(mask.shape[2])[None, :]
        mask = mask & steps
    return mask


def policy_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    allowed_BTS: jax.Array,
    eps: float = 1e-6,
    sink: float = 0.0,
) -> jax.Array:
    """Attention with a differentiable mask, softmax in float32 (LaVIT §3.1; the policy softmax of DynamicViT).

    With scores s, mask A in [0, 1], S keys and m the maximum score over all keys, masked ones included:

        P = (exp(s - m) A + eps / S) / (sum_k exp(s - m) A + eps + sink exp(-m))

    LaVIT uses eps = 1e-6 and no sink: a masked key keeps a weight of about eps / S, and the gradient with respect to A
    grows as 1 / eps where all keys are masked. A sink is an additional key with score 0 and value 0, which bounds that
    gradient. With a sink, m is the maximum over the allowed keys and 0, and s - m is clipped at 10 (only masked keys
    exceed it).

    Args:
      q_BTNH, k_BSNH, v_BSNH: queries, keys, values; scores are divided by sqrt(H).
      allowed_BTS: float, 1 where query t may attend to key s; broadcastable to [B, T, S].
      eps: smoothing of the softmax; 1e-6 in LaVIT.
      sink: weight of the additional zero key; 0 removes it.

    Returns:
      [B, T, N, H], in the dtype of `q_BTNH`.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32) * scale
    allowed = allowed_BTS[:, None].astype(jnp.float32)
    if sink:
        # Maximum over the allowed keys and the sink, so the denominator is at least 1 whatever the masked scores are.
        top = jnp.maximum(jnp.where(allowed > 0, scores, 0.0).max(-1, keepdims=True), 0.0)
        top = jax.lax.stop_gradient(top)
    else:
        top = scores.max(-1, keepdims=True)  # eps makes the result depend on the shift, so its gradient is kept
    weights = jnp.exp(jnp.minimum(scores - top, 10.0)) * allowed
    total = weights.sum(-1, keepdims=True) + eps
    if sink:
        total = total + sink * jnp.exp(-top)
    probs = (weights + eps / scores.shape[-1]) / total
    return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(v_BSNH.dtype), v_BSNH)


def rope_frequencies(half: int, theta: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
    """Angular frequencies of the rotary pairs in radians per position, float32 [half].

    Args:
      half: number of pairs, half of the head width.
      theta: base of the wavelengths (10000 in LLaMA).
      scaling: LLaMA 3.1's (factor, low_freq_factor, high_freq_factor, original_max_positions), or (). Wavelengths above
        original / low are multiplied by the factor, those below original / high are kept, those between are
        interpolated.
    """
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling:
        factor, low, high, original = scaling
        periods = original * frequency / (2 * np.pi)
        smooth = np.clip((periods - low) / (high - low), 0, 1)
        frequency = frequency * (smooth + (1 - smooth) / factor)
    return frequency.astype(np.float32)


def rope_table(length: int, width: int, theta: float, scaling: tuple[float, ...] = ()) -> jax.Array:
    """Cosines and sines of the rotary angles at positions 0 to `length` - 1, float32 [length, 2, H / 2].

    Args:
      length: number of positions.
      width: head width H.
      theta, scaling: see `rope_frequencies`.
    """
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * rope_frequencies(width // 2, theta, scaling)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)


def rope_cos_sin(table: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rows of `rope_table` at the given positions, float32 [B, T, 2, H / 2]. Positions beyond the table give NaN."""
    return table.at[positions_BT].get(mode="fill")


def apply_rope(x_BTNH: jax.Array, cos_sin: jax.Array) -> jax.Array:
    """Rotary position embedding (RoFormer §3.2): [B, T, N, H], same dtype.

    Pairs are the first and second half of H, as in Hugging Face's LLaMA.

    Args:
      cos_sin: float32 [B, T, 2, H / 2], from `rope_cos_sin`.
    """
    cos, sin = jnp.split(cos_sin, 2, axis=2)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
