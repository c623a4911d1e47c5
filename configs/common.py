"""Settings that all stages share: sizes, model shapes, and which parameters train in which stage.

The published sizes are `7b` (default: LaVIT's tokenizer under ILLUME's schedule), `lavit-7b` and `illume-7b` (each
paper's own recipe; what is not published is marked in docs/decisions.md). The small sizes are
`one_gpu` (planned for 30 minutes on one data-center GPU, not measured) and `laptop` (minutes on two CPU cores), with
the variants `laptop-lavit` and `laptop-illume`: the published choices of LaVIT's tokenizer, and ILLUME's recipe, at the
scale of `laptop`. The tokenizer of `laptop-lavit` does not learn to reconstruct (docs/results.md). `colab` is a variant
of `laptop` for one TPU chip, planned for 20 to 30 minutes on a free Colab TPU; it was not run on a TPU yet.
"""

from typing import Any

from ml_collections import ConfigDict

from unimm_jax.errors import ConfigError

SIZES = ("7b", "lavit-7b", "illume-7b", "one_gpu", "laptop", "laptop-lavit", "laptop-illume", "colab")
SCRATCH_SIZES = SIZES[3:]  # train from nothing; the others start from published weights
FROZEN = None

# ---- Model shapes: one dict per size (see `of_size`); what a dict leaves out is the default of the section -----------

ENCODER: dict[str, dict[str, Any]] = {
    "7b": dict(remat="full"),  # EVA-CLIP ViT-g/14
    "illume-7b": dict(  # the shape of UNIT's ViT-H
        width=1280, depth=32, heads=16, mlp_width=5120, biases="qkv", output_norm="affine", remat="full"
    ),
    "one_gpu": dict(
        image_size=64, patch_size=16, width=256, depth=6, heads=8, mlp_width=1024, biases="qkv", activation="relu2",
        output_norm="plain",
    ),
    "laptop": dict(
        image_size=64, patch_size=16, width=128, depth=3, heads=4, mlp_width=512, biases="qkv", activation="relu2",
        output_norm="plain", scan=False,
    ),
}  # fmt: skip
IMAGE_TOKENIZER: dict[str, dict[str, Any]] = {
    "7b": dict(remat="full"),  # LaVIT's
    "illume-7b": dict(  # ILLUME+'s depths
        architecture="bidirectional", mlp_width=5120, merger_depth=4, decoder_depth=4, selection="all", remat="full",
    ),
    "one_gpu": dict(
        heads=8, mlp_width=1024, merger_depth=2, decoder_depth=4, codes=1024, positions="grid", eps=0.0, sink=1.0,
        decoder_sink=1.0,
    ),
    "laptop": dict(
        heads=4, mlp_width=256, merger_depth=1, decoder_depth=2, codes=128, positions="grid", eps=0.0, sink=1.0,
        decoder_sink=1.0, scan=False,
    ),
    "laptop-lavit": dict(heads=4, mlp_width=256, merger_depth=1, decoder_depth=2, codes=128, scan=False),
    "laptop-illume": dict(
        architecture="bidirectional", heads=4, mlp_width=256, merger_depth=1, decoder_depth=2, codes=64,
        selection="all", scan=False,
    ),
}  # fmt: skip
LANGUAGE: dict[str, dict[str, Any]] = {
    "7b": dict(remat="full"),  # LLaMA-7B
    "one_gpu": dict(width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1408),
    "laptop": dict(width=128, layers=4, heads=4, kv_heads=4, head_width=32, mlp_width=384, scan=False),
    # What probably limits the scores of `laptop` is its language model, whose million parameters learn both to answer
    # and to draw. `colab` has eight times as many and keeps the image tokenizer. All widths are multiples of 128, the
    # side of a TPU's matrix unit. The chip has room for much more: the host, which renders and decodes the images, is
    # expected to set the speed, so the schedule is sized by the number of images.
    "colab": dict(width=256, layers=8, heads=4, kv_heads=4, head_width=64, mlp_width=768),
}

# ---- Trainable parameters per stage: regex → learning-rate multiplier, None is frozen --------------------------------
# Every parameter matches exactly one rule. Sources: "Published learning rates and trained parameters" in
# docs/decisions.md.

