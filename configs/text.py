"""Text stage: the language model alone learns words, for sizes that start from nothing (published sizes load a model).

Command: python -m unimm_jax.main --config=configs/text.py:laptop --workdir=runs/text
Hardware, time, figure at laptop: two CPU cores, 27 s, text cross-entropy about 1.2.
"""

from configs import common


def get_config(size=None):
    """Config of the text stage."""
    c = common.language_stage("text", size)
    c.train.steps = {"laptop": 150, "one_gpu": 1000}.get(c.size, 10_000)
    c.train.batch_size = {"laptop": 16, "one_gpu": 128}.get(c.size, 1024)
    c.data.tasks = dict(text=1.0)
    c.data.row_pictures = 0
    c.optimizer.rate = 4e-3 if c.size == "laptop" else 1e-3
    c.optimizer.muon_rate = 8e-3
    return c
