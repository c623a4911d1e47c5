"""Times the parts of a stage-3 step of size laptop, on the records and weights of a finished quickstart.

python -m benchmarks.step_parts [RUN]      # RUN is runs/quickstart by default
"""

import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax import objectives, optim, process, resolve
from unimm_jax.checkpoint import find, read_params


def parts_of(run: pathlib.Path) -> dict[str, Callable[[], Any]]:
    """Name → a function that computes that part of the step."""
    given = resolve.load("stage3:laptop")
    given.data.records = str(run / "records")
    config = resolve.parse(given)
    objective_class = objectives.get(config.objective)
    data = objective_class.open_input(config)
    objective = objective_class(config, data)
    params = read_params(find(run / "stage3"))
    trained, frozen, multipliers = optim.split(params, list(config.optimizer.rules))
    tx = optim.make(config.optimizer, config.train.steps, trained, multipliers)
    batch = jax.tree.map(jnp.asarray, next(data.iterate()))
    masks = batch["keep"].reshape(-1, batch["keep"].shape[-1])

    def module(trained: Any) -> Any:
        return objective.module(optim.join(trained, frozen))

    def loss(trained: Any, batch: Any) -> jax.Array:
        return objective.loss(optim.join(trained, frozen), batch, jax.random.key(0), jnp.asarray(0))[0]

    def feature_sum(trained: Any, pixels: jax.Array, masks: jax.Array) -> jax.Array:
        return module(trained).features(pixels, masks).sum()

    pixels = module(trained).encoder.normalize(batch["images"].reshape(-1, *batch["images"].shape[2:]))
    gradient, features = jax.jit(jax.grad(loss)), jax.jit(jax.grad(feature_sum))
    # images are arguments: of constants the compiler would compute a frozen encoder's features once
    encoder = jax.jit(lambda trained, pixels: module(trained).encoder(pixels))
    update, state = jax.jit(tx.update), tx.init(trained)
    no_images = batch | {"images": batch["images"][:, :0], "keep": batch["keep"][:, :0]}
    grads = gradient(trained, batch)
    return {
        "gradient of the loss": lambda: gradient(trained, batch),
        "- language model alone": lambda: gradient(trained, no_images),
        "- features, forward and backward": lambda: features(trained, pixels, masks),
        "  - frozen encoder of these": lambda: encoder(trained, pixels),
        "optimizer": lambda: update(grads, state, trained),
    }


def main(run: str, rounds: int = 15) -> None:
    """Prints the median milliseconds of each part."""
    for name, part in parts_of(pathlib.Path(run)).items():
        jax.block_until_ready(part())
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            jax.block_until_ready(part())
            times.append((time.perf_counter() - began) * 1e3)
        print(f"{name:34s} {statistics.median(times):7.1f} ms")


if __name__ == "__main__":
    process.prepare()
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
