"""Tokenizer stage, second phase: the selector is frozen, the codes train (LaVIT Eq. 4; k-means start, EMA codebook).

Command: python -m unimm_jax.main --config=configs/tokenizer.py:laptop --workdir=runs/tokenizer
Hardware, time, figure at laptop: two CPU cores, 41 s, cosine above 0.99, all 128 codes used. Published sizes:
50,000 steps of 2,048 pictures on a TPU slice, not trained here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size=None):
    """Config of the code phase."""
    size = common.check_size(size)
    c = common.base("tokenizer", size)
    c.objective = "tokenization"
    small = size in ("laptop", "one_gpu")
    c.model.tokenizer = common.tokenizer(size)
    c.train.steps = {"laptop": 300, "one_gpu": 6000}.get(size, 50_000)
    c.train.batch_size = {"laptop": 64, "one_gpu": 512}.get(size, 2048)
    c.optimizer.rate = 3e-3 if small else 2e-4
    c.optimizer.rules = common.TOKENIZER_RULES["tokenizer"]
    c.init_from = (dict(checkpoint="../selector", rename=[("(?!quantizer/(codebook|count))", "")]),)
    c.loss = ConfigDict(
        dict(
            phase="codes",
            reconstruction="cosine+smooth_l1" if common.flavour(size) == "illume" else "cosine",
            commitment=0.25 if small else 1.0,
            ema_decay=0.97 if small else 0.99,
            restart_below=0.05 if small else 0.0,  # EMA count under which a code is restarted; 0 is never (BEiT-2)
            kmeans_samples=8,  # rows a code for the k-means start
        )
    )
    return c
