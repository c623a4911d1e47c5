"""What every objective offers to `train.py`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.models.conditioner import ConditionerConfig
from unimm_jax.models.contrastive import TextTowerConfig
from unimm_jax.models.denoiser import UNetConfig
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.pixel_decoder import PixelDecoderConfig
from unimm_jax.models.tokenizer import TokenizerConfig
from unimm_jax.models.unified import UnifiedConfig
from unimm_jax.models.vae import VAEConfig
from unimm_jax.models.vit import ViTConfig

Tree = Any
Batch = dict[str, Any]


@dataclasses.dataclass
class Aux:
    """What comes with a loss: metrics (scalars), and new values of parameters that no optimiser touches, by path."""

    metrics: dict[str, jax.Array]
    updates: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Aux, ["metrics", "updates"], [])


class Objective:
    """Base of all objectives: a model split into its graph and pure-dict parameters.

    Args (constructor):
      make: builds the model from `nnx.Rngs`.
    """

    def __init__(self, config: Any, make: Callable[[nnx.Rngs], nnx.Module]):
        self.config = config
        self.make = make
        self.dtype = jnp.dtype(config.dtype)
        self.abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
        self.graph = nnx.graphdef(self.abstract)

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters as a nested dict."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(params=key)), nnx.Param))

    def module(self, params: Tree) -> Any:
        """The model with the given parameters."""
        return nnx.merge(self.graph, params)

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """Scalar float32 loss of a batch, with metrics."""
        raise NotImplementedError

    def prepare(self, params: Tree, batches: Iterator[Batch]) -> Tree:
        """What must happen once before the first step of a fresh run (k-means); the identity for most."""
        del batches
        return params

    def pictures(self, params: Tree, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pictures for a person, uint8 [H, W, 3] by name, drawn from a host batch."""
        del params, batch
        return {}

    @functools.cached_property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(self.abstract, nnx.Param)))


SECTIONS = {
    "encoder": ViTConfig,
    "tokenizer": TokenizerConfig,
    "text_tower": TextTowerConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "conditioner": ConditionerConfig,
    "pixel_decoder": PixelDecoderConfig,
    "language": LanguageConfig,
    "unified": UnifiedConfig,
}


def models(config: Any) -> dict[str, Any]:
    """The config's model sections as the dataclasses that the models take."""
    return {name: SECTIONS[name](**dict(section)) for name, section in config.model.items() if name in SECTIONS}
