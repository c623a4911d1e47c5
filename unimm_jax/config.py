"""Checks a config before a device is touched, and says every mistake at once."""

import dataclasses
import pathlib
import re
from typing import Any

from unimm_jax.data.packing import TASKS
from unimm_jax.objectives.base import SECTIONS

OBJECTIVES = ("contrastive", "tokenization", "denoising", "pixel_decoding", "language_modeling")


class ConfigError(ValueError):
    """All that is wrong with a config, a sentence each."""


def check(config: Any, workdir: str | pathlib.Path) -> None:
    """Checks values, divisibility, rules and that everything named exists.

    Raises:
      ConfigError: lists every mistake with the setting's name and the mend.
    """
    wrong: list[str] = []

    def need(ok: bool, sentence: str) -> None:
        if not ok:
            wrong.append(sentence)

    def positive(section: str, *names: str) -> None:
        for name in names:
            value = config[section][name]
            need(isinstance(value, int) and value > 0, f"config.{section}.{name} is {value!r}; it must be at least 1")

    need(config.objective in OBJECTIVES, f"config.objective is {config.objective!r}; it is one of {OBJECTIVES}")
    need(config.dtype in ("float32", "bfloat16"), f"config.dtype is {config.dtype!r}; float32 or bfloat16")
    positive("train", "steps", "batch_size", "log_every", "checkpoint_every", "keep")
    optimizer = config.optimizer
    need(optimizer.name in ("adamw", "muon"), f"config.optimizer.name is {optimizer.name!r}; adamw or muon")
    need(optimizer.rate > 0, f"config.optimizer.rate is {optimizer.rate}; it must be above 0")
    for pattern, _ in optimizer.rules:
        try:
            re.compile(pattern)
        except re.error as error:
            wrong.append(f"config.optimizer.rules: {pattern!r} is not a regular expression ({error})")
    need(sum(s == -1 for s in config.mesh) <= 1, f"config.mesh is {tuple(config.mesh)}; only one -1 is possible")
    m: dict[str, Any] = {}
    for name, section in config.model.items():
        if name in SECTIONS:
            fields = {f.name for f in dataclasses.fields(SECTIONS[name])}
            unknown = sorted(set(section) - fields)
            need(not unknown, f"config.model.{name} has {unknown}; it knows {sorted(fields)}")
            m[name] = SECTIONS[name](**{k: v for k, v in section.items() if k in fields})
    encoder = m["encoder"]
    size, patch = config.data.image_size, encoder.patch_size
    need(size == encoder.image_size, f"config.data.image_size {size} differs from model.encoder.image_size")
    need(size % patch == 0, f"config.data.image_size {size} is not a multiple of the patch size {patch}")
    for name in {"encoder", "tokenizer", "text_tower"} & set(m):
        width, heads = getattr(m[name], "width", encoder.width), m[name].heads
        need(width % heads == 0, f"config.model.{name}: width {width} does not divide by {heads} heads")
    if "language" in m:
        lm = m["language"]
        need(
            lm.heads % lm.kv_heads == 0, f"config.model.language: {lm.kv_heads} kv_heads do not divide {lm.heads} heads"
        )
        need(lm.head_width % 2 == 0, f"config.model.language.head_width {lm.head_width} must be even (rotary pairs)")
    if config.objective == "language_modeling":
        tasks = config.data.tasks
        unknown = [t for t in (*tasks, *config.data.tasks_end) if t not in TASKS]
        need(not unknown, f"config.data.tasks names {unknown}; known tasks are {TASKS}")
        need(any(w > 0 for w in tasks.values()), "config.data.tasks gives every task the weight 0")
    if config.objective in ("language_modeling", "denoising", "pixel_decoding"):
        path = resolve(config.data.records, workdir)
        done = (path / "header.json").exists()
        need(done, f"config.data.records: {path} holds no finished records; run python -m unimm_jax.pretokenize first")
    for entry in config.init_from:
        path = resolve(entry["checkpoint"], workdir)
        need(path.exists(), f"config.init_from: there is no checkpoint at {path}; train that stage first")
    if wrong:
        raise ConfigError("\n".join(f"- {sentence}" for sentence in wrong))


def resolve(path: str, workdir: str | pathlib.Path) -> pathlib.Path:
    """A path of a config, seen from the workdir where it is relative."""
    return (pathlib.Path(workdir) / pathlib.Path(path).expanduser()).resolve()
