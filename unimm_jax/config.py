"""Sections of a config: types, defaults, allowed ranges. `unimm_jax.resolve` completes, checks and loads configs.

A stage's config has the sections that all stages share (`TrainConfig`, `OptimizerConfig`, ...), one data section and
one loss section of its objective, and the model sections that the objective names (dataclasses of
`unimm_jax.models`).
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from unimm_jax import legacy
from unimm_jax.data import slices, tasks, transforms

TASKS = tuple(tasks.REGISTRY)


def ranged(default: Any, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Any:
    """A numeric field with a range: low <= value <= high and value > above."""
    return dataclasses.field(default=default, metadata={"range": (low, high, above)})


def one_of(default: str, *choices: str) -> Any:
    """A string field with a fixed set of values."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def shares() -> Any:
    """A field that maps each task to its share of the examples; all shares are 0 by default."""
    return dataclasses.field(default_factory=lambda: dict.fromkeys(TASKS, 0.0), metadata={"merge": True})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: number of optimizer steps.
      batch_size: images of a global batch; in the language stages examples, or tokens (`config.data.batch_unit`).
      micro_batches: parts of a batch whose gradients are accumulated one after the other, to save memory.
      log_every, checkpoint_every, image_every: intervals in steps. Logged values are means over the interval.
      keep: number of newest checkpoints to keep.
      use_previous_checkpoint: restore the previous complete checkpoint if the newest is corrupt.
      watchdog: seconds without a step after which the stacks of all threads are printed; 0 is never.
      profile: number of steps to trace for TensorBoard or Perfetto; 0 is none. profile_start: steps of this process
        before the trace starts.
      wandb: project of Weights & Biases that gets metrics and images, beside TensorBoard; "" is none.
    """

    steps: int = ranged(0, low=1)
    batch_size: int = ranged(0, low=1)
    micro_batches: int = ranged(1, low=1)
    log_every: int = ranged(50, low=1)
    checkpoint_every: int = ranged(1000, low=1)
    image_every: int = ranged(1_000_000, low=1)
    keep: int = ranged(2, low=1)
    use_previous_checkpoint: bool = True
    watchdog: float = ranged(600.0, low=0)
    profile: int = ranged(0, low=0)
    profile_start: int = ranged(10, low=1)
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. `rules` maps parameter paths (full-match regex) to a multiplier of the rate, or None for frozen.

    Attributes:
      name: AdamW for all parameters, or Muon for kernels of linear layers and AdamW for the rest.
      learning_rate: peak rate of AdamW. muon_learning_rate: peak rate of Muon.
      warmup: share of the steps with a linear increase. end: final rate as a share of the peak (cosine schedule).
      weight_decay: on kernels only. clip_norm: bound of the global gradient norm; 0 is off.
    """

    name: str = one_of("adamw", "adamw", "muon")
    learning_rate: float = ranged(3e-3, above=0)
    muon_learning_rate: float = ranged(6e-3, above=0)
    schedule: str = one_of("cosine", "cosine", "constant")
    warmup: float = ranged(0.06, low=0, high=1)
    end: float = ranged(0.02, low=0, high=1)
    beta1: float = ranged(0.9, low=0, high=1 - 1e-9)
    beta2: float = ranged(0.95, low=0, high=1 - 1e-9)
    eps: float = ranged(1e-8, above=0)
    weight_decay: float = ranged(0.0, low=0)
    clip_norm: float = ranged(1.0, low=0)
    rules: tuple[tuple[str, float | None], ...] = ((".*", 1.0),)


@dataclasses.dataclass(frozen=True)
class TextTokenizerConfig:
    """The text tokenizer: a file, or a BPE trained on the texts of the data.

    Attributes:
      path: tokenizer.json, sentencepiece .model or a directory with one; empty trains one with `vocab_size` ids.
    """

    path: str = ""
    vocab_size: int = ranged(512, low=300)


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    """Input of stages that read images from sources.

    Attributes:
      sources: data sources, separated by ";" (see `unimm_jax.data.sources`).
      image_size: side of the square images in pixels.
      held_out: share of the records held out where a source has no test split of its own.
      fit: how an image becomes a square: "stretch" does not keep the aspect ratio (LaVIT), "crop" takes the centered
        square. The records, and all stages that read them, keep the fit of the image tokenizer.
      max_crop: with "crop", records with an image that would lose a larger share are left out (0.2 in ILLUME+).
    """

    sources: str = "scenes"
    image_size: int = ranged(224, low=1)
    held_out: float = ranged(0.02, low=0, high=0.5)
    fit: str = one_of("stretch", *transforms.FITS)
    max_crop: float = ranged(0.2, low=0, high=1)


