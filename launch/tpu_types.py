"""TPU accelerator types: chips, hosts, topology and image (cloud.google.com/tpu/docs)."""

import dataclasses

# accelerator type without its number → GKE's name, chips per host, runtime image, whether the number counts cores
FAMILIES = {
    "v4": ("tpu-v4-podslice", 4, "tpu-ubuntu2204-base", True),
    "v5litepod": ("tpu-v5-lite-podslice", 4, "v2-alpha-tpuv5-lite", False),
    "v5p": ("tpu-v5p-slice", 4, "v2-alpha-tpuv5", True),
    "v6e": ("tpu-v6e-slice", 4, "v2-alpha-tpuv6e", False),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TpuType:
    """A slice.

    Attributes:
      name: accelerator type, such as "v5litepod-16". chips: of the slice. chips_per_host: of one host.
      topology: such as "4x4". gke: GKE's name of the accelerator. runtime: image of the hosts of a TPU VM.
    """

    name: str
    chips: int
    chips_per_host: int
    topology: str
    gke: str
    runtime: str

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.chips // self.chips_per_host


def tpu_type(name: str) -> TpuType:
    """The slice of an accelerator type.

    Raises:
      ValueError: it is not known.
    """
    family, _, number = name.replace("v5e-", "v5litepod-").partition("-")
    if family in FAMILIES and number.isdigit():
        gke, per_host, runtime, cores = FAMILIES[family]
        chips = int(number) // 2 if cores else int(number)
        topologies = CUBES if cores else FLAT
        if chips in topologies:
            per_host = chips if chips < per_host or (chips == 8 and not cores) else per_host
            return TpuType(f"{family}-{number}", chips, per_host, topologies[chips], gke, runtime)
    known = [f"{f}-{n * (2 if c else 1)}" for f, (_, _, _, c) in FAMILIES.items() for n in (CUBES if c else FLAT)]
    raise ValueError(f"the TPU type {name!r} is not known; types are {', '.join(known)}")
