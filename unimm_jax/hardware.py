"""What chips can do, and what a topology gets: mesh, remat policy, rows a device. Apart from the experiment's config.

Figures of chips are the makers' (cloud.google.com/tpu/docs); memory is what the compiler lets a program have.
"""

import dataclasses
import re
from typing import Any

import jax

from unimm_jax.data import pipeline

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      memory: bytes of HBM for a program. flops: bfloat16 products and sums a second. bandwidth: HBM bytes a second.
      link: bytes a second from a chip to the others of its slice, all links together, one direction.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float


# `device_kind` → chip
CHIPS = {
    "TPU v4": Chip("v4", int(30.75 * GIB), 275e12, 1.228e12, 150e9),
    "TPU v5 lite": Chip("v5e", int(15.75 * GIB), 197e12, 0.819e12, 100e9),
    "TPU v5": Chip("v5p", int(95.74 * GIB), 459e12, 2.765e12, 300e9),
    "TPU v6 lite": Chip("v6e", int(31.25 * GIB), 918e12, 1.64e12, 224e9),
}
DATA_CENTRE_LINK = 6.25e9  # bytes a second a chip between slices


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a topology gets.

    Attributes:
      mesh: (data, fsdp, tensor) of one slice; more slices multiply `data`.
      remat: of the language model, a name of `models.transformer.REMAT`.
      rows: rows of a batch on each device with which `configs/stage2.py:7b` was seen to fit.
    """

    mesh: tuple[int, int, int]
    remat: str = "full"
    rows: int = 1


# Pattern of a topology → choice, the first that matches. Beyond 64 chips replicas share the work, so that shards stay
# large; the figures behind it stand in docs/performance.md.
CHOICES = [
    (r"v5e:4x4", Choice((1, 16, 1))),
    (r"v5e:8x8", Choice((1, 64, 1))),
    (r"v5e:16x16", Choice((4, 64, 1))),
    (r"(v5p|v5):2x4x4", Choice((1, 32, 1), rows=4)),
    (r"v6e:4x4", Choice((1, 16, 1), rows=2)),
    (r".*", Choice((1, -1, 1))),
]


def choose(topology: str) -> Choice:
    """The choice for a topology's name, as "v5e:8x8"."""
    return next(choice for pattern, choice in CHOICES if re.fullmatch(pattern, topology))


def apply(config: Any, topology: str, slices: int = 1, rows: int = 0, remat: str = "") -> Any:
    """A copy of a config with mesh, remat and batch of a topology.

    Args:
      rows: on each device, instead of the table's. remat: instead of the table's.

    Raises:
      ValueError: a name that is not KIND:AxB or KIND:AxBxC.
    """
    if not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(f"a topology is named like v5e:8x8 or v5p:2x4x4, not {topology!r}")
    choice, config = choose(topology), config.copy_and_resolve_references()
    chips = slices
    for size in topology.split(":")[1].split("x"):
        chips *= int(size)
    data, fsdp, tensor = choice.mesh
    fsdp = chips // (slices * data * tensor) if fsdp == -1 else fsdp
    config.mesh = (data * slices, fsdp, tensor)
    config.train.batch_size = (rows or choice.rows) * data * slices * fsdp
    if "language" in config.model:
        with config.unlocked():  # sizes that leave remat at its default do not name it
            config.model.language.remat = remat or choice.remat
    return config


def share_of_peak(objective: Any, config: Any, devices: list[Any]) -> float:
    """Seconds that a step's operations would take at the peak of all chips, 0 where the chip is not in the table;
    divided by the seconds of a step it is the utilisation (MFU)."""
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        return 0.0
    shapes = pipeline.batch_shapes(config)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    return objective.step_flops(batch) / (len(devices) * chip.flops)
