"""Detokenizer stage: a denoising U-Net from reconstructed features to pixels, sampled by DDIM with guidance.

The published size is Stable Diffusion 1.5's U-Net in the latents of its autoencoder, 20,000 steps (LaVIT), 512 pixels a
side; it starts from published weights, imported by

  python -m unimm_jax.import_weights --source=DIR/unet --output=runs/sd15_unet   (and DIR/vae to runs/sd15_vae).

Small sizes work on pixels, unshuffled 4 × 4, from nothing.

Command: python -m unimm_jax.main --config=configs/detokenizer.py:laptop --workdir=runs/detokenizer
Hardware, time, figure at laptop: two CPU cores, 92 s, loss about 0.03 and no objects yet (docs/results.md): the direct
decoder draws there. Published sizes: 20,000 steps on a TPU slice, not trained here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size=None):
    """Config of the detokenizer stage."""
    size = common.check_size(size)
    c = common.base("detokenizer", size)
    c.objective = "denoising"
    small = size in ("laptop", "one_gpu")
    c.model.tokenizer = common.tokenizer(size)
    c.data.records = "../records"
    c.train.steps = {"laptop": 200, "one_gpu": 10_000}.get(size, 20_000)
    c.train.batch_size = {"laptop": 16, "one_gpu": 256}.get(size, 2048)
    c.optimizer.name = "adamw"
    c.optimizer.rate = 1e-3 if size == "laptop" else 3e-4 if small else 1e-4
    c.optimizer.rules = [("tokenizer/.*", common.FROZEN), ("unet/.*", 1.0)]
    c.init_from = (dict(checkpoint="../tokenizer", rename=[("", "tokenizer/")]),)
    c.loss = ConfigDict(
        dict(
            unshuffle=4 if small else 1,  # pixels a side that become channels, in pixel space
            prediction="sample" if small else "epsilon",
            context_dropout=0.1,
            guidance=1.5,
            sampling_steps=20,
            remat="none" if small else "full",  # of the U-Net's blocks, a name of models.transformer.REMAT
        )
    )
    width = c.model.encoder.get("width", 1408)
    channels = 3 * c.loss.unshuffle**2
    if small:
        base = 64 if size == "laptop" else 128
        c.model.unet = dict(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(base, base + base // 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1 if size == "laptop" else 2,
            attention_head_dim=4,
            cross_attention_dim=width,
            norm_num_groups=8,
        )
    else:
        c.data.pixel_size = 512  # what is drawn; the tokenizer sees data.image_size
        c.model.unet, c.model.vae = ConfigDict(), ConfigDict()  # Stable Diffusion 1.5's, the defaults
        c.model.conditioner = ConfigDict(dict(empty=77))
        c.optimizer.rules = [("(tokenizer|vae)/.*", common.FROZEN), ("unet/.*", 1.0), ("conditioner/.*", 1.0)]
        c.init_from += tuple(
            dict(checkpoint=f"../sd15_{part}", rename=[(f"{part}/", f"{part}/")]) for part in ("unet", "vae")
        )
    return c
