"""A selector that keeps every patch with the same probability: the mean share of patches in given records.

python -m benchmarks.claims.constant_selector --selector=W --records=runs/records --output=runs/random/selector

With the selection "sample", an image tokenizer with this selector keeps patches at random, whatever the image shows.
"""

import argparse
import math
import pathlib
import time
from typing import Any


def constant(params: dict[str, Any], share: float) -> dict[str, Any]:
    """The parameters of a selector stage, changed so that each patch is kept with probability `share`."""
    import jax.numpy as jnp

    from unimm_jax.models.tokenizer.selector import KEEP

    last = params["selector"]["out3"]
    bias = jnp.zeros_like(last["bias"]).at[KEEP].set(math.log(share / (1 - share)))
    changed = params["selector"] | {"out3": last | {"kernel": jnp.zeros_like(last["kernel"]), "bias": bias}}
    return params | {"selector": changed}


def write(selector: pathlib.Path, records: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the changed checkpoint."""
    from benchmarks.claims import stages
    from unimm_jax.checkpoint import Checkpoints, read_meta, read_params
    from unimm_jax.data.records import Records

    began = time.perf_counter()
    header = Records(records).header
    share = min(header["tokens"] / header["num_patches"], 0.99)  # an untrained selector may keep everything
    params = constant(read_params(selector), share)
    meta = read_meta(selector)
    checkpoints = Checkpoints(output)
    checkpoints.save(meta["step"], {"params": params}, meta)
    checkpoints.close()
    stages.write_done(output, time.perf_counter() - began)


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("selector", "records", "output"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    process.prepare()
    process.run(lambda: write(flags.selector, flags.records, flags.output))


if __name__ == "__main__":
    main()
