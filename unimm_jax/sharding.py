"""Device mesh, and shardings of parameters, optimizer state and batches.

Models name logical axes; `unimm_jax.models.partitioning` maps them to the axes of the mesh built here.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unimm_jax.errors import ConfigError
from unimm_jax.models.partitioning import STORED, spec

AXES = ("data", "fsdp", "tensor")
MAX_FSDP = 32  # default maximum of the fsdp axis: the TPU's compiler does not reduce-scatter over 64 chips of a slice

Tree = Any


def mesh_shape(shape: Sequence[int], devices: int, slices: int = 1) -> tuple[int, int, int]:
    """Sizes of the mesh axes (data, fsdp, tensor) for a number of devices.

    Args:
      shape: a config's mesh: three numbers, one of which may be -1 for the remaining devices. () is the default: fsdp
        is up to `MAX_FSDP` devices of a slice, data takes the remaining devices and the slices.
      devices: number of devices.
      slices: number of TPU slices.

    Raises:
      ConfigError: the product is not the number of devices.
    """
    if not shape:
        per_slice = devices // slices
        fsdp = math.gcd(per_slice, MAX_FSDP) if per_slice > MAX_FSDP else per_slice
        return devices // fsdp, fsdp, 1
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if math.prod(sizes) != devices:
        raise ConfigError(
            f"config.mesh asks for {' × '.join(map(str, sizes))} = {math.prod(sizes)} devices, here are {devices}; "
            "put -1 for the axis that takes the remaining devices, or () for the default"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes (data, fsdp, tensor). With several TPU slices, the data axis spans the slices.

    Args:
      shape: a config's mesh; see `mesh_shape`.
      devices: devices of the mesh, also those of an ahead-of-time topology; None is all devices.

    Raises:
      ConfigError: see `mesh_shape`, or the data axis is not divisible by the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices}) if devices[0].platform == "tpu" else 1
    data, fsdp, tensor = mesh_shape(shape, len(devices), slices)
    types = (AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)
    if data % slices:
        raise ConfigError(
            f"config.mesh: the data axis has size {data}, which is not divisible by {slices} slices; use a multiple"
        )
    from jax.experimental import mesh_utils

    array = mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices=devices)
    return Mesh(array, AXES, axis_types=types)


def param_shardings(model: nnx.Module, mesh: Mesh) -> Tree:
    """Shardings of a model's parameters, as a nested dict with the structure of its parameters.

    Args:
      model: an abstract model (`nnx.eval_shape`).
      mesh: the mesh.
    """
    state = nnx.state(model, nnx.Param)

    def sharding_of(v: nnx.Variable) -> NamedSharding:
        return NamedSharding(mesh, spec(v.get_raw_value().shape, v.get_metadata("axes"), mesh.shape, STORED))

    return nnx.to_pure_dict(jax.tree.map(sharding_of, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def like_params(tree: Tree, params: Tree, shardings: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimizer state, with the structure of `tree`.

    A leaf has the sharding of the parameter of equal shape whose path is a suffix of its own; other leaves are
    replicated. (`jax.jit(tx.init)` alone would replicate the moments.)

    Args:
      tree: abstract optimizer state.
      params, shardings: the trained parameters and their shardings.
      mesh: the mesh.
    """
    known = {}  # path of a parameter → (shape, sharding)
    for (path, leaf), (_, sharding) in zip(flatten(params), flatten(shardings), strict=True):
        known[path] = (leaf.shape, sharding)

    def sharding_of(path: tuple, leaf: Any) -> NamedSharding:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        for start in range(len(keys)):
            hit = known.get("/".join(keys[start:]))
            if hit and hit[0] == leaf.shape:
                return hit[1]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def flatten(tree: Tree) -> list[tuple[str, Any]]:
    """Pairs (path, leaf) of a nested dict, with paths such as "a/b/c", in a fixed order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [("/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path), leaf) for path, leaf in leaves]


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`. Path components of digits become int keys, as in NNX lists."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = [int(k) if re.fullmatch(r"\d+", k) else k for k in path.split("/")]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batch arrays: the first axis over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def batch_ways(mesh: Mesh) -> int:
    """Number of parts into which the rows of a batch are divided: data × fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, size: int, parts: int = 1) -> None:
    """Checks that a batch of `size` rows divides over the mesh and over `parts` micro-batches.

    Raises:
      ConfigError: it does not.
    """
    ways = batch_ways(mesh)
    if size % (ways * parts):
        over = f"{ways} devices (data × fsdp)" + (f" and {parts} micro-batches" if parts > 1 else "")
        remedy = "config.train.batch_size" + (" or config.train.micro_batches" if parts > 1 else "")
        raise ConfigError(f"a batch of {size} rows does not divide over {over}; change {remedy}")


@functools.lru_cache
def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Indices of the rows of a global batch that the devices of this process hold, ascending.

    Args:
      mesh: the mesh.
      batch: number of rows of the global batch.

    Raises:
      ConfigError: the batch is not divisible by data × fsdp.
    """
    check_batch(mesh, batch)
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices.values()]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """Puts a global batch of `size` rows on the mesh.

    Args:
      batch: the rows that this process holds (`local_rows`), in order.
      mesh: the mesh.
      size: number of rows of the global batch.
    """
    rows, sharding = local_rows(mesh, size), batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        def read(index: Any) -> np.ndarray:
            wanted = np.arange(size)[index[0]]
            return x[np.searchsorted(rows, wanted[0]) :][: len(wanted)]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, read)

    return {name: put(x) for name, x in batch.items()}
