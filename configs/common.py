"""What all stages share: the sizes, and who trains when.

Sizes: `7b` (published; the default), `lavit-7b` and `illume-7b` (each paper's own combination), `one_gpu` (30 minutes
on one data-centre GPU), `laptop` (two CPU cores, minutes).
"""

from ml_collections import ConfigDict

SIZES = ("7b", "lavit-7b", "illume-7b", "one_gpu", "laptop")
FROZEN = None

# Who trains when (flavour × stage): regex → multiplier of the stage's rate, None is frozen. Every parameter matches one
# rule exactly. Rates and sets of the published sizes: ILLUME Table 5 and LaVIT §2 (spec of both in docs/decisions.md).
_LM_ALL = "language/.*"
_VISUAL_ROWS = "language/(embed|head)_visual"
_LM_REST = "language/(?!(embed|head)_visual).*"
_WAY_IN = "adapter.*"
_ENCODER, _MERGER = "encoder/.*", "merger/.*"

PUBLISHED_RULES = {
    ("lavit", "stage1"): [
        (_ENCODER, FROZEN),
        (_MERGER, FROZEN),
        (_WAY_IN, 5.0),
        (_VISUAL_ROWS, 1.0),
        (_LM_REST, FROZEN),
    ],
    ("illume", "stage1"): [(_ENCODER, FROZEN), (_WAY_IN, 5.0), (_VISUAL_ROWS, 1.0), (_LM_REST, FROZEN)],
    ("lavit", "stage2"): [(_ENCODER, FROZEN), (_MERGER, 1.0), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
    ("illume", "stage2"): [(_ENCODER, FROZEN), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
    ("lavit", "stage3"): [(_ENCODER, 0.1), (_MERGER, 1.0), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
    ("illume", "stage3"): [(_ENCODER, 0.1), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
}
# `laptop` and `one_gpu` start from nothing. The text stage gives the language model its words; from stage 1 on the
# merger's copy trains too, since its tokenizer saw minutes of training rather than 100M pictures.
SCRATCH_RULES = {
    "stage1": [(_ENCODER, FROZEN), (_MERGER, 1.0), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
    "stage2": [(_ENCODER, FROZEN), (_MERGER, 1.0), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
    "stage3": [(_ENCODER, FROZEN), (_MERGER, 1.0), (_WAY_IN, 1.0), (_LM_ALL, 1.0)],
}
_CODEBOOK = "quantizer/(codebook|count)"
TOKENIZER_RULES = {
    "selector": [(_ENCODER, FROZEN), (_CODEBOOK, FROZEN), (f"(?!encoder/|{_CODEBOOK}).*", 1.0)],
    "tokenizer": [
        (_ENCODER, FROZEN),
        ("selector/.*", FROZEN),
        (_CODEBOOK, FROZEN),
        (f"(?!encoder/|selector/|{_CODEBOOK}).*", 1.0),
    ],
}


def check_size(size: str | None) -> str:
    """The size asked for, "7b" if none.

    Raises:
      ValueError: unknown size.
    """
    size = size or "7b"
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}; sizes are {', '.join(SIZES)}")
    return size


def flavour(size: str) -> str:
    """ "lavit" or "illume": how pictures enter and whether image positions are targets. The default is LaVIT's dynamic
    tokenizer under ILLUME's schedule."""
    return "illume" if size == "illume-7b" else "lavit"


def base(stage: str, size: str) -> ConfigDict:
    """Every setting that all stages have."""
    small = size in ("laptop", "one_gpu")
    c = ConfigDict()
    c.name, c.stage, c.size = f"{stage}:{size}", stage, size
    c.seed = 0
    c.dtype = "float32" if size == "laptop" else "bfloat16"  # of activations; parameters are float32
    c.mesh = (1, -1, 1)  # data, fsdp, tensor; -1 takes the rest
    c.init_from = ()  # dicts of checkpoint, rename [(regex, replacement)], optional
    c.train = ConfigDict(
        dict(
            steps=0,
            batch_size=0,  # rows of a global batch
            log_every=50,
            checkpoint_every=1000,
            picture_every=1_000_000,
            keep=2,  # checkpoints
            use_previous_checkpoint=True,  # when the newest is damaged
            watchdog=600.0,  # seconds without a step after which all stacks are printed; 0 is never
        )
    )
    c.optimizer = ConfigDict(
        dict(
            name="muon" if small else "adamw",
            rate=3e-3,  # peak rate of AdamW
            muon_rate=6e-3,  # peak rate of Muon on kernels
            schedule="cosine",
            warmup=0.06,  # share of the steps
            end=0.02,  # last rate as a share of the peak
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.02 if small else 0.0,
            clip=1.0,  # global gradient norm; 0 is off
            rules=[(".*", 1.0)],
        )
    )
    c.data = ConfigDict(dict(sources="scenes", image_size=64 if small else 224))
    c.text = ConfigDict(dict(path="", size=512))  # a tokenizer by path, or one trained on the captions with `size` ids
    c.model = ConfigDict(dict(encoder=encoder(size)))
    return c


def encoder(size: str) -> ConfigDict:
    """The vision transformer: EVA-CLIP ViT-g/14, UNIT's ViT-H shape for illume, or a small one."""
    if size == "laptop":
        return ConfigDict(
            dict(
                image_size=64,
                patch_size=16,
                width=128,
                depth=3,
                heads=4,
                mlp_width=512,
                biases="qkv",
                activation="relu2",
                output_norm="plain",
                scan=False,
            )
        )
    if size == "one_gpu":
        return ConfigDict(
            dict(
                image_size=64,
                patch_size=16,
                width=256,
                depth=6,
                heads=8,
                mlp_width=1024,
                biases="qkv",
                activation="relu2",
                output_norm="plain",
                scan=True,
            )
        )
    if size == "illume-7b":
        return ConfigDict(
            dict(width=1280, depth=32, heads=16, mlp_width=5120, biases="qkv", output_norm="affine", remat="full")
        )
    return ConfigDict(dict(remat="full"))


def tokenizer(size: str) -> ConfigDict:
    """The visual tokenizer."""
    if size == "laptop":
        return ConfigDict(
            dict(
                heads=4,
                mlp_width=256,
                merger_depth=1,
                decoder_depth=2,
                codes=128,
                code_width=32,
                selection="argmax",
                positions="grid",
                eps=0.0,
                sink=1.0,
                decoder_sink=1.0,
                scan=False,
            )
        )
    if size == "one_gpu":
        return ConfigDict(
            dict(
                heads=8,
                mlp_width=1024,
                merger_depth=2,
                decoder_depth=4,
                codes=1024,
                code_width=32,
                selection="argmax",
                positions="grid",
                eps=0.0,
                sink=1.0,
                decoder_sink=1.0,
                scan=True,
            )
        )
    if size == "illume-7b":
        return ConfigDict(dict(mlp_width=5120, merger_depth=4, decoder_depth=4, selection="all", remat="full"))
    return ConfigDict(dict(remat="full"))


def language(size: str) -> ConfigDict:
    """The language model."""
    if size == "laptop":
        return ConfigDict(dict(width=128, layers=4, heads=4, kv_heads=4, head_width=32, mlp_width=384, scan=False))
    if size == "one_gpu":
        return ConfigDict(dict(width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1408))
    return ConfigDict(dict(remat="full"))


def language_stage(stage: str, size: str) -> ConfigDict:
    """What the language stages share: model, packing, objective, and where the weights come from."""
    size = check_size(size)
    small = size in ("laptop", "one_gpu")
    c = base(stage, size)
    c.objective = "language_modeling"
    c.model.tokenizer, c.model.language = tokenizer(size), language(size)
    patches = (c.data.image_size // c.model.encoder.get("patch_size", 14)) ** 2
    way_in = "features" if flavour(size) == "illume" else "merger"
    c.model.unified = ConfigDict(dict(way_in=way_in, budget=patches))
    c.loss = ConfigDict(dict(chunk=0 if small else 1024))  # positions of a row whose logits exist at once; 0 is all
    c.companions = ConfigDict(dict(tokenizer="../tokenizer", detokenizer="../pixel_decoder", unet="../detokenizer"))
    c.data.records = "../records"
    c.data.row_length = 64 if small else 2048
    c.data.row_pictures = 3 if small else 8  # picture slots a row
    c.data.turns = 3  # questions an example
    c.data.prompt_dropout = 0.1
    c.data.image_targets = (0.1 if small else 1.0) if flavour(size) == "lavit" else 0.0
    c.data.text_targets = 1.0 if not small else 0.1
    c.data.code_targets = 1.0
    c.data.tasks = ConfigDict()  # task → share of the examples
    c.data.tasks_end = (
        ConfigDict()
    )  # where the shares move to, over `passes` passes over the records; empty is constant
    c.data.passes = 1
    if not small:
        c.optimizer.warmup = 0.03
    if stage == "text":
        c.optimizer.rules = [(_LM_ALL, 1.0)]
    else:
        c.optimizer.rules = SCRATCH_RULES[stage] if small else PUBLISHED_RULES[flavour(size), stage]
    return c


def start_from_tokenizer(size: str) -> dict:
    """The LM's copies of encoder and (LaVIT) merger start as the tokenizer's."""
    parts = ("encoder/",) if flavour(size) == "illume" else ("encoder/", "merger/")
    return dict(checkpoint="../tokenizer", rename=[(part, part) for part in parts])


def start_from(stage: str) -> dict:
    """All weights of an earlier language stage."""
    return dict(checkpoint=f"../{stage}", rename=[("", "")])
