"""U-Net decoder stage: a denoising U-Net that generates images from reconstructed features by DDIM with guidance.

Published sizes train Stable Diffusion 1.5's U-Net in the latent space of its autoencoder for 20,000 steps (LaVIT), at
512 pixels per side. They start from published weights, imported by

  python -m unimm_jax.import_weights --source=DIR/unet --output=runs/sd15_unet   (and DIR/vae to runs/sd15_vae).

Small sizes train on pixels, unshuffled 4 × 4, from random values. By default, the quickstart leaves this stage out,
because at laptop it does not learn objects.

Command: python -m unimm_jax.main --config=configs/unet_decoder.py:laptop --workdir=runs/unet_decoder
At laptop: 92 s on two CPU cores (processor B of docs/results.md); loss about 0.03, and no objects yet. The pixel
decoder generates the images at this size.
At published sizes: 20,000 steps, planned for a TPU slice; not trained here.
"""

from ml_collections import ConfigDict

from configs import common

SIZES = {
    "7b": dict(steps=20_000, batch_size=2048),
    "one_gpu": dict(steps=10_000, batch_size=256),
    "laptop": dict(steps=200, batch_size=16),
}


def get_config(size=None):
    """Config of the U-Net decoder stage."""
    size = common.check_size(size)
    small = common.from_nothing(size)
    c = common.base("unet_decoder", size, "denoising")
    c.model.image_tokenizer = common.of_size(size, common.IMAGE_TOKENIZER)
    c.train.update(common.of_size(size, SIZES))
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = common.of_size(size, {"7b": 1e-4, "one_gpu": 3e-4, "laptop": 1e-3})
    c.init_from = (dict(checkpoint="../tokenizer", rename=[("", "image_tokenizer/")]),)
    if small:
        c.loss.unshuffle = 4
        c.loss.prediction = "sample"
        c.optimizer.rules = [("image_tokenizer/.*", common.FROZEN), ("unet/.*", 1.0)]
        channels, base = 3 * 4**2, 64 if common.scale(size) == "laptop" else 128
        c.model.unet = dict(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(base, base + base // 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1 if common.scale(size) == "laptop" else 2,
            attention_head_dim=4,
            cross_attention_dim=c.model.encoder.width,
            norm_num_groups=8,
        )
    else:
        c.data.pixel_size = 512
        c.loss.remat = "full"
        c.model.unet, c.model.vae = ConfigDict(), ConfigDict()  # Stable Diffusion 1.5's, the defaults
        c.model.conditioner = ConfigDict(dict(empty=77))
        c.optimizer.rules = [("(image_tokenizer|vae)/.*", common.FROZEN), ("unet/.*", 1.0), ("conditioner/.*", 1.0)]
        c.init_from += tuple(
            dict(checkpoint=f"../sd15_{part}", rename=[(f"{part}/", f"{part}/")]) for part in ("unet", "vae")
        )
    return c
