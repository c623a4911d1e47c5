"""Mesh, logical axes and shardings. Models name logical axes; only this file knows which mesh axis they lie on."""

import functools
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unimm_jax.models.layout import STORED, spec

AXES = ("data", "fsdp", "tensor")

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


def param_shardings(model: nnx.Module, mesh: Mesh) -> Tree:
    """Shardings of a model's parameters, as a nested dict like its pure-dict parameters.

    Args:
      model: an abstract model (`nnx.eval_shape`).
    """
    state = nnx.state(model, nnx.Param)
    leaf = lambda v: NamedSharding(mesh, spec(v.get_raw_value().shape, v.get_metadata("axes"), mesh.shape, STORED))
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


@functools.lru_cache
def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending.

    Raises:
      ValueError: the batch does not divide over data × fsdp.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise ValueError(f"a batch of {batch} does not divide over {ways} devices (data × fsdp)")
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[index] for index in places.values()]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """Places a global batch of `size` rows on the mesh, of which this process has those of `local_rows`."""
    rows, sharding = local_rows(mesh, size), batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        def read(index: Any) -> np.ndarray:
            wanted = np.arange(size)[index[0]]
            return x[np.searchsorted(rows, wanted[0]) :][: len(wanted)]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, read)

    return {name: place(x) for name, x in batch.items()}
