"""Named TPU topologies and their devices, on a machine without a TPU. Compiling for them needs libtpu."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from unimm_jax.errors import UserError

SHAPES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e slices


def prepare() -> None:
    """Keeps libtpu from looking for a TPU, and JAX from caching programs that this machine cannot load.

    Must run before JAX is imported.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true"),
    ):
        os.environ.setdefault(name, value)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of TPU chips.

    Attributes:
      name: of one slice, for example v5e:8x8 or v5p:2x4x4.
      slices: number of slices.

    Raises (constructor):
      UserError: a name of another form.
    """

    name: str
    slices: int = 1

    def __post_init__(self):
        if not re.fullmatch(r"\w+:\d+(x\d+)+", self.name):
            raise UserError(f"--topology={self.name}: a topology has a name such as v5e:8x8 or v5p:2x4x4")

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"

    @property
    def chips(self) -> int:
        """Number of chips of all slices, by the name."""
        return self.slices * _chips(self.name.partition(":")[2])

    def devices(self) -> list[Any]:
        """The devices, slice by slice.

        Raises:
          UserError: libtpu is not installed, or does not know the name.
        """
        if not has_libtpu():
            raise UserError('compiling for a TPU needs libtpu; run pip install "jax[tpu]" (no TPU is needed)')
        from jax.experimental import topologies

        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chips == self.slices:  # libtpu's default is a host with several chips
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=self.name.replace("v5p:", "v5:"), **options
            )
        except Exception as error:  # whatever libtpu raises
            reason = str(error).splitlines()[0]
            raise UserError(f"libtpu does not know the topology {self.name!r}: {reason}") from None
        return sorted(found.devices, key=lambda device: (getattr(device, "slice_index", 0), device.id))

    def larger(self) -> list["Topology"]:
        """Larger slices of the same chip, smallest first; none for chips with three-dimensional topologies."""
        kind, _, shape = self.name.partition(":")
        if shape.count("x") != 1:
            return []
        return [Topology(f"{kind}:{s}", self.slices) for s in SHAPES if _chips(s) > _chips(shape)]


def _chips(shape: str) -> int:
    return math.prod(int(n) for n in shape.split("x"))


def has_libtpu() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None
