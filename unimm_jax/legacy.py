"""Names and defaults of older versions. Everything written by them loads through these tables.

Format 1 is what was written before saved configs carried a `format`. Its configs lack settings that were left at their
defaults; `DEFAULTS_1` freezes these defaults, so that changing a default later does not change an old checkpoint. A
setting that a later version adds gets a line in `ADDED_1` if its default does not mean what older versions did.
"""

import json
import re
from typing import Any, NamedTuple

import numpy as np

from unimm_jax.data.outlines import ALTERNATIVE, CAPTION, PROMPT, QUESTION

FORMAT = 2  # of what this version writes

# Format 1: dotted old key → dotted new key, in saved configs
CONFIG_KEYS_1 = {
    "text": "text_tokenizer",
    "text.size": "text_tokenizer.vocab_size",
    "train.picture_every": "train.image_every",
    "optimizer.rate": "optimizer.learning_rate",
    "optimizer.muon_rate": "optimizer.muon_learning_rate",
    "optimizer.clip": "optimizer.clip_norm",
    "loss.rate": "loss.keep_rate",
    "loss.rate_at": "loss.keep_rate_at",
    "loss.rate_weight": "loss.keep_rate_weight",
    "loss.rate_per_image": "loss.keep_rate_per_image",
    "loss.sureness": "loss.binarization_weight",
    "data.row_length": "data.seq_len",
    "data.row_pictures": "data.images_per_row",
    "data.turns": "data.max_questions",
    "data.passes": "data.tasks_epochs",
    "model.tokenizer": "model.image_tokenizer",
    "model.unified.way_in": "model.unified.connector",
    "model.unified.budget": "model.unified.max_image_tokens",
    "companions.tokenizer": "companions.image_tokenizer",
    "companions.detokenizer": "companions.pixel_decoder",
    "companions.unet": "companions.unet_decoder",
    "companions.unet_high": "companions.unet_decoder_high",
}
# Format 1: settings that came later, at the values that mean what it did
ADDED_1 = {"train.micro_batches": 1, "train.profile": 0, "train.profile_start": 10}
ADDED_IMAGES_1 = {"data.held_out": 0.0}  # stages that read images from sources trained on all of them
ADDED_ROWS_1 = {  # packed rows
    "data.max_slices": 0,
    "data.slice_grids": "illume",
    "data.global_view_share": 0.0,
    "data.image_prompts": "features",
}
# Format 1: a setting that these objectives carried without reading it
UNUSED_1 = {name: "data.sources" for name in ("language_modeling", "denoising", "pixel_decoding")}
# Format 1: dotted new key → old value → new value
CONFIG_VALUES_1: dict[str, dict[Any, Any]] = {
    "model.unified.connector": {"features": "mlp"},
    "stage": {"detokenizer": "unet_decoder"},
}
# Format 1: first component of a parameter path, in the decoder stages
PARAMS_1 = {"tokenizer": "image_tokenizer", "direct": "pixel_decoder"}
DECODER_OBJECTIVES = ("denoising", "pixel_decoding")
# Format 1: keys of the header of records, of a record, and of a checkpoint's metadata
HEADER_KEYS_1 = {"patches": "num_patches"}
RECORD_KEYS_1 = {"picture": "image_data"}
META_KEYS_1 = {"tokenizer": "text_tokenizer"}
# Format 1: value of a model section's setting that a config left out
DEFAULTS_1: dict[str, dict[str, Any]] = {
    "encoder": {
        "image_size": 224,
        "patch_size": 14,
        "width": 1408,
        "depth": 40,
        "heads": 16,
        "mlp_width": 6144,
        "biases": "qv",
        "activation": "gelu",
        "eps": 1e-06,
        "output_norm": "none",
        "class_token": True,
        "patch_bias": True,
        "input_norm": False,
        "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
        "pixel_std": (0.26862954, 0.26130258, 0.27577711),
        "scan": True,
        "remat": "none",
    },
    "image_tokenizer": {
        "architecture": "dynamic",
        "quantizer": "ema",
        "heads": 16,
        "mlp_width": 6144,
        "merger_depth": 12,
        "decoder_depth": 12,
        "codes": 16384,
        "code_width": 32,
        "selection": "argmax",
        "top_k": 0,
        "positions": "order",
        "eps": 1e-06,
        "sink": 0.0,
        "decoder_sink": 0.0,
        "scan": True,
        "remat": "none",
    },
    "text_tower": {"width": 128, "depth": 2, "heads": 4, "max_length": 32, "joint_width": 128},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "addition_embed_type": "",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "conditioner": {"context": 768, "pooled": 0, "heads": 16, "empty": 0},
    "pixel_decoder": {"width": 128, "depth": 2, "heads": 4, "mlp_width": 512},
    "language": {
        "width": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "head_width": 128,
        "mlp_width": 11008,
        "eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": (),
        "biases": "",
        "mlp_bias": False,
        "qk_norm": False,
        "tied": False,
        "scan": True,
        "remat": "none",
    },
    "unified": {"connector": "merger", "max_image_tokens": 256, "patch_merge": 1},
}


def _renamed(flat: dict[str, Any], table: dict[str, str]) -> dict[str, Any]:
    return {table.get(key, key): value for key, value in flat.items()}


