"""What every objective offers to `train.py`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax import optim
from unimm_jax.models.conditioner import ConditionerConfig
from unimm_jax.models.contrastive import TextTowerConfig
from unimm_jax.models.denoiser import UNetConfig
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.pixel_decoder import PixelDecoderConfig
from unimm_jax.models.tokenizer import TokenizerConfig
from unimm_jax.models.unified import UnifiedConfig
from unimm_jax.models.vae import VAEConfig
from unimm_jax.models.vit import ViTConfig
from unimm_jax.sharding import flatten

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
      data: the stage's input (`data.pipeline.Input`). make: builds the model from `nnx.Rngs`.
    """

    moved: frozenset[str] = frozenset()  # paths of parameters that the loss itself moves (`Aux.updates`)

    def __init__(self, config: Any, data: Any, make: Callable[[nnx.Rngs], nnx.Module]):
        self.config, self.data = config, data
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

    def amounts(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """What a host batch holds, for speeds: examples, images, in language stages tokens."""
        return {"examples": len(batch["images"]), "images": len(batch["images"])}

    def trained_parts(self) -> set[str]:
        """First names of the parameters that the config trains ("language", "merger", ...)."""
        paths = [path for path, _ in flatten(jax.eval_shape(self.init, jax.random.key(0)))]
        values = optim.match_rules(paths, [(pattern, value) for pattern, value in self.config.optimizer.rules])
        return {path.split("/")[0] for path in paths if values[path] is not None}

    def step_flops(self, batch: Batch) -> float:
        """Floating-point operations of a step's matrix products and convolutions, recomputation left out.

        Counted in the program of loss and gradient; objectives with a formula of their own say so.

        Args:
          batch: abstract arrays.
        """
        rules = [(pattern, value) for pattern, value in self.config.optimizer.rules]
        plain = self.config.copy_and_resolve_references()
        for section in (*plain.model.values(), plain.get("loss", {})):
            if "remat" in section:
                section.remat = "none"
        kind: Any = type(self)
        objective = kind(plain, self.data)
        trained, frozen, _ = optim.split(jax.eval_shape(objective.init, jax.random.key(0)), rules)
        loss = lambda t, f, b: objective.loss(optim.join(t, f), b, jax.random.key(0), jnp.asarray(0))[0]
        return count_flops(jax.make_jaxpr(jax.grad(loss))(trained, frozen, batch).jaxpr)

    @functools.cached_property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(self.abstract, nnx.Param)))


def count_flops(jaxpr: Any) -> float:
    """Floating-point operations of all matrix products and convolutions of a program, loops as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shared = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * shared
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            each = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # all axes but the output's channels
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * each
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * count_flops(inner)
    return total


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
