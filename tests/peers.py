"""Tiny models of `transformers` and `diffusers` and numbers of the LaVIT reference, to compare with.

`LAVIT_FIXTURE` names another file of the reference's layout.
"""

import json
import os

import numpy as np
from helpers import ROOT

DATA = ROOT / "tests" / "data"
LAVIT = np.load(os.environ.get("LAVIT_FIXTURE", DATA / "lavit_tokenizer_tiny.npz"))
LAVIT_META = json.loads(bytes(LAVIT["meta_json"]).decode())

SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SDXL = dict(
    sample_size=8,
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4, 8),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 2),
    cross_attention_dim=40,
    norm_num_groups=8,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=20 + 6 * 8,
)


def lavit_weights(component):
    """Tensors of a component of the reference by name."""
    start = f"weights/{component}/"
    return {k.removeprefix(start): LAVIT[k] for k in LAVIT.files if k.startswith(start)}


def randomize(module, seed=0):
    """Weights that no initializer leaves degenerate."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


def language(kind, heads=4, groups=2, tied=False, biases=False, scaling=None, words=101, layers=2, theta=5000.0):
    """A decoder of `transformers` with random weights."""
    import transformers

    common = dict(
        vocab_size=words,
        hidden_size=8 * heads,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // groups,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    rope = dict(rope_theta=theta, rope_type="default")
    rope |= {} if scaling is None else dict(rope_type="llama3", **scaling)
    if kind == "llama":
        common |= dict(attention_bias=biases, mlp_bias=biases)
    if kind == "qwen3":
        common |= dict(head_dim=16)
    config = transformers.AutoConfig.for_model(kind, **common, rope_parameters=rope)
    return randomize(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def vision(layout, **changes):
    """A vision model of `transformers` with random weights."""
    import transformers

    settings = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    settings |= changes
    if layout == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**settings))
    elif layout == "siglip":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings))
    else:
        model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**settings))
    return randomize(model)
