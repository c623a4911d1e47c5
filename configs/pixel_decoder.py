"""Pixel decoder stage: predicts pixels from reconstructed features in one forward pass. It is for small images.

Command: python -m unimm_jax.main --config=configs/pixel_decoder.py:laptop --workdir=runs/pixel_decoder
At laptop: 41 to 47 s on two cores of an AMD EPYC of family 25; about 95% of the objects are detected correctly in the
decoded images.
"""

from configs import common

SIZES = {
    "7b": dict(steps=50_000, batch_size=1024),
    "one_gpu": dict(steps=6000, batch_size=256),
    "laptop": dict(steps=900, batch_size=32),
    "colab": dict(steps=1200, batch_size=64),
}
SHAPES = {
    "7b": dict(width=1408, depth=4, heads=44, mlp_width=5632),
    "one_gpu": dict(width=256, depth=4, heads=8, mlp_width=1024),
    "laptop": dict(width=128, depth=1, heads=4, mlp_width=512),
}


def get_config(size=None):
    """Config of the pixel decoder stage."""
    size = common.check_size(size)
    c = common.base("pixel_decoder", size, "pixel_decoding")
    c.model.image_tokenizer = common.of_size(size, common.IMAGE_TOKENIZER)
    c.model.pixel_decoder = common.of_size(size, SHAPES)
    c.train.update(common.of_size(size, SIZES))
    c.train.image_every = 500
    c.optimizer.learning_rate = 3e-3 if common.scale(size) == "laptop" else 1e-3
    c.optimizer.rules = [("image_tokenizer/.*", common.FROZEN), ("pixel_decoder/.*", 1.0)]
    c.init_from = (dict(checkpoint="../tokenizer", rename=[("", "image_tokenizer/")]),)
    return c
