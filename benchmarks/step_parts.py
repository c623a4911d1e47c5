"""Where a laptop stage-3 step's time goes: medians of its parts, on the records of a finished run.

python -m benchmarks.step_parts runs/quickstart
"""

import statistics
import sys
import time

from unimm_jax import main as process

process.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from configs import stage3  # noqa: E402
from unimm_jax import objectives, optim  # noqa: E402
from unimm_jax.checkpoint import read_params  # noqa: E402
from unimm_jax.data import pipeline  # noqa: E402
from unimm_jax.models.vit import normalize_pixels  # noqa: E402


def main(run: str) -> None:
    """Prints milliseconds of each part."""
    config = stage3.get_config("laptop")
    config.data.records = f"{run}/records"
    data = pipeline.open_input(config, None)
    objective = objectives.build(config, data)
    rules = [(pattern, value) for pattern, value in config.optimizer.rules]
    trained, frozen, multipliers = optim.split(read_params(f"{run}/stage3"), rules)
    tx = optim.make(config.optimizer, config.train.steps, trained, multipliers)
    state, key = tx.init(trained), jax.random.key(0)
    batch = jax.tree.map(jnp.asarray, next(data.iterate(config.train.batch_size)))
    module = lambda t: objective.module(optim.join(t, frozen))
    pixels = normalize_pixels(batch["images"].reshape(-1, *batch["images"].shape[2:]))
    masks = batch["keep"].reshape(-1, batch["keep"].shape[-1])
    gradient = jax.jit(jax.grad(lambda t, b: objective.loss(optim.join(t, frozen), b, key, jnp.asarray(0))[0]))
    without = batch | {"images": batch["images"][:, :0], "keep": batch["keep"][:, :0]}
    # pictures are arguments: the compiler would compute a frozen encoder's features of constants once and for all
    encoder = jax.jit(lambda t, pixels: module(t).encoder(pixels))
    features = jax.jit(jax.grad(lambda t, pixels, masks: module(t).features(pixels, masks).sum()))
    update = jax.jit(lambda g, s, t: tx.update(g, s, t))
    found = gradient(trained, batch)
    parts = {
        "gradient of the loss": lambda: gradient(trained, batch),
        "· the language model alone": lambda: gradient(trained, without),
        "· features, forward and back": lambda: features(trained, pixels, masks),
        "· of that the frozen encoder": lambda: encoder(trained, pixels),
        "optimiser": lambda: update(found, state, trained),
    }
    for name, part in parts.items():
        jax.block_until_ready(part())
        times = []
        for _ in range(15):
            began = time.perf_counter()
            jax.block_until_ready(part())
            times.append((time.perf_counter() - began) * 1e3)
        print(f"{name:32s} {statistics.median(times):7.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
