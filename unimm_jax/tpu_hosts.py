"""How many hosts a TPU has: from the environment on GKE, from the metadata server on TPU VMs."""

import os
import pathlib
import urllib.error
import urllib.request

SECONDS = 2  # a metadata server answers at once; elsewhere its name does not resolve
ENDPOINTS = "worker-network-endpoints"  # hosts of a slice, separated by commas
ENVIRONMENT = "tpu-env"  # lines like "MEGASCALE_NUM_SLICES: '2'"


def has_tpu() -> bool:
    """Whether JAX may use a TPU of this machine: it has device files, and JAX_PLATFORMS does not exclude them."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    return any(True for pattern in ("accel*", "vfio/[0-9]*") for _ in pathlib.Path("/dev").glob(pattern))


def number_of_hosts() -> int:
    """Hosts of all slices that this process belongs to; 1 without a TPU, or with one that does not say."""
    if names := os.environ.get("TPU_WORKER_HOSTNAMES"):  # GKE
        return len(names.split(",")) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
    if not has_tpu() or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return 1
    hosts = len((metadata(ENDPOINTS) or "").split(","))
    return hosts * _slices()


def _slices() -> int:
    if number := os.environ.get("MEGASCALE_NUM_SLICES"):
        return int(number)
    for line in (metadata(ENVIRONMENT) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_NUM_SLICES":
            return int(value.strip().strip("'"))
    return 1


def metadata(key: str) -> str | None:
    """An attribute of the instance from Google Cloud's metadata server; None if there is no server or no such key."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return str(reply.read().decode())
    except (urllib.error.URLError, OSError):
        return None
