"""Objectives: each joins a model to a batch. `build` gives the one that a config names."""

from typing import Any

from unimm_jax.objectives.base import Aux, Objective


def build(config: Any, data: Any) -> Objective:
    """The objective of `config.objective` for an opened input (`unimm_jax.data.pipeline.Input`)."""
    if config.objective == "contrastive":
        from unimm_jax.objectives.contrastive import Contrastive

        return Contrastive(config, data)
    if config.objective == "tokenization":
        from unimm_jax.objectives.tokenization import Tokenization

        return Tokenization(config, data)
    if config.objective == "denoising":
        from unimm_jax.objectives.denoising import Denoising

        return Denoising(config, data)
    if config.objective == "pixel_decoding":
        from unimm_jax.objectives.denoising import PixelDecoding

        return PixelDecoding(config, data)
    from unimm_jax.objectives.language_modeling import LanguageModeling

    return LanguageModeling(config, data)


__all__ = ["Aux", "Objective", "build"]
