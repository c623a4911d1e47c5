"""Matrix products of the 20M model's shapes, XLA against PyTorch: what one core reaches and what the second adds.

python -m benchmarks.products
taskset -c 0 python -m benchmarks.products

float32; each run is 48 products [1024, K] × [K, F] one after another, each with operands of its own.
"""

import jax
import numpy as np
import torch

from benchmarks import timing

ROWS, COUNT = 1024, 48


def main() -> None:
    """Prints milliseconds, ratios and GFLOP/s (10⁹ operations a second) of both sides."""
    rng = np.random.default_rng(0)
    for k, f in ((384, 384), (384, 1024), (1024, 384)):
        draw = lambda *shape: [rng.standard_normal(shape, dtype=np.float32) for _ in range(COUNT)]
        xs, ws = draw(ROWS, k), draw(k, f)
        run = jax.jit(lambda xs, ws: [x @ w for x, w in zip(xs, ws, strict=True)])
        on_device = jax.device_put((xs, ws))
        tensors = [(torch.tensor(x), torch.tensor(w)) for x, w in zip(xs, ws, strict=True)]
        name = f"{ROWS} × {k} × {f}"
        found = timing.compare(
            name,
            lambda run=run, on_device=on_device: jax.block_until_ready(run(*on_device)),
            {"PyTorch": lambda tensors=tensors: [x @ w for x, w in tensors]},
        )
        operations = 2 * ROWS * k * f * COUNT / 1e9
        print(f"{name}: GFLOP/s " + ", ".join(f"{side} {operations / s:.0f}" for side, s in found.items()), flush=True)


if __name__ == "__main__":
    timing.prepare()
    main()
