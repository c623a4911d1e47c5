"""Benchmarks against other libraries. Run one with python -m benchmarks.NAME."""

import os

from unimm_jax import process

# Before JAX is imported: an installed libtpu would look for a TPU. `timing.prepare` does the rest.
if not process.has_accelerator():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
