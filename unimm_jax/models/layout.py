"""Where arrays lie: logical axes → mesh axes, and the two constraints that hold a compiled step to it.

The only file of the models that, with `attention.py`, looks at the mesh in force. Without a mesh, or on one device, its
functions do nothing.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Axes = tuple[str | None, ...]

# Weights as they are stored, and activations and weights in use; names that a table lacks are whole.
_BOTH: dict[str, tuple[str, ...]] = {"mlp": ("tensor",), "heads": ("tensor",), "vocab": ("tensor",)}
STORED = _BOTH | {"embed": ("fsdp",)}
USED = _BOTH | {"batch": ("data", "fsdp")}


def spec(shape: tuple[int, ...], axes: Axes, sizes: Any, table: dict[str, tuple[str, ...]]) -> P:
    """Partition of an array. A leading axis without a name (layers) stays whole; of a name's mesh axes those are left
    out, from the last, that are taken already or with which the axis does not divide.

    Args:
      sizes: mesh axis → devices along it.
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
    """The mesh in force if it has several devices, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Holds an activation to its place.

    Args:
      axes: a logical axis, or None, for each axis of `x`.
    """
    mesh = _mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh.shape, USED))


def weight(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """A weight right before its use: cast, gathered over fsdp; its gradient is scattered back the same way.

    Left to itself the compiler may rotate activations past the shards instead, or sum whole gradients on every chip.
    """
    return w.astype(dtype) if _mesh() is None else _gathered(w, axes, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w, axes, dtype):
    return constrain(w.astype(dtype), *axes)


def _gathered_fwd(w, axes, dtype):
    return _gathered(w, axes, dtype), jnp.zeros((0,), w.dtype)


def _gathered_bwd(axes, dtype, like, dw):
    mesh = _mesh()
    return (jax.lax.with_sharding_constraint(dw, spec(dw.shape, axes, mesh.shape, STORED)).astype(like.dtype),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
