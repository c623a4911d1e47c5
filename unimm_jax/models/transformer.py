"""Common layers: linear layers, norms, feed-forward, attention and stacks of identical layers.

Parameters are `nnx.Param(value, axes=...)`; `partitioning.py` maps these logical axes to mesh axes. The layers of a
stack are stored as [L, ...] whether they are scanned or unrolled. Every layer computes in the dtype of its input.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.attention import attention, policy_attention
from unimm_jax.models.keys import Keys
from unimm_jax.models.partitioning import constrain, weight

Initializer = Callable[..., jax.Array]
truncated = nnx.initializers.truncated_normal(0.02)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., D] times w [D, F] → [..., F], in `dtype` if given, else in the dtype of the inputs.

    The gradient is computed in the dtype of x. It contracts rows directly; XLA's CPU backend would copy a transpose.
    """
    return jnp.einsum("...d,df->...f", x, w, preferred_element_type=dtype)


def _linear_fwd(x: jax.Array, w: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, w, dtype), (x, w)


def _linear_bwd(dtype: Any, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    dy = dy.astype(x.dtype)
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw = jax.lax.dot_general(rows, drows, (((0,), (0,)), ((), ())))
    return jnp.einsum("...f,df->...d", dy, w), dw.astype(w.dtype)


linear.defvjp(_linear_fwd, _linear_bwd)


class Linear(nnx.Module):
    """Affine map of the last axis, to one or several axes.

    Args (constructor):
      d_in: input width D.
      out: sizes of the output axes; the kernel is [D, *out], the bias [*out].
      axes: logical axes of the kernel.
      init: initializer of the kernel as a [D, product of out] matrix.
    """

    def __init__(
        self,
        d_in: int,
        out: int | tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        rngs: Keys,
        bias: bool = True,
        init: Initializer = truncated,
    ):
        self.axes = axes
        self.out = (out,) if isinstance(out, int) else tuple(out)
        size = 1
        for n in self.out:
            size *= n
        self.kernel = nnx.Param(init(rngs.params(), (d_in, size)).reshape(d_in, *self.out), axes=axes)
        self.bias = nnx.Param(jnp.zeros(self.out), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., *out]."""
        kernel = weight(self.kernel[...], self.axes, x.dtype)
        y = linear(x, kernel.reshape(kernel.shape[0], -1)).reshape(*x.shape[:-1], *self.out)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class OutputProjection(nnx.Module):
    """The output projection of attention, kernel [N, H, D]."""

    def __init__(self, heads: int, head_width: int, d_out: int, *, rngs: Keys, bias: bool = True):
        kernel = truncated(rngs.params(), (heads * head_width, d_out)).reshape(heads, head_width, d_out)
        self.kernel = nnx.Param(kernel, axes=("heads", None, "embed"))
        self.bias = nnx.Param(jnp.zeros((d_out,)), axes=(None,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., N, H] → [..., D]."""
        kernel = weight(self.kernel[...], ("heads", None, "embed"), x.dtype)
        y = linear(x.reshape(*x.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1]))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization in float32; no scale and bias if `affine` is False."""

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)), axes=(None,)) if affine else None
        self.bias = nnx.Param(jnp.zeros((width,)), axes=(None,)) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D], same dtype."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32 (LLaMA)."""

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D], same dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """Two linear layers with an activation (a name of `ACTIVATIONS`) between them."""

    def __init__(self, width: int, hidden: int, *, rngs: Keys, activation: str = "gelu"):
        self.activation = activation
        self.up = Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Attention(nnx.Module):
    """Multi-head self-attention or cross-attention, as in ViT.

    Args (constructor):
      biases: which of q, k, v have a bias ("qkv"; "qv" in EVA).
      kv_width, d_out: widths of the keys' input and of the output; `width` if None.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: Keys,
        biases: str = "qkv",
        kv_width: int | None = None,
        d_out: int | None = None,
    ):
        shape = (heads, width // heads)
        axes = ("embed", "heads", None)
        self.q = Linear(width, shape, axes=axes, rngs=rngs, bias="q" in biases)
        self.k = Linear(kv_width or width, shape, axes=axes, rngs=rngs, bias="k" in biases)
        self.v = Linear(kv_width or width, shape, axes=axes, rngs=rngs, bias="v" in biases)
        self.o = OutputProjection(heads, width // heads, d_out or width, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, kv_BSD: jax.Array | None = None, mask_BTS: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, D] attends to `kv_BSD` (itself if None) where `mask_BTS` (boolean) is True → [B, T, d_out]."""
        kv_BSD = x_BTD if kv_BSD is None else kv_BSD
        return self.o(attention(self.q(x_BTD), self.k(kv_BSD), self.v(kv_BSD), mask_BTS))

    def with_policy(
        self, x_BTD: jax.Array, kv_BSD: jax.Array, allowed_BTS: jax.Array, eps: float, sink: float
    ) -> jax.Array:
        """As `__call__`, with `policy_attention` and its float mask [B, T, S]."""
        return self.o(policy_attention(self.q(x_BTD), self.k(kv_BSD), self.v(kv_BSD), allowed_BTS, eps, sink))


class Block(nnx.Module):
    """Pre-norm encoder block of ViT: self-attention, then feed-forward."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        rngs: Keys,
        eps: float = 1e-6,
        biases: str = "qkv",
        activation: str = "gelu",
    ):
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, rngs=rngs, biases=biases)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, rngs=rngs, activation=activation)

    def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
        """[B, T, D] → [B, T, D]; `mask_BTS` is boolean [B, T, T]."""
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), mask_BTS=mask_BTS)
        return constrain(x_BTD + self.mlp(self.norm2(x_BTD)), "batch", None, None)


def stack(make: Callable[[Keys], Any], layers: int, rngs: Keys) -> Any:
    """Builds `layers` identical modules as one module whose parameters are [L, ...]."""
    return jax.vmap(lambda key: make(Keys(params=key)))(jax.random.split(rngs.params(), layers))


# Name → checkpoint policy: which values a layer saves for its backward pass. "none" does not recompute anything.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


def run_stack(layers: Any, x: Any, apply: Callable[[Any, Any], Any], *, scan: bool = False, remat: str = "none") -> Any:
    """Applies x → apply(layer, x) for every layer of a stack, in order.

    Scanned kernels are cast to the dtype of x before the loop, as every layer would do itself. The gradients that the
    loop accumulates then have that dtype too: in bfloat16 they take half the memory.

    Args:
      layers: from `stack`.
      scan: compile one layer and scan over the stack; otherwise unroll.
      remat: what layers recompute in the backward pass, a name of `REMAT`.
    """
    policy = REMAT[remat]
    step = jax.checkpoint(apply, prevent_cse=not scan, policy=policy) if policy is not None else apply
    if scan:
        layers = jax.tree.map(lambda w: w.astype(x.dtype) if w.ndim > 2 else w, layers)
        return jax.lax.scan(lambda carry, layer: (step(layer, carry), None), x, layers)[0]
    for layer in unstacked(layers):
        x = step(layer, x)
    return x


def unstacked(layers: Any) -> list[Any]:
    """The layers of a stack as a list."""
    leaves, tree = jax.tree.flatten(layers)
    return [jax.tree.unflatten(tree, parts) for parts in zip(*map(_unstack, leaves), strict=True)]


@jax.custom_vjp
def _unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    """[L, ...] → L arrays. The gradient is one stack; that of L slices would be the sum of L padded arrays."""
    return tuple(x[i] for i in range(x.shape[0]))


_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, parts: (jnp.stack(parts),))