_LANGUAGE = "language/.*"
_VISUAL_ROWS = "language/(embed|head)_visual"
_LANGUAGE_REST = "language/(?!(embed|head)_visual).*"
_ADAPTER = "adapter.*"
_ENCODER, _MERGER = "encoder/.*", "merger/.*"
_CODEBOOK = "quantizer/(codebook|count)"

PUBLISHED_RULES = {
    ("lavit", "stage1"): [
        (_ENCODER, FROZEN),
        (_MERGER, FROZEN),
        (_ADAPTER, 5.0),
        (_VISUAL_ROWS, 1.0),
        (_LANGUAGE_REST, FROZEN),
    ],
    ("illume", "stage1"): [(_ENCODER, FROZEN), (_ADAPTER, 5.0), (_VISUAL_ROWS, 1.0), (_LANGUAGE_REST, FROZEN)],
    ("lavit", "stage2"): [(_ENCODER, FROZEN), (_MERGER, 1.0), (_ADAPTER, 1.0), (_LANGUAGE, 1.0)],
    ("lavit-7b", "stage2"): [(_ENCODER, FROZEN), (_MERGER, 10.0), (_ADAPTER, 10.0), (_LANGUAGE, 1.0)],
    ("illume", "stage2"): [(_ENCODER, FROZEN), (_ADAPTER, 1.0), (_LANGUAGE, 1.0)],
    ("lavit", "stage3"): [(_ENCODER, 0.1), (_MERGER, 1.0), (_ADAPTER, 1.0), (_LANGUAGE, 1.0)],
    ("illume", "stage3"): [(_ENCODER, 0.1), (_ADAPTER, 1.0), (_LANGUAGE, 1.0)],
}
# Sizes from nothing: the text stage trains the language model on text alone. The merger's copy trains from stage 1 on,
# because its tokenizer trained for minutes rather than on 100M images.
SCRATCH_RULES = {
    "lavit": [(_ENCODER, FROZEN), (_MERGER, 1.0), (_ADAPTER, 1.0), (_LANGUAGE, 1.0)],
    "illume": [(_ENCODER, FROZEN), (_ADAPTER, 1.0), (_LANGUAGE, 1.0)],
}
ALL_BUT_ENCODER_AND_CODEBOOK = [(_ENCODER, FROZEN), (_CODEBOOK, FROZEN), (f"(?!encoder/|{_CODEBOOK}).*", 1.0)]
TOKENIZER_RULES = {
    ("lavit", "selector"): ALL_BUT_ENCODER_AND_CODEBOOK,
    ("lavit", "tokenizer"): [
        (_ENCODER, FROZEN),
        ("selector/.*", FROZEN),
        (_CODEBOOK, FROZEN),
        (f"(?!encoder/|selector/|{_CODEBOOK}).*", 1.0),
    ],
    ("illume", "tokenizer"): ALL_BUT_ENCODER_AND_CODEBOOK,
}


# Shares of tasks for records of other kinds than captions. A record gets one of the tasks that apply to it. In stages 2
# and 3, one applies to each of these records, so the value does not matter.
OTHER_TASKS = dict(conversation=1.0, edit=1.0, interleaved=1.0)


def check_size(size: str | None) -> str:
    """The given size, or "7b" if it is None or empty.

    Raises:
      ConfigError: unknown size.
    """
    size = size or "7b"
    if size not in SIZES:
        raise ConfigError(f"there is no size {size!r}; sizes are {', '.join(SIZES)}")
    return size


def scale(size: str) -> str:
    """The scale of a size, "7b", "one_gpu" or "laptop": a size is a scale, or a variant of one."""
    return "laptop" if size.startswith("laptop") or size == "colab" else size if size == "one_gpu" else "7b"


def of_size(size: str, by_size: dict[str, Any]) -> Any:
    """The entry of a size in a dict; if it has none, that of its scale, and at last that of "7b"."""
    return by_size.get(size, by_size.get(scale(size), by_size["7b"]))


def from_nothing(size: str) -> bool:
    """Whether a size starts from random values instead of published weights."""
    return size in SCRATCH_SIZES


def flavor(size: str) -> str:
    """The recipe that a size follows, "lavit" or "illume".

    It decides which connector reads images, and whether the codes at the positions of input images are targets. The
    default size uses LaVIT's dynamic tokenizer under ILLUME's schedule.
    """
    return "illume" if size in ("illume-7b", "laptop-illume") else "lavit"


