"""Matrix products with the shapes of the 20M model, XLA against PyTorch.

python -m benchmarks.products                  # all cores
taskset -c 0 python -m benchmarks.products     # one core

float32. Each run is 48 products [1024, K] × [K, F], each with its own operands.
"""

import functools

import jax
import numpy as np
import torch

from benchmarks import timing

ROWS, COUNT = 1024, 48


@jax.jit
def products(xs: list[jax.Array], ws: list[jax.Array]) -> list[jax.Array]:
    """Products of pairs."""
    return [x @ w for x, w in zip(xs, ws, strict=True)]


def ours(operands: tuple[list[jax.Array], list[jax.Array]]) -> None:
    """Runs XLA's products."""
    jax.block_until_ready(products(*operands))


def theirs(operands: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Runs PyTorch's products."""
    for x, w in operands:
        x @ w


def main() -> None:
    """Prints milliseconds, ratios and GFLOP/s (10⁹ operations per second) of both sides."""
    rng = np.random.default_rng(0)
    for k, f in ((384, 384), (384, 1024), (1024, 384)):
        xs = [rng.standard_normal((ROWS, k), dtype=np.float32) for _ in range(COUNT)]
        ws = [rng.standard_normal((k, f), dtype=np.float32) for _ in range(COUNT)]
        on_device = jax.device_put((xs, ws))
        tensors = [(torch.tensor(x), torch.tensor(w)) for x, w in zip(xs, ws, strict=True)]
        name = f"{ROWS} × {k} × {f}"
        found = timing.compare(
            name, functools.partial(ours, on_device), {"PyTorch": functools.partial(theirs, tensors)}
        )
        operations = 2 * ROWS * k * f * COUNT / 1e9
        print(f"{name}: GFLOP/s " + ", ".join(f"{side} {operations / s:.0f}" for side, s in found.items()), flush=True)


if __name__ == "__main__":
    timing.prepare()
    main()
