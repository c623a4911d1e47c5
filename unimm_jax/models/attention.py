"""Attention: one door to the kernels, the selector's policy softmax, and rotary positions.

Kernels need `shard_map`, so this file looks at the mesh in force.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from unimm_jax.models.layout import USED

CAUSAL_BLOCKS = 4  # parts of the queries in XLA's causal attention
CUDNN_WIDTH = 128  # widest head that cuDNN's attention takes on every GPU
LANES = 128  # width of a TPU register; splash attention takes multiples of it


def platform() -> str:
    """What the computation is compiled for, "tpu", "gpu" or "cpu": the mesh in force knows, else the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    kind = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if kind in ("cuda", "rocm") else kind


def causal_attention(segments_BT: jax.Array) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The door: attention(q_BTNH, k_BTKH, v_BTKH) → [B, T, N, H], causal inside segments.

    Splash attention on a TPU (rows in multiples of 128), cuDNN on a GPU (half precision and the shapes that it takes:
    even rows, heads in multiples of 8 up to 128), XLA's elsewhere. Rows of
    segment 0 are padding; what they get differs between the three and is never read.
    """
    where, length = platform(), segments_BT.shape[1]
    if where == "tpu" and length % LANES == 0:
        return lambda q, k, v: splash_attention(q, k, v, segments_BT)
    mask_BTS = segment_mask(segments_BT, segments_BT, causal=True)
    size = max(-(-length // CAUSAL_BLOCKS), 64)

    def attend(q, k, v):
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if where == "gpu" and half and length % 2 == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= CUDNN_WIDTH:
            return cudnn_attention(q, k, v, mask_BTS)
        # later keys than a block's last query are never read: up to three eighths of the scores are not computed
        spans = [(start, min(start + size, length)) for start in range(0, length, size)]
        parts = [attention(q[:, i:j], k[:, :j], v[:, :j], mask_BTS[:, i:j, :j]) for i, j in spans]
        return jnp.concatenate(parts, 1)

    return attend


def cudnn_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """cuDNN's fused attention, half precision only."""
    mask = mask_BTS[:, None]
    found = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, implementation="cudnn")
    return checkpoint_name(found, "attention")


def splash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """Splash attention (Pallas, TPU), sharded over batch and heads of the mesh in force.

    Args:
      interpret: run the kernel's program without a TPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = q_BTNH.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["tensor"]
    if k_BTKH.shape[2] % ways:  # too few key heads to split: every query head gets its own
        k_BTKH, v_BTKH = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k_BTKH, v_BTKH))
    split = "tensor" if heads % ways == 0 else None
    local = heads // ways if split else heads
    pad = -width % LANES
    # [B, N, T, H], queries scaled, width padded to whole lanes
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

    def run(q, k, v, segments):
        one = lambda q, k, v, s: attend(q, k, v, segment_ids=kernel.SegmentIds(s, s))
        return jax.vmap(one)(q, k, v, segments)

    if not mesh.empty:
        rows, spec = P(USED["batch"]), P(USED["batch"], split)
        run = jax.shard_map(run, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)
    return checkpoint_name(run(q, k, v, segments_BT)[..., :width].swapaxes(1, 2), "attention")


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention, grouped queries allowed (K divides N); softmax in float32.

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, keys, values; scores are divided by sqrt(H).
      mask_BTS: boolean, True where query t may read key s; broadcast over heads. None reads everything. A query that
        may read nothing gets the mean of all values.

    Returns:
      [B, T, N, H], in the dtype of `q_BTNH`.
    """
    found = heads_attention(q_BTNH.swapaxes(1, 2), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask_BTS)
    return checkpoint_name(found.swapaxes(1, 2), "attention")


def heads_attention(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array | None = None
) -> jax.Array:
    """`attention` with heads before positions, as a cache keeps them: plain batched products [G·T, H] × [H, S]."""
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
    """Boolean [B, T, S]: same non-zero segment, and (if `causal`) not later in the row."""
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
    """Attention through a mask that may carry a gradient (LaVIT §3.1; DynamicViT's policy softmax), in float32.

    With scores s, allowed A in [0, 1], S keys and m the largest score over all keys, masked ones too:

        P = (exp(s - m) A + eps / S) / (sum_k exp(s - m) A + eps + sink exp(-m))

    LaVIT uses eps = 1e-6 and no sink: a masked key still gets about eps / S, and the gradient with respect to A grows
    as 1 / eps where nothing is allowed. A sink is a further key with score 0 and value 0; it bounds that gradient. With
    a sink, m is taken over the allowed keys and 0 instead, and s - m is cut at 10 (which concerns masked keys only).

    Args:
      allowed_BTS: float, 1 where query t may read key s, broadcastable to [B, T, S].
      eps: leak of the softmax; exactly LaVIT's when 1e-6.
      sink: weight of the extra zero key.

    Returns:
      [B, T, N, H], in the dtype of `q_BTNH`.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32) * scale
    allowed = allowed_BTS[:, None].astype(jnp.float32)
    if sink:
        # Over the allowed keys and the sink: the denominator is at least 1, whatever the scores of masked keys.
        top = jnp.maximum(jnp.where(allowed > 0, scores, 0.0).max(-1, keepdims=True), 0.0)
        top = jax.lax.stop_gradient(top)
    else:
        top = scores.max(-1, keepdims=True)  # with the leak the shift matters, so its gradient does, too
    weights = jnp.exp(jnp.minimum(scores - top, 10.0)) * allowed
    total = weights.sum(-1, keepdims=True) + eps
    if sink:
        total = total + sink * jnp.exp(-top)
    probs = (weights + eps / scores.shape[-1]) / total
    return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(v_BSNH.dtype), v_BSNH)


def rotary_frequencies(half: int, theta: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
    """Angular frequencies of the rotary pairs, float32 [half].

    Args:
      scaling: LLaMA 3.1's (factor, low_freq_factor, high_freq_factor, original positions): wavelengths beyond
        original / low are stretched by the factor, those under original / high kept, those between interpolated.
    """
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling:
        factor, low, high, original = scaling
        turns = original * frequency / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (smooth + (1 - smooth) / factor)
    return frequency.astype(np.float32)


def rotary_table(length: int, width: int, theta: float, scaling: tuple[float, ...] = ()) -> jax.Array:
    """Cosines and sines of the rotary angles of positions 0 to `length` - 1, float32 [length, 2, H / 2].

    Args:
      width: H, of a head.
      theta: base of the wavelengths (10000 in LLaMA). scaling: see `rotary_frequencies`.
    """
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * rotary_frequencies(width // 2, theta, scaling)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)


def rotary_turns(table: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """What `rotary` needs, once for all layers: float32 [B, T, 2, H / 2]. A position beyond the table gives NaN."""
    return table.at[positions_BT].get(mode="fill")


def rotary(x_BTNH: jax.Array, turns: jax.Array) -> jax.Array:
    """Rotary position embedding (RoFormer, §3.2), paired as Hugging Face does: first and second half of H.

    Args:
      turns: of `rotary_turns`.
    """
    cos, sin = jnp.split(turns, 2, axis=2)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
