"""Memory, compute and bandwidth of chips.

Figures are the manufacturer's (cloud.google.com/tpu/docs); memory is what the compiler lets a program use.
"""

import dataclasses
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      memory: bytes of HBM for a program. flops: bfloat16 operations per second. bandwidth: HBM bytes per second.
      link: bytes per second from a chip to the others of its slice, over all links, in one direction.
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


def share_of_peak(objective: Any, spec: dict[str, Any], devices: list[Any]) -> float:
    """Seconds that a step's operations take at the peak of all chips. Divided by the seconds of a step it is the model
    FLOPs utilization (MFU). 0 for chips that are not in `CHIPS`.

    Args:
      objective: an `objectives.Objective`. spec: its batch spec.
    """
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        return 0.0
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}
    return objective.step_flops(batch) / (len(devices) * chip.flops)
