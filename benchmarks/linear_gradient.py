"""Forward and backward pass of a feed-forward block: a plain einsum against `transformer.linear`, alternated.

python -m benchmarks.linear_gradient
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.models.transformer import linear

ROUNDS, STEPS = 15, 20


def block(product: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., Any]:
    """The jitted gradient of the summed squares of an MLP's outputs (relu²)."""

    def loss(w: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.square(product(jax.nn.relu(product(x, w[0])) ** 2, w[1])).sum()

    return jax.jit(jax.grad(loss))


def einsum(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product without a gradient of its own."""
    return jnp.einsum("...d,df->...f", x, w)


def main() -> None:
    """Prints both medians and their ratio."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (16, 64, 128))
    w = (jax.random.normal(key, (128, 512)) * 0.05, jax.random.normal(key, (512, 128)) * 0.05)
    runs = {"einsum": block(einsum), "linear": block(linear)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run(w, x))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                out = run(w, x)
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - began) / STEPS * 1e3)
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, value in medians.items():
        print(f"{name:8s} {value:6.2f} ms")
    print(f"einsum / linear = {medians['einsum'] / medians['linear']:.2f}")


if __name__ == "__main__":
    main()
