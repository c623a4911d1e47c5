"""Direct pixel decoder: one pass from reconstructed features to pixels; for small pictures, beside the U-Net.

Command: python -m unimm_jax.main --config=configs/pixel_decoder.py:laptop --workdir=runs/pixel_decoder
Hardware, time, figure at laptop: two CPU cores, 33 s, about 95% of the objects found again in decoded pictures.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size=None):
    """Config of the direct decoder."""
    size = common.check_size(size)
    c = common.base("pixel_decoder", size)
    c.objective = "pixel_decoding"
    c.model.tokenizer = common.tokenizer(size)
    c.data.records = "../records"
    c.train.steps = {"laptop": 900, "one_gpu": 6000}.get(size, 50_000)
    c.train.batch_size = {"laptop": 32, "one_gpu": 256}.get(size, 1024)
    c.train.picture_every = 500
    c.optimizer.rate = 3e-3 if size == "laptop" else 1e-3
    c.optimizer.rules = [("tokenizer/.*", common.FROZEN), ("direct/.*", 1.0)]
    c.init_from = (dict(checkpoint="../tokenizer", rename=[("", "tokenizer/")]),)
    width = {"laptop": 128, "one_gpu": 256}.get(size, 1408)
    c.model.pixel_decoder = dict(
        width=width, depth=1 if size == "laptop" else 4, heads=width // 32, mlp_width=4 * width
    )
    c.loss = ConfigDict()
    return c