def base(stage: str, size: str, objective: str) -> ConfigDict:
    """Settings that all stages share."""
    small = from_nothing(size)
    c = ConfigDict()
    c.name, c.stage, c.size, c.objective = f"{stage}:{size}", stage, size, objective
    c.dtype = "float32" if size.startswith("laptop") else "bfloat16"
    c.train, c.data, c.loss = ConfigDict(), ConfigDict(), ConfigDict()
    c.optimizer = ConfigDict(dict(name="muon" if small else "adamw", weight_decay=0.02 if small else 0.0))
    c.data.image_size = 64 if small else 224
    c.model = ConfigDict(dict(encoder=of_size(size, ENCODER)))
    c.evals = ConfigDict(dict(held_out=dict(type="loss", every=of_size(size, {"7b": 1000, "laptop": 0}))))
    return c


def language_stage(stage: str, size: str | None) -> ConfigDict:
    """Settings that the language stages share: model, packing, and which parameters train."""
    size = check_size(size)
    small = from_nothing(size)
    c = base(stage, size, "language_modeling")
    c.model.image_tokenizer = of_size(size, IMAGE_TOKENIZER)
    c.model.language = of_size(size, LANGUAGE)
    patches = (c.data.image_size // c.model.encoder.get("patch_size", 14)) ** 2
    connector = "mlp" if flavor(size) == "illume" else "merger"
    c.model.unified = ConfigDict(dict(connector=connector, max_image_tokens=patches))
    if size == "illume-7b":  # reads images and slices of 448 pixels as 256 features each; generates 256 codes
        c.data.image_size = c.model.encoder.image_size = 2 * c.data.image_size
        c.model.unified.patch_merge = 2
    c.loss.chunk = 0 if small else 1024
    if small:
        c.data.image_prompts = "features_last"
    c.companions = ConfigDict(
        dict(image_tokenizer="../tokenizer", pixel_decoder="../pixel_decoder", unet_decoder="../unet_decoder")
    )
    whole = size == "laptop-illume"  # reads and writes all 16 patches of an image
    c.data.seq_len = 128 if whole else 64 if small else 2048
    c.data.images_per_row = 5 if whole else 3 if small else 8
    c.data.image_targets = (0.1 if small else 1.0) if flavor(size) == "lavit" else 0.0
    c.data.text_targets = (0.1 if small else 1.0) if flavor(size) == "lavit" else 0.0  # ILLUME: assistant tokens only
    # `colab` has smaller rates than `laptop`, because its language model is wider
    c.optimizer.muon_learning_rate = of_size(size, {"7b": 8e-3, "colab": 6e-3})
    if not small:
        c.optimizer.warmup = 0.03
    if stage == "text":
        c.optimizer.rules = [(_LANGUAGE, 1.0)]
    else:
        published = PUBLISHED_RULES.get((size, stage)) or PUBLISHED_RULES[flavor(size), stage]
        c.optimizer.rules = SCRATCH_RULES[flavor(size)] if small else published
    if size == "illume-7b" and stage != "text":
        c.data.template = "vicuna_v1"  # of Vicuna-7B, ILLUME's language model
    return c


def refuse_lavit(stage: str, size: str | None) -> None:
    """Refuses LaVIT's recipe for a stage that it does not have.

    Raises:
      ConfigError: the size is `lavit-7b`.
    """
    if check_size(size) == "lavit-7b":
        raise ConfigError(
            f"LaVIT trains its language model in one stage and has no {stage}; use configs/stage2.py:lavit-7b, or "
            f"configs/{stage}.py:7b for LaVIT's tokenizer under ILLUME's schedule"
        )


def start_from_tokenizer(size: str) -> dict[str, Any]:
    """Initializes the language stage's encoder and, in the LaVIT flavor, its merger from the image tokenizer."""
    parts = ("encoder/",) if flavor(size) == "illume" else ("encoder/", "merger/")
    found: dict[str, Any] = dict(checkpoint="../tokenizer", rename=[(part, part) for part in parts])
    if size == "illume-7b":
        found["allow"] = ("encoder.image_size",)  # position embeddings are interpolated
    return found


def start_from(stage: str) -> dict[str, Any]:
    """Initializes all parameters from an earlier language stage."""
    return dict(checkpoint=f"../{stage}", rename=[("", "")])