def config(found: dict[str, Any]) -> dict[str, Any]:
    """A saved config of format 1 under today's names, with the defaults of its time."""
    flat: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        else:
            flat[name] = value

    walk({key: value for key, value in found.items() if key != "model"}, "")
    flat |= {name: value for name, value in ADDED_1.items() if name.split(".")[0] in found}
    if found.get("objective") not in UNUSED_1 and "data" in found:
        flat |= ADDED_IMAGES_1
    if found.get("objective") == "language_modeling":
        flat |= ADDED_ROWS_1
    flat.pop(UNUSED_1.get(found.get("objective", ""), ""), None)
    for section, settings in found.get("model", {}).items():
        section = CONFIG_KEYS_1.get(f"model.{section}", f"model.{section}").removeprefix("model.")
        for key, default in DEFAULTS_1.get(section, {}).items():
            flat[f"model.{section}.{key}"] = default
        for key, value in settings.items():
            name = f"model.{section}.{key}"
            flat[CONFIG_KEYS_1.get(name, name)] = value
    if found.get("objective") in DECODER_OBJECTIVES:
        flat["optimizer.rules"] = [
            [re.sub(r"(?<![\w])(tokenizer|direct)(?=[/|)])", lambda m: PARAMS_1[m[1]], pattern), value]
            for pattern, value in flat.get("optimizer.rules", [])
        ]
        for entry in flat.get("init_from", []):
            entry["rename"] = [[a, b.replace("tokenizer/", "image_tokenizer/")] for a, b in entry["rename"]]
    nested: dict[str, Any] = {}
    for name, value in _renamed_prefixes(flat).items():
        value = CONFIG_VALUES_1[name].get(value, value) if name in CONFIG_VALUES_1 else value
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def _renamed_prefixes(flat: dict[str, Any]) -> dict[str, Any]:
    """Whole dotted names by the table; otherwise their first component."""
    found = {}
    for name, value in flat.items():
        first, dot, rest = name.partition(".")
        found[CONFIG_KEYS_1.get(name, CONFIG_KEYS_1.get(first, first) + dot + rest)] = value
    return found


class Renames(NamedTuple):
    """First components of parameter paths: old → new, and new → old."""

    forward: dict[str, str]
    inverse: dict[str, str]


def param_renames(meta: dict[str, Any]) -> Renames:
    """How the parameters of a checkpoint with this metadata are renamed; empty for today's format."""
    old = meta.get("format", 1) == 1
    objective = json.loads(meta["config"]).get("objective") if old else None
    table = PARAMS_1 if objective in DECODER_OBJECTIVES else {}
    return Renames(table, {new: former for former, new in table.items()})


def rename_first(path: str, table: dict[str, str]) -> str:
    """A parameter path with its first component renamed."""
    first, slash, rest = path.partition("/")
    return table.get(first, first) + slash + rest


def header(found: dict[str, Any]) -> dict[str, Any]:
    """A header of records under today's names."""
    return _renamed(found, HEADER_KEYS_1)


def record(found: dict[str, Any]) -> dict[str, Any]:
    """A stored record under today's names. Format 1 had one image per record."""
    if "texts" in found:
        return found
    found = _renamed(found, RECORD_KEYS_1)
    return {
        "key": found["key"],
        "images": [found["image_data"]],
        "keep": [found["keep"]],
        "codes": [found["codes"]],
        "texts": [*found["captions"], *(text for question in found["questions"] for text in question[:2])],
        "kinds": [kind for _, _, kind in found["questions"]],
    }


def record_index(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The index of records of format 1 as today's arrays.

    The first caption was the caption, the others were prompts; the second question was an alternative to the first.
    Format 1 stored one count for question, answer and </s>: it is given to the question.
    """
    captions, questions = found["caption_counts"], found["question_counts"]
    caption_ends, question_ends = np.cumsum(captions), np.cumsum(questions)
    texts: list[np.ndarray] = []
    outlines: list[bytes] = []
    for i, (n, q) in enumerate(zip(captions, questions, strict=True)):
        asked = found["questions"][question_ends[i] - q : question_ends[i]].astype(np.uint32)
        texts += [found["captions"][caption_ends[i] - n : caption_ends[i]].astype(np.uint32)]
        texts += [np.stack([asked - 1, np.zeros_like(asked)], 1).reshape(-1)]
        outlines.append(bytes([CAPTION, *[PROMPT] * (n - 1), *[QUESTION, ALTERNATIVE, *[QUESTION] * q][:q]]))
    return {
        "source": np.zeros(len(captions), np.uint16),
        "kept": found["kept"],
        "kept_ends": np.arange(len(captions) + 1),
        "texts": np.concatenate(texts) if texts else np.zeros(0, np.uint32),
        "texts_ends": np.concatenate([[0], np.cumsum(captions + 2 * questions)]),
        "outlines": np.frombuffer(b"".join(outlines), np.uint8),
        "outlines_ends": np.concatenate([[0], np.cumsum([len(codes) for codes in outlines])]),
    }


def meta(found: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata under today's names; its config is left to `config`."""
    return found if found.get("format", 1) >= 2 else _renamed(found, META_KEYS_1)
