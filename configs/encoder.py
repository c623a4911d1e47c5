"""Encoder stage: a vision transformer, trained contrastively against captions and to predict pixels from its features.

The small sizes need it. The published recipes use EVA-CLIP (LaVIT) or UNIT (ILLUME) instead of training an encoder.

Command: python -m unimm_jax.main --config=configs/encoder.py:laptop --workdir=runs/encoder
At laptop: 99 to 107 s on two cores of an AMD EPYC of family 25; held-out accuracy of retrieval among 64 images 0.91.
At published sizes: planned for a TPU slice; not trained here.
"""

from configs import common

SIZES = {
    "7b": dict(steps=50_000, batch_size=4096),
    "one_gpu": dict(steps=6000, batch_size=512),
    "laptop": dict(steps=700, batch_size=64),
    "colab": dict(steps=1200, batch_size=128),
}
TEXT_TOWER = {
    "7b": dict(width=512, depth=8, heads=8, max_length=77, joint_width=512),
    "laptop": dict(width=64, depth=1, heads=2, max_length=20, joint_width=128),
}


def get_config(size=None):
    """Config of the encoder stage."""
    size = common.check_size(size)
    small = common.from_nothing(size)
    c = common.base("encoder", size, "contrastive")
    c.train.update(common.of_size(size, SIZES))
    c.optimizer.learning_rate = 4e-3 if small else 5e-4
    c.model.text_tower = common.of_size(size, TEXT_TOWER)
    c.loss.pixel_weight = 10.0 if small else 0.0
    return c
