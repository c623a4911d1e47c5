"""Stage 1, visual embedding initialisation: captions and image reconstruction (ILLUME §4, Table 5).

Published sizes train the adapter (1e-3) and the visual rows of embedding and head (2e-4), batch 256, 5,000 steps.

Command: python -m unimm_jax.main --config=configs/stage1.py:laptop --workdir=runs/stage1
Hardware, time, figure at laptop: two CPU cores, 42 s, caption cross-entropy about 0.06. Published sizes: a TPU pod, not
trained here.
"""

from configs import common


def get_config(size=None):
    """Config of stage 1."""
    c = common.language_stage("stage1", size)
    c.train.steps = {"laptop": 150, "one_gpu": 2000}.get(c.size, 5000)
    c.train.batch_size = {"laptop": 16, "one_gpu": 128}.get(c.size, 256)
    c.data.row_pictures = 5 if c.size in ("laptop", "one_gpu") else 8
    c.data.tasks = dict(caption=0.5, reconstruct=0.5)
    c.optimizer.rate = {"laptop": 4e-3, "one_gpu": 1e-3}.get(c.size, 2e-4)
    c.optimizer.muon_rate = 8e-3
    c.init_from = (common.start_from_tokenizer(c.size), common.start_from("text"))
    return c
