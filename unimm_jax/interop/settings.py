"""Compares the settings of weights from elsewhere with those of the stage that starts from them.

Shapes alone do not show that weights were trained with another RoPE base, epsilon or pixel normalization.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from unimm_jax.errors import ConfigError, WeightMismatchError

# first component of a parameter path → model section with its settings
SECTIONS = {
    "encoder": "encoder",
    "language": "language",
    "selector": "image_tokenizer",
    "merger": "image_tokenizer",
    "feature_encoder": "image_tokenizer",
    "quantizer": "image_tokenizer",
    "decoder": "image_tokenizer",
    "pixel_decoder": "pixel_decoder",
    "unet": "unet",
    "vae": "vae",
    "conditioner": "conditioner",
}
# settings that change how a program runs, not what it computes
EXECUTION = ("scan", "remat")
# settings of the image tokenizer by the component that has them
COMPONENTS = {
    "selector": ("selection", "top_k"),
    "merger": ("heads", "mlp_width", "merger_depth", "eps", "sink"),
    "feature_encoder": ("heads", "mlp_width", "merger_depth"),
    "quantizer": ("codes", "code_width", "quantizer"),
    "decoder": ("architecture", "heads", "mlp_width", "decoder_depth", "code_width", "positions", "decoder_sink"),
}


def component_of(path: str) -> str:
    """The first component of a parameter path; decoder stages hold the image tokenizer one level down."""
    return path.removeprefix("image_tokenizer/").split("/")[0]


def components_read(entry: dict[str, Any], paths: Iterable[str]) -> list[str]:
    """Components of a source that an entry of `init_from` reads into the same component of the stage."""
    found: dict[str, None] = {}
    for path in paths:
        for pattern, replacement in entry["rename"]:
            if re.match(pattern, path):
                component = component_of(path)
                if component in SECTIONS and component == component_of(re.sub(pattern, replacement, path, count=1)):
                    found[component] = None
    return list(found)


def differences(components: Iterable[str], source: dict[str, Any], stage: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """ "section.setting" → (value in the stage's config, value of the weights), for all settings that differ.

    Args:
      source, stage: section name → config dataclass.
    """
    found = {}
    for component in components:
        section = SECTIONS[component]
        if section not in source or section not in stage:
            continue
        for field in dataclasses.fields(stage[section]):
            if field.name in EXECUTION or field.name not in COMPONENTS.get(component, (field.name,)):
                continue
            ours, theirs = getattr(stage[section], field.name), getattr(source[section], field.name)
            if not _are_equal(ours, theirs):
                found[f"{section}.{field.name}"] = ours, theirs
    return found


def _are_equal(a: Any, b: Any) -> bool:
    """Equality; one number equals a tuple of that number (one value per level of a U-Net)."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return tuple(a) == tuple(b)
    if isinstance(a, tuple | list):
        a, b = b, a
    return all(a == item for item in b) if isinstance(b, tuple | list) else bool(a == b)


def check(
    where: str, entry: dict[str, Any], paths: Iterable[str], source: dict[str, Any], stage: dict[str, Any]
) -> None:
    """Checks that an entry of `init_from` reads weights with the settings of the stage.

    Args:
      where: the source, for the message.
      entry: its `allow` names settings that may differ, as "section.setting".
      paths: parameters of the source.
      source, stage: section name → config dataclass.

    Raises:
      WeightMismatchError: lists all settings that differ. ConfigError: `allow` names something else than settings.
    """
    allowed = entry.get("allow", ())
    allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    known = {f"{name}.{field.name}" for name, section in stage.items() for field in dataclasses.fields(section)}
    wrong = [name for name in allowed if name not in known]
    if wrong:
        raise ConfigError(
            f"config.init_from: allow of {where} names {', '.join(map(repr, wrong))}; settings are written like "
            "'encoder.eps' and belong to the model sections of this stage"
        )
    found = differences(components_read(entry, paths), source, stage)
    found = {name: values for name, values in found.items() if name not in allowed}
    if found:
        lines = [f"config.model.{name} is {ours}, the weights have {theirs}" for name, (ours, theirs) in found.items()]
        names = ", ".join(f'"{name}"' for name in found)
        raise WeightMismatchError(
            f"config.init_from: the weights of {where} were made with other settings:\n  " + "\n  ".join(lines) + "\n"
            f"set these to the values of the weights, or add allow=({names},) to the entry to use them anyway"
        )
