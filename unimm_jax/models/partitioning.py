"""Partitioning: maps logical axes to mesh axes and constrains activations and weights accordingly.

In `models`, only this file and `attention.py` read the current mesh. Without a mesh, or on one device, `constrain` and
`weight` add no constraints.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Axes = tuple[str | None, ...]

# Logical axis → mesh axes, for stored weights and for activations and weights in use. Other axes are replicated.
_BOTH: dict[str, tuple[str, ...]] = {"mlp": ("tensor",), "heads": ("tensor",), "vocab": ("tensor",)}
STORED = _BOTH | {"embed": ("fsdp",)}
USED = _BOTH | {"batch": ("data", "fsdp")}


def spec(shape: tuple[int, ...], axes: Axes, sizes: Any, table: dict[str, tuple[str, ...]]) -> P:
    """The `PartitionSpec` of an array.

    Leading axes of `shape` without a name (stacked layers) are replicated. A mesh axis is used at most once per array.
    Mesh axes are dropped, from the last one, until the array axis is divisible by their size.

    Args:
      shape: the array's shape.
      axes: logical axis, or None, of each trailing axis of `shape`.
      sizes: mesh axis → number of devices along it.
      table: logical axis → mesh axes, `STORED` or `USED`.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    found: list[Any] = []
    taken: set[str] = set()
    for size, name in zip(shape, names, strict=True):
        along = tuple(axis for axis in table.get(name or "", ()) if sizes[axis] > 1 and axis not in taken)
        while along and size % math.prod(sizes[axis] for axis in along):
            along = along[:-1]
        taken |= set(along)
        found.append(along if len(along) > 1 else along[0] if along else None)
    return P(*found)


def _mesh() -> Any:
    """The current mesh if it has several devices, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the sharding of its logical axes.

    Args:
      axes: a logical axis, or None, for each axis of `x`.
    """
    mesh = _mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh.shape, USED))


def weight(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Casts a weight to `dtype` and gathers it over fsdp, right before its use. Its gradient is reduce-scattered.

    Without these constraints the compiler may communicate activations instead of weights, or reduce whole gradients on
    every device.

    Args:
      axes: a logical axis, or None, for each axis of `w`.
    """
    return w.astype(dtype) if _mesh() is None else _gathered(w, axes, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    return constrain(w.astype(dtype), *axes)


def _gathered_fwd(w: jax.Array, axes: Axes, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return _gathered(w, axes, dtype), jnp.zeros((0,), w.dtype)


def _gathered_bwd(axes: Axes, dtype: Any, like: jax.Array, dw: jax.Array) -> tuple[jax.Array]:
    sharded = spec(dw.shape, axes, _mesh().shape, STORED)
    # The axis of the shards comes first while they are summed. Along the last axis of a weight, libtpu turns a
    # reduce-scatter into shards of 128 columns into an all-reduce.
    axis = next((i for i, along in enumerate(sharded) if along == "fsdp"), 0)
    first = P(sharded[axis], *sharded[:axis], *sharded[axis + 1 :])
    dw = jax.lax.with_sharding_constraint(jnp.moveaxis(dw, axis, 0), first)
    return (jnp.moveaxis(dw, 0, axis).astype(like.dtype),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
