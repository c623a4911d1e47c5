"""Trains a pixel tokenizer by the ordinary training command, whose flags it takes.

python -m benchmarks.claims.train_pixel_tokenizer --config=benchmarks/claims/pixel_tokenizer_config.py:P --workdir=W

The objective is registered here, at run time: it belongs to this experiment, not to the package.
"""

from unimm_jax import process

OBJECTIVE = "pixel_tokenization"


def register() -> None:
    """Makes the objective known to this process."""
    from unimm_jax import objectives

    objectives.REGISTRY[OBJECTIVE] = "benchmarks.claims.pixel_tokenization:PixelTokenization"


if __name__ == "__main__":
    process.prepare()
    register()
    from unimm_jax import main

    main.cli()
