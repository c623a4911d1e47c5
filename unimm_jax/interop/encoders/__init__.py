"""Published layouts of vision encoders, found by name.

To add one: write a file with an `EncoderLayout` named LAYOUT and add its line to `REGISTRY`.
"""

import importlib
from typing import Any

from unimm_jax.interop.encoders.base import EncoderLayout

# name (the kind of an import) → module
REGISTRY = {
    "eva": "unimm_jax.interop.encoders.eva",
    "blip2": "unimm_jax.interop.encoders.blip2",
    "clip": "unimm_jax.interop.encoders.clip",
    "siglip": "unimm_jax.interop.encoders.siglip",
    "unit": "unimm_jax.interop.encoders.unit",
}


def get(name: str) -> EncoderLayout:
    """The layout of a name of `REGISTRY`."""
    return importlib.import_module(REGISTRY[name]).LAYOUT


def model_types() -> dict[str, str]:
    """`model_type` of a `config.json` → name of the layout."""
    return {kind: name for name in REGISTRY for kind in get(name).model_types}


def name_of(published: dict[str, Any]) -> str | None:
    """The layout of a published config; None if it does not describe a known vision encoder."""
    kind = published.get("model_type")
    return model_types().get(kind) if isinstance(kind, str) else None
