"""Encoder stage: a vision transformer trained contrastively against captions, plus pixels from its features.

For sizes that start from nothing. The published sizes load EVA-CLIP (LaVIT) or UNIT (ILLUME) instead of training one.

Command: python -m unimm_jax.main --config=configs/encoder.py:laptop --workdir=runs/encoder
Hardware, time, figure at laptop: two CPU cores, 82 s, retrieval among 64 pictures about 0.86. The published
shape is for a TPU slice; it has not been trained here.
"""

from configs import common


def get_config(size=None):
    """Config of the encoder stage."""
    size = common.check_size(size)
    c = common.base("encoder", size)
    c.objective = "contrastive"
    small = size in ("laptop", "one_gpu")
    c.train.steps = {"laptop": 700, "one_gpu": 6000}.get(size, 50_000)
    c.train.batch_size = {"laptop": 64, "one_gpu": 512}.get(size, 4096)
    c.optimizer.rate = 4e-3 if small else 5e-4
    c.model.text_tower = dict(
        width=64 if size == "laptop" else 512,
        depth=1 if size == "laptop" else 8,
        heads=2 if size == "laptop" else 8,
        max_length=20 if size == "laptop" else 77,
        joint_width=128 if size == "laptop" else 512,
    )
    c.loss = dict(pixel_weight=10.0 if small else 0.0)
    return c
