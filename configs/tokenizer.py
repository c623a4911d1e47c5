"""Tokenizer stage, second phase: trains the codes with a frozen selector (LaVIT Eq. 4).

The codebook is initialized by k-means and updated by an exponential moving average (EMA). The sizes of ILLUME's flavor
have a bidirectional tokenizer, which has no selector phase and starts from the encoder.

Command: python -m unimm_jax.main --config=configs/tokenizer.py:laptop --workdir=runs/tokenizer
At laptop: 61 to 65 s on two cores of an AMD EPYC of family 25; cosine above 0.99, all 128 codes used.
At published sizes: 50,000 steps of 2,048 images, planned for a TPU slice; not trained here.
"""

from configs import common

SIZES = {
    "7b": dict(steps=50_000, batch_size=2048),
    "one_gpu": dict(steps=6000, batch_size=512),
    "laptop": dict(steps=300, batch_size=64),
    "colab": dict(steps=500, batch_size=128),
}


def get_config(size=None):
    """Config of the code phase."""
    size = common.check_size(size)
    small = common.from_nothing(size)
    c = common.base("tokenizer", size, "tokenization")
    c.model.image_tokenizer = common.of_size(size, common.IMAGE_TOKENIZER)
    c.train.update(common.of_size(size, SIZES))
    c.optimizer.learning_rate = 3e-3 if small else 2e-4
    c.optimizer.rules = common.TOKENIZER_RULES[common.flavor(size), "tokenizer"]
    if common.flavor(size) == "illume":
        c.init_from = (dict(checkpoint="../encoder", rename=[("encoder/", "encoder/")]),)
    else:
        c.init_from = (dict(checkpoint="../selector", rename=[("(?!quantizer/(codebook|count))", "")]),)
    c.loss.phase = "codes"
    c.loss.reconstruction = "cosine+smooth_l1" if common.flavor(size) == "illume" else "cosine"
    if small:
        c.loss.commitment = 0.25
        c.loss.ema_decay = 0.97
        c.loss.restart_below = 0.05
        if size == "laptop-illume":  # most of its tokens are background; objects need codes of their own
            c.loss.restart_by = "distance"
    return c