@dataclasses.dataclass(frozen=True)
class RecordDataConfig:
    """Input of stages that read single images with their codes from records.

    Attributes:
      records: directory that `unimm_jax.pretokenize` wrote; relative to the workdir.
      image_size: side of the images that were tokenized, in pixels.
      pixel_size: side of the images that are generated, in pixels; 0 is `image_size`.
    """

    records: str = "../records"
    image_size: int = ranged(224, low=1)
    pixel_size: int = ranged(0, low=0)


@dataclasses.dataclass(frozen=True)
class PackedDataConfig:
    """Input of the language stages: rows of packed examples.

    Attributes:
      records: directory that `unimm_jax.pretokenize` wrote; relative to the workdir.
      image_size: side of the images in pixels.
      batch_unit: what `config.train.batch_size` counts: "examples", or "tokens" for the number of examples that have
        that many tokens on average. Every step has the same number of examples.
      seq_len: tokens per row T. images_per_row: images and slices per row R whose features the model computes.
      max_slices: an image larger than `image_size` is also read in at most so many slices (9 in ILLUME); 0 for none.
        Needs the connector "mlp". slice_grids: "illume" for all grids, "llava_next" for LLaVA-NeXT's five.
      global_view_share: share of the examples that read their images without slices, so that the model can do both.
      max_questions: questions per `question` example.
      prompt_dropout: share of text-to-image and edit examples without their text, for guidance (0.1 in ILLUME+'s code).
      image_targets: loss weight of code targets at positions of input images (LaVIT's [image, text]; 0 in ILLUME).
      text_targets: loss weight of the prompt's own tokens in text-to-image.
      code_targets: loss weight of the codes of generated images.
      template: layout of conversations, questions and edits, a name of `unimm_jax.data.tasks.TEMPLATES`.
      image_prompts: layout of prompts with images for images, in training and generation: "features" is a user turn
        whose images enter as features (ILLUME), "features_last" the same with its texts first. At generation only,
        "codes" has the images' codes without [IMG] and [/IMG] (LaVIT).
      tasks: share of the examples per task. A record has one of the tasks that apply to it, in proportion to them.
      mixture: sources with weights: dicts with `source` (as `pretokenize` got it), `weight` (relative share of the
        examples, default 1) and `tasks` (shares for this source, default those below). () reads every record once per
        pass.
      tasks_end: shares reached, linearly, in pass `tasks_epochs` over the records, counted from 1; all 0 keeps `tasks`.
    """

    records: str = "../records"
    image_size: int = ranged(224, low=1)
    batch_unit: str = one_of("examples", "examples", "tokens")
    seq_len: int = ranged(2048, low=4)
    images_per_row: int = ranged(8, low=0)
    max_slices: int = ranged(0, low=0)
    slice_grids: str = one_of("illume", *slices.RULES)
    global_view_share: float = ranged(0.0, low=0, high=1)
    max_questions: int = ranged(3, low=1)
    prompt_dropout: float = ranged(0.1, low=0, high=1)
    image_targets: float = ranged(1.0, low=0)
    text_targets: float = ranged(1.0, low=0)
    code_targets: float = ranged(1.0, low=0)
    template: str = one_of("plain", *tasks.TEMPLATES)
    image_prompts: str = one_of("features", *tasks.IMAGE_PROMPTS)
    mixture: tuple[dict[str, Any], ...] = ()
    tasks: dict[str, float] = shares()
    tasks_end: dict[str, float] = shares()
    tasks_epochs: int = ranged(1, low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A complete config of a stage. Every setting has a value, so a saved config does not depend on defaults.

    Attributes:
      name: "stage:size". objective: a name of `unimm_jax.objectives.REGISTRY`.
      dtype: of activations; trained parameters are float32.
      mesh: (data, fsdp, tensor), one of them may be -1 for the rest; () chooses by the devices (`sharding.make_mesh`).
      init_from: weights to start from: dicts with `checkpoint` (relative to the workdir), `rename` [(regex,
        replacement)], and optionally `optional` (regex), `kind`, `part`, `allow` (settings that may differ).
      evals: name → dict with `type` (a name of `unimm_jax.evals.REGISTRY`), `every` (steps) and its own options.
      companions: checkpoints that generation needs, by role; relative to the workdir.
      model: section name → config dataclass. data, loss: sections of the objective.
    """

    name: str
    stage: str
    size: str
    objective: str
    seed: int
    dtype: str
    mesh: tuple[int, ...]
    init_from: tuple[dict[str, Any], ...]
    train: TrainConfig
    optimizer: OptimizerConfig
    text_tokenizer: TextTokenizerConfig
    evals: dict[str, dict[str, Any]]
    companions: dict[str, str]
    model: dict[str, Any]
    data: Any
    loss: Any

    def as_dict(self) -> dict[str, Any]:
        """All settings as nested dicts."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """All settings as JSON, with the format that `resolve.from_json` reads."""
        return json.dumps({"format": legacy.FORMAT} | self.as_dict(), indent=1)


PLAIN = ("name", "stage", "size", "objective")  # strings without a default
SHARED: dict[str, type] = {"train": TrainConfig, "optimizer": OptimizerConfig, "text_tokenizer": TextTokenizerConfig}
DEFAULTS: dict[str, Any] = {"seed": 0, "dtype": "bfloat16", "mesh": (), "init_from": ()}
# roles of `companions`; decoders in the order in which the first one present is the default
DECODERS = ("pixel_decoder", "unet_decoder", "unet_decoder_high")
COMPANIONS = ("image_tokenizer", *DECODERS)
FREE = ("evals", "companions")  # dicts whose keys the config chooses


def defaults_of(section: type) -> dict[str, Any]:
    """Setting → default of a section dataclass."""
    found = {}
    for field in dataclasses.fields(section):
        factory: Any = field.default_factory
        found[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return found


def merged(section: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """A section's defaults with the given settings over them; unknown settings are kept (see `unknown`)."""
    found = defaults_of(section)
    merging = {field.name for field in dataclasses.fields(section) if field.metadata.get("merge")}
    floats = {field.name for field in dataclasses.fields(section) if field.type is float}
    for name, value in given.items():
        if name in merging and isinstance(value, Mapping):
            found[name] = found[name] | {key: _as_float(item) for key, item in value.items()}
        else:
            found[name] = _as_float(value) if name in floats else value
    return found


def _as_float(value: Any) -> Any:
    """An integer as a float, so that a command line may override it by a fraction; other values as they are."""
    return float(value) if type(value) is int else value


def unknown(where: str, given: Iterable[str], known: Iterable[str]) -> list[str]:
    """A sentence for every given name that is not known, with the nearest known one."""
    known = list(known)
    found = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            found.append(f"{where} has no setting {name!r}; {hint}")
    return found


def problems_of(where: str, section: Any) -> list[str]:
    """A sentence for every value of a section dataclass that has a wrong type or is out of range."""
    found = []
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{where}.{field.name}"
        wanted = _wrong_type(field, value)
        if wanted:
            found.append(f"{name} is {value!r}; it must be {wanted}")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name} is {value}; it must be a finite number")
        elif "range" in field.metadata:
            low, high, above = field.metadata["range"]
            if not (low <= value <= high and value > above):
                found.append(f"{name} is {value}; it must be {_range_words(low, high, above)}")
        if "choices" in field.metadata and value not in field.metadata["choices"]:
            found.append(f"{name} is {value!r}; it is one of {', '.join(field.metadata['choices'])}")
        if field.metadata.get("merge"):
            found += unknown(name, value, TASKS)
            bad = {k: v for k, v in value.items() if not isinstance(v, int | float) or not 0 <= v < math.inf}
            found += [f"{name}.{k} is {v}; a share must be at least 0 and finite" for k, v in bad.items()]
    return found


def _wrong_type(field: Any, value: Any) -> str:
    """What a value should be, if it is not; empty if it is fine or not a plain type."""
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    if field.metadata.get("merge"):
        return "" if isinstance(value, Mapping) else "a dict from tasks to shares"
    if typing.get_origin(field.type) is tuple:
        item = typing.get_args(field.type)[0]
        if not isinstance(value, tuple):
            return "a tuple"
        if item in (int, float) and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            return "a tuple of numbers"
        return ""
    if field.type not in names:
        return ""
    accepted = {int: int, float: (int, float), bool: bool, str: str}[field.type]
    fine = isinstance(value, accepted) and (field.type in (bool, str) or not isinstance(value, bool))  # type: ignore
    return "" if fine else names[field.type]


def _range_words(low: float, high: float, above: float) -> str:
    if above > -math.inf:
        return f"above {above:g}"
    if high == math.inf:
        return f"at least {low:g}"
    return f"at most {high:g}" if low == -math.inf else f"from {low:g} to {high:g}"
