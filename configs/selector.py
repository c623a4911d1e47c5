"""Tokenizer stage, first phase: selector, merger and feature decoder, no codes yet (LaVIT authors' order).

Command: python -m unimm_jax.main --config=configs/selector.py:laptop --workdir=runs/selector
Hardware, time, figure at laptop: two CPU cores, 63 s, argmax rate within 10% of 0.15, sampled rate within 0.1 of it,
cosine above 0.99. Published sizes: 50,000 steps of 2,048 pictures on a TPU slice, not trained here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size=None):
    """Config of the selector phase."""
    size = common.check_size(size)
    c = common.base("selector", size)
    c.objective = "tokenization"
    small = size in ("laptop", "one_gpu")
    c.model.tokenizer = common.tokenizer(size)
    c.train.steps = {"laptop": 450, "one_gpu": 4000}.get(size, 50_000)
    c.train.batch_size = {"laptop": 64, "one_gpu": 512}.get(size, 2048)
    c.optimizer.rate = 3e-3 if small else 2e-4
    c.optimizer.rules = common.TOKENIZER_RULES["selector"]
    c.init_from = (dict(checkpoint="../encoder", rename=[("encoder/", "encoder/")]),)
    c.loss = ConfigDict(
        dict(
            phase="selector",
            reconstruction="cosine+smooth_l1" if common.flavour(size) == "illume" else "cosine",
            # rho, the target share of kept tokens: linear between these shares of the run. Scenes have something on
            # 0.137 of their patches; see docs/decisions.md for why the target falls in two steps.
            rate_at=(0.0, 0.3, 0.5, 0.7) if small else (0.0, 1.0),
            rate=(1.0, 0.35, 0.35, 0.15) if small else (1 / 3, 1 / 3),
            rate_weight=8.0 if small else 2.0,  # lambda
            rate_per_image=False,
            # Weight of p (1 - p), growing with the 4th power of the run: rates by sampling and by argmax agree.
            sureness=8.0 if small else 0.0,
            mask_gradient_clip=0.01 if small else 0.0,
        )
    )
    return c
