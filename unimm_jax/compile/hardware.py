"""Memory, compute and bandwidth of chips.

Figures are the manufacturers' (cloud.google.com/tpu/docs and NVIDIA's data sheets, dense bfloat16 with float32 sums).
The memory of a TPU is what the compiler lets a program use, that of a GPU is its whole memory.
"""

import dataclasses
import logging
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      memory: bytes for a program. flops: bfloat16 operations per second.
      bandwidth: bytes per second from and to the memory.
      link: bytes per second from a chip to the others of its slice or node, over all links, in one direction.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float


# `device_kind` → chip
CHIPS = {
    "NVIDIA A100 80GB PCIe": Chip("a100-pcie", 80 * 10**9, 312e12, 1.935e12, 32e9),
    "NVIDIA A100-PCIE-40GB": Chip("a100-pcie-40gb", 40 * 10**9, 312e12, 1.555e12, 32e9),
    "NVIDIA A100-SXM4-40GB": Chip("a100-40gb", 40 * 10**9, 312e12, 1.555e12, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip("a100-80gb", 80 * 10**9, 312e12, 2.039e12, 300e9),
    "NVIDIA B200": Chip("b200", 180 * 10**9, 2250e12, 7.7e12, 900e9),
    "NVIDIA GB200": Chip("gb200", 186 * 10**9, 2500e12, 8.0e12, 900e9),
    "NVIDIA GH200 480GB": Chip("gh200", 96 * 10**9, 989.4e12, 4.0e12, 450e9),
    "NVIDIA H100 80GB HBM3": Chip("h100", 80 * 10**9, 989.4e12, 3.35e12, 450e9),
    "NVIDIA H100 NVL": Chip("h100-nvl", 94 * 10**9, 835.5e12, 3.9e12, 300e9),
    "NVIDIA H100 PCIe": Chip("h100-pcie", 80 * 10**9, 756e12, 2.0e12, 64e9),
    "NVIDIA H200": Chip("h200", 141 * 10**9, 989.4e12, 4.8e12, 450e9),
    "NVIDIA H200 NVL": Chip("h200-nvl", 141 * 10**9, 835.5e12, 4.8e12, 450e9),
    "NVIDIA L4": Chip("l4", 24 * 10**9, 121e12, 0.3e12, 32e9),
    "NVIDIA L40S": Chip("l40s", 48 * 10**9, 362e12, 0.864e12, 32e9),
    "TPU v4": Chip("v4", int(30.75 * GIB), 275e12, 1.228e12, 150e9),
    "TPU v5 lite": Chip("v5e", int(15.75 * GIB), 197e12, 0.819e12, 100e9),
    "TPU v5": Chip("v5p", int(95.74 * GIB), 459e12, 2.765e12, 300e9),
    "TPU v6 lite": Chip("v6e", int(31.25 * GIB), 918e12, 1.64e12, 224e9),
}
# Other names of the same chips, which JAX also knows
CHIPS |= {"TPU v5e": CHIPS["TPU v5 lite"], "TPU v5p": CHIPS["TPU v5"], "TPU v6e": CHIPS["TPU v6 lite"]}


def share_of_peak(objective: Any, spec: dict[str, Any], devices: list[Any]) -> float:
    """Seconds that a step's operations take at the peak of all chips. Divided by the seconds of a step it is the model
    FLOPs utilization (MFU). 0 for chips that are not in `CHIPS`.

    Args:
      objective: an `objectives.Objective`. spec: its batch spec.
    """
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        if devices[0].platform != "cpu":
            logging.warning(
                "no MFU is logged: the peak of %r is not in unimm_jax/compile/hardware.py", devices[0].device_kind
            )
        return 0.0
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}
    return objective.step_flops(batch) / (len(devices) * chip.flops)
