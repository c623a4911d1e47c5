"""Memory that a stage needs, from shapes alone: nothing is compiled or allocated."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from unimm_jax import objectives, optim
from unimm_jax.config import Config
from unimm_jax.data.pipeline import Input
from unimm_jax.errors import OutOfMemoryError

GIB = 2**30
PROCESS = 1.3 * GIB  # Python, libraries, the compiler and its programs, readers of data; measured at size laptop


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that a stage needs, over all devices.

    Attributes:
      params: parameters; frozen ones have the dtype of the activations. trained: those that the optimizer trains.
      saved: activations that a step keeps for its backward pass, of one micro-batch.
    """

    params: int
    trained: int
    saved: int = 0

    @property
    def checkpoint(self) -> int:
        """Parameters and the optimizer's two moments."""
        return self.params + 2 * self.trained

    @property
    def step(self) -> int:
        """What a step holds at once at least: checkpoint, gradients and saved activations."""
        return self.checkpoint + self.trained + self.saved


def needs(config: Config, data: Input | None = None, activations: bool = False) -> Needs:
    """The memory of a stage.

    Args:
      data: the stage's input, which knows the size of the vocabulary; without it, vocabulary sizes are the published
        ones. activations: whether to trace the loss, which takes seconds, for `Needs.saved`.
    """
    objective_class = objectives.get(config.objective)
    objective = objective_class(config, data or objective_class.abstract_input(config))
    trained, frozen, _ = optim.split(jax.eval_shape(objective.init, jax.random.key(0)), list(config.optimizer.rules))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, objective.dtype), frozen)
    size = _bytes(trained)
    if not activations:
        return Needs(size + _bytes(frozen), size)
    rows = max((data.size() if data else objective_class.batch_rows(config)) // config.train.micro_batches, 1)
    spec = objective_class.batch_spec(config, rows)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}

    def backward(trained: Any, frozen: Any, batch: Any) -> Any:
        def loss(trained: Any) -> Any:
            return objective.loss(optim.join(trained, frozen), batch, jax.random.key(0), 0)

        return jax.vjp(loss, trained, has_aux=True)[1]

    saved = _bytes(jax.eval_shape(backward, trained, frozen, batch))
    return Needs(size + _bytes(frozen), size, max(saved - size, 0))


def check_devices(config: Config) -> Needs:
    """Compares the size of parameters, gradients and optimizer moments with the memory of all devices; gives the sizes.

    Needs no data and allocates nothing: vocabulary sizes are the published ones.

    Raises:
      OutOfMemoryError: they do not fit.
    """
    found = needs(config)
    if limit := device_limit():
        there, what = limit * jax.device_count(), f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    else:
        there, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    if found.step > 0.9 * there:
        raise OutOfMemoryError(
            f"{config.name} needs {found.step / GIB:.0f} GiB for parameters, gradients and optimizer state, {what} has "
            f"{there / GIB:.0f} GiB: use the size laptop (--config=configs/{config.stage}.py:laptop) or one_gpu, "
            "or more devices"
        )
    return found


def device_limit() -> int:
    """The bytes that a program can use on a device; 0 if it does not say so, as a CPU."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def device_least(config: Config, mesh: jax.sharding.Mesh, data: Input | None = None) -> tuple[float, float]:
    """The bytes of a device that a step takes at least; the peak of the compiled step (`unimm_jax.aot`) is higher.

    Returns:
      (the device's shards of state and gradients, its share of the activations that a micro-batch keeps for the
      backward pass).
    """
    found = needs(config, data, activations=True)
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    frozen = found.params - found.trained  # may be among what is kept
    kept = max(found.saved - frozen, 0)
    return (found.checkpoint + found.trained) / ways, kept / (ways * mesh.shape["data"])


def host_phases(config: Config, data: Input | None = None) -> dict[str, float]:
    """Estimated memory of this process, in bytes, while it loads, trains and saves: "load", "step" and "save".

    On a CPU the state, the gradients and the activations are in host memory. Parameters take twice their size while
    they are initialized, or read and cast. A save copies the state. On an accelerator only this host's share of a
    checkpoint is in host memory, while it is saved; parameters are loaded one at a time.
    """
    share = len(jax.local_devices()) / len(jax.devices())
    if jax.default_backend() != "cpu":
        return {"load": PROCESS, "step": PROCESS, "save": PROCESS + share * needs(config, data).checkpoint}
    found = needs(config, data, activations=True)
    sizes = {"load": 2 * found.params, "step": found.step, "save": 2 * found.checkpoint}
    return {name: PROCESS + share * size for name, size in sizes.items()}


def _bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, abstract or not. Random keys do not count."""
    leaves = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)]
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)
