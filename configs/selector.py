"""Tokenizer stage, first phase: trains selector, merger and feature decoder without codes, as LaVIT's authors do.

Command: python -m unimm_jax.main --config=configs/selector.py:laptop --workdir=runs/selector
At laptop: 84 s on two cores of an AMD EPYC of family 25; argmax keep rate 0.14 and sampled keep rate 0.18 of the target
0.15, cosine 0.98 with sampled masks.
At published sizes: 50,000 steps of 2,048 images, planned for a TPU slice; not trained here.
ILLUME's image tokenizer keeps all patches: `illume-7b` and `laptop-illume` have no selector phase.
"""

from configs import common
from unimm_jax.errors import ConfigError

SIZES = {
    "7b": dict(steps=50_000, batch_size=2048),
    "one_gpu": dict(steps=4000, batch_size=512),
    "laptop": dict(steps=450, batch_size=64),
    "colab": dict(steps=800, batch_size=128),
}


def get_config(size=None):
    """Config of the selector phase.

    Raises:
      ConfigError: a size whose image tokenizer keeps all patches.
    """
    size = common.check_size(size)
    if common.flavor(size) == "illume":
        raise ConfigError(
            f"the image tokenizer of {size} keeps all patches and has no selector; train configs/tokenizer.py:{size} "
            "right after the encoder"
        )
    small = common.from_nothing(size)
    c = common.base("selector", size, "tokenization")
    c.model.image_tokenizer = common.of_size(size, common.IMAGE_TOKENIZER)
    c.train.update(common.of_size(size, SIZES))
    c.optimizer.learning_rate = 3e-3 if small else 2e-4
    c.optimizer.rules = common.TOKENIZER_RULES["lavit", "selector"]
    c.init_from = (dict(checkpoint="../encoder", rename=[("encoder/", "encoder/")]),)
    c.loss.phase = "selector"
    c.loss.reconstruction = "cosine"
    if small and size != "laptop-lavit":  # laptop-lavit has LaVIT's loss: a constant target of 1/3, lambda = 2
        # Scenes have content on 0.137 of their patches. docs/decisions.md explains why the target falls in two steps.
        c.loss.keep_rate_at = (0.0, 0.3, 0.5, 0.7)
        c.loss.keep_rate = (1.0, 0.35, 0.35, 0.15)
        c.loss.keep_rate_weight = 8.0
        c.loss.binarization_weight = 8.0
        c.loss.mask_gradient_clip = 0.01
    return c
