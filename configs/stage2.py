"""Stage 2, unified image-text alignment: captions, text to image, and text (ILLUME §4, Table 5; LaVIT §3.2).

Published sizes train the language model and the adapter, and with LaVIT's connector also its merger, at learning rate
5e-5 for 15,000 steps with batch size 1,024.

Command: python -m unimm_jax.main --config=configs/stage2.py:laptop --workdir=runs/stage2
At laptop: 107 s on two cores of an AMD EPYC of family 25; held-out code cross-entropy 2.26.
At published sizes: planned for a TPU pod; not trained here.
"""

from configs import common

SIZES = {
    "7b": dict(steps=15_000, batch_size=1024),
    "one_gpu": dict(steps=8000, batch_size=640),
    "laptop": dict(steps=700, batch_size=80),
}


def get_config(size=None):
    """Config of stage 2."""
    c = common.language_stage("stage2", size)
    c.train.update(common.of_size(c.size, SIZES))
    c.data.tasks = dict(caption=0.35, text_to_image=0.55, text=0.1, **common.OTHER_TASKS)
    c.optimizer.learning_rate = common.of_size(c.size, {"7b": 5e-5, "one_gpu": 1e-3, "laptop": 4e-3})
    c.optimizer.muon_learning_rate = 8e-3
    if common.from_nothing(c.size):
        c.optimizer.schedule = "constant"  # stage 3 continues at the same rate and decays
    c.init_from = (common.start_from("stage1"),)
    return c
