"""Text stage: trains the language model alone on text.

This stage is for the small sizes. Published sizes use a published language model instead.

Command: python -m unimm_jax.main --config=configs/text.py:laptop --workdir=runs/text
At laptop: 25 to 36 s on two cores of an AMD EPYC of family 25; held-out cross-entropy 1.22.
"""

from configs import common

SIZES = {
    "7b": dict(steps=10_000, batch_size=1024),
    "one_gpu": dict(steps=1000, batch_size=1024),
    "laptop": dict(steps=150, batch_size=144),
    "colab": dict(steps=300, batch_size=288),
}


def get_config(size=None):
    """Config of the text stage."""
    c = common.language_stage("text", size)
    c.train.update(common.of_size(c.size, SIZES))
    c.data.tasks = dict(text=1.0)
    c.data.images_per_row = 0
    c.optimizer.learning_rate = common.of_size(c.size, {"7b": 1e-3, "laptop": 4e-3, "colab": 2e-3})
    return c
