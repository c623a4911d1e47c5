"""Stage 3, supervised fine-tuning with questions; captions and text-to-image stay in the mixture (ILLUME §4, Table 5).

Published sizes train everything but the tokenizer: encoder 2e-6, the rest 2e-5, batch 1024, 8,000 steps.

Command: python -m unimm_jax.main --config=configs/stage3.py:laptop --workdir=runs/stage3
Hardware, time, figure at laptop: two CPU cores (AMD EPYC, Zen 5), 324 s, the scores of docs/results.md. Published
sizes: a TPU pod, not trained here.
"""

from configs import common


def get_config(size=None):
    """Config of stage 3."""
    c = common.language_stage("stage3", size)
    c.train.steps = {"laptop": 4200, "one_gpu": 8000}.get(c.size, 8000)
    c.train.batch_size = {"laptop": 16, "one_gpu": 128}.get(c.size, 1024)
    c.data.tasks = dict(question=0.6, text_to_image=0.35, caption=0.05)
    if c.size in ("laptop", "one_gpu"):
        # Answers that need a match (existence, colour, shape) come late and suddenly: questions first, then drawing.
        c.data.tasks = dict(question=0.75, text_to_image=0.2, caption=0.05)
        c.data.tasks_end = dict(question=0.5, text_to_image=0.45, caption=0.05)
        c.data.passes = {"laptop": 15}.get(c.size, 100)
    c.data.image_targets = 0.0  # fine-tuning masks picture positions, as Video-LaVIT's does
    # Codes are many and their places are chance: at full weight they drown the answers.
    c.data.code_targets = 0.5 if c.size in ("laptop", "one_gpu") else 1.0
    c.optimizer.rate = {"laptop": 4e-3, "one_gpu": 1e-3}.get(c.size, 2e-5)
    c.optimizer.muon_rate = 8e-3
    c.optimizer.warmup = 0.01 if c.size in ("laptop", "one_gpu") else 0.03
    c.init_from = (common.start_from("stage2"),)
    return c
