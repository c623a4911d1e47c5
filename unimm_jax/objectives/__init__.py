"""Registry of objectives. Each computes the loss of a model and owns its input, batch spec, config sections and checks.

To add one, write a file with a subclass of `Objective` and add it to `REGISTRY`.
"""

import importlib
from typing import Any

from unimm_jax.errors import ConfigError
from unimm_jax.objectives.base import Aux, Objective

# name → "module:class"; imported on first use
REGISTRY = {
    "contrastive": "unimm_jax.objectives.contrastive:Contrastive",
    "tokenization": "unimm_jax.objectives.tokenization:Tokenization",
    "denoising": "unimm_jax.objectives.denoising:Denoising",
    "pixel_decoding": "unimm_jax.objectives.pixel_decoding:PixelDecoding",
    "language_modeling": "unimm_jax.objectives.language_modeling:LanguageModeling",
}


def get(name: str) -> Any:
    """The class of an objective, a name of `REGISTRY`.

    Raises:
      ConfigError: unknown name.
    """
    if name not in REGISTRY:
        raise ConfigError(f"config.objective is {name!r}; it is one of {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


__all__ = ["REGISTRY", "Aux", "Objective", "get"]
