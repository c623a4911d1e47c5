"""Mesh, logical axes and shardings. Models name logical axes; only this file knows which mesh axis they lie on."""

import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# logical axis → mesh axis; names not listed are replicated.
RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}

Tree = Any


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor); one entry may be -1 and takes what is left.

    Raises:
      ValueError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(shape)
    if -1 in sizes:
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"config.mesh asks for {' × '.join(map(str, sizes))} = {int(np.prod(sizes))} devices, here are "
            f"{len(devices)}; put -1 for the axis that takes the rest"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> P:
    """Partition of one parameter. A leading layer axis, an axis that does not divide, or a mesh axis used twice stays
    whole."""
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    found: list[str | None] = []
    for size, name in zip(shape, names, strict=True):
        axis = RULES.get(name) if name else None
        usable = axis and axis not in found and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
        found.append(axis if usable else None)
    return P(*found)


def param_shardings(model: nnx.Module, mesh: Mesh) -> Tree:
    """Shardings of a model's parameters, as a nested dict like its pure-dict parameters.

    Args:
      model: an abstract model (`nnx.eval_shape`).
    """
    state = nnx.state(model, nnx.Param)
    leaf = lambda v: NamedSharding(mesh, spec(v.get_raw_value().shape, v.get_metadata("axes"), mesh))
    return nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def like_params(tree: Tree, params: Tree, shardings: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimiser state: a leaf lies as the parameter whose path ends its own, others are replicated.

    (A bare `jax.jit(tx.init)` would replicate the moments.)
    """
    known = {}
    for (path, leaf), (_, sharding) in zip(flatten(params), flatten(shardings), strict=True):
        known[path] = (leaf.shape, sharding)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        for start in range(len(keys)):
            hit = known.get("/".join(keys[start:]))
            if hit and hit[0] == leaf.shape:
                return hit[1]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def flatten(tree: Tree) -> list[tuple[str, Any]]:
    """Leaves of a nested dict with their paths, "a/b/c", in a fixed order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [("/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path), leaf) for path, leaf in leaves]


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`, for nested dicts; keys of digits become ints, as NNX lists have them."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = [int(k) if re.fullmatch(r"\d+", k) else k for k in path.split("/")]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a global batch (every process holds all of it) on the mesh.

    Raises:
      ValueError: the batch does not divide over data × fsdp.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = len(next(iter(batch.values())))
    if size % ways:
        raise ValueError(f"a batch of {size} does not divide over {ways} devices (data × fsdp)")
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}
