"""Stage 2, unified image-text alignment: both orders plus text (ILLUME §4, Table 5; LaVIT §3.2).

Published sizes train the language model and the adapter (5e-5; in the lavit flavour the LM's merger too), batch 1024,
15,000 steps.

Command: python -m unimm_jax.main --config=configs/stage2.py:laptop --workdir=runs/stage2
Hardware, time, figure at laptop: two CPU cores, 98 s, code cross-entropy about 2.1. Published sizes: a TPU pod, not
trained here.
"""

from configs import common


def get_config(size=None):
    """Config of stage 2."""
    c = common.language_stage("stage2", size)
    c.train.steps = {"laptop": 700, "one_gpu": 8000}.get(c.size, 15_000)
    c.train.batch_size = {"laptop": 16, "one_gpu": 128}.get(c.size, 1024)
    c.data.tasks = dict(caption=0.35, text_to_image=0.55, text=0.1)
    c.optimizer.rate = {"laptop": 4e-3, "one_gpu": 1e-3}.get(c.size, 5e-5)
    c.optimizer.muon_rate = 8e-3
    if c.size in ("laptop", "one_gpu"):
        c.optimizer.schedule = "constant"  # stage 3 goes on at the same rate and decays
    c.init_from = (common.start_from("stage1"),)
    return c
