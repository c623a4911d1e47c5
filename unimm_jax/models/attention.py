"""Attention: the plain kind behind one door, the selector's policy softmax, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention, grouped queries allowed (K divides N).

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, keys, values; scores are divided by sqrt(H).
      mask_BTS: boolean, True where query t may read key s; broadcast over heads. None reads everything.

    Returns:
      [B, T, N, H], in the dtype of `q_BTNH`.
    """
    mask = None if mask_BTS is None else mask_BTS[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask)


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


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, scaling: tuple[float, ...] = ()) -> jax.Array:
    """Rotary position embedding in the Hugging Face convention (first and second half of H form the pairs).

    Args:
      positions_BT: int32 positions.
      theta: base of the wavelengths (10000 in LLaMA). scaling: see `rotary_frequencies`.
    """
    frequency = rotary_frequencies(x_BTNH.shape[-1] // 2, theta, scaling)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
