"""Alternated timing of ours and of peers in one process. Benchmarks print with `compare`."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import torch

from unimm_jax import process

CEILING_SIDE, CEILING_PRODUCTS = 8192, 16


def prepare() -> bool:
    """Configures the process; JAX must not take all of a GPU's memory from the peer.

    Returns:
      whether this run is on a GPU. Benchmarks then use bfloat16 and larger models.

    Raises:
      SystemExit: JAX has a GPU and PyTorch has none.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    process.prepare()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise SystemExit(
            "JAX has a GPU and PyTorch has none; install a PyTorch built for CUDA or set JAX_PLATFORMS=cpu"
        )
    return gpu


def peer_device() -> str:
    """The device of PyTorch's side: the GPU if JAX uses it."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """PyTorch's optimizer, fused on a GPU."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True if peer_device() == "cuda" else None)


def autocast(dtype: str) -> contextlib.AbstractContextManager:
    """A context in which PyTorch computes in `dtype`, with float32 parameters."""
    return torch.autocast(peer_device(), torch.bfloat16, enabled=dtype == "bfloat16")


def waited(run: Callable[[], object]) -> Callable[[], None]:
    """A function that does PyTorch's work and waits for its end."""

    def once() -> None:
        run()
        if peer_device() == "cuda":
            torch.cuda.synchronize()

    return once


def ceiling(side: int = CEILING_SIDE, products: int = CEILING_PRODUCTS) -> float:
    """Operations per second of a chain of bfloat16 matrix products: the base of MFU. The median of five runs.

    Args:
      side: rows and columns of the matrices. products: length of the chain.
    """
    x, w = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) * side**-0.5 for i in range(2))

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: x @ w, x)

    run(x, w).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        run(x, w).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 * products / statistics.median(seconds)


def compare(
    title: str,
    ours: Callable[[], None],
    peers: dict[str, Callable[[], None]],
    rounds: int = 9,
    flops: float = 0.0,
    peak: float = 0.0,
) -> dict[str, float]:
    """Runs ours and each peer in turn, after one warm-up each. Prints medians and ratios (above 1: ours is faster).

    Args:
      ours, peers: each does the work once and waits for its end.
      flops: operations of the work by the model's formula. peak: operations per second, from `ceiling`. With both, each
        line has the utilization (MFU).

    Returns:
      median seconds of "ours" and of each peer.
    """
    cases = {"ours": ours} | peers
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name, run in cases.items():
        began = time.perf_counter()
        run()
        print(f"{title}: {name} warm-up {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(rounds):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = (max(values) - min(values)) / medians[name]
        ratio = "" if name == "ours" else f"   ours is {medians[name] / medians['ours']:.2f} times as fast"
        share = f"   MFU {flops / medians[name] / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if flops and peak else ""
        print(f"{title}: {name:24} {medians[name] * 1e3:9.1f} ms (spread {spread:.0%}){ratio}{share}", flush=True)
    return medians
