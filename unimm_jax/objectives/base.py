"""The interface of objectives, used by `train.py`, `compile/fit.py` and the evaluators."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax import optim
from unimm_jax.compile.flops import count_flops
from unimm_jax.config import Config
from unimm_jax.data.pipeline import Input
from unimm_jax.models.keys import Keys
from unimm_jax.sharding import flatten
from unimm_jax.text_tokenizer import TextTokenizer

Tree = Any
Batch = dict[str, Any]
BatchSpec = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclasses.dataclass
class Aux:
    """Auxiliary outputs of a loss.

    Attributes:
      metrics: name → scalar.
      updates: path → new value of a parameter in `Objective.non_gradient_params`.
      weight: of this loss in the mean over micro-batches. metric_weights: the same for metrics where it differs.
    """

    metrics: dict[str, jax.Array]
    updates: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    weight: Any = 1.0
    metric_weights: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Aux, ["metrics", "updates", "weight", "metric_weights"], [])


@dataclasses.dataclass(frozen=True)
class NoLossConfig:
    """Loss section of an objective without settings."""


class Objective:
    """Base class of objectives. The model is split into its graph definition and a nested dict of parameters.

    Attributes:
      sections: model sections that a config must have: name → config dataclass.
      optional_sections: model sections that a config may have.
      data_config, loss_config: dataclasses of the config's data and loss sections.
      non_gradient_params: paths of parameters that the loss updates (`Aux.updates`) instead of the optimizer.
      accumulates: whether the loss is a weighted mean over the rows of a batch, so that gradients can be accumulated
        over micro-batches (`accumulation.py`).
      dtype: dtype of activations.
      abstract: the model with abstract parameters.

    Args (constructor):
      config: the stage's config.
      data: the stage's input.
      make: builds the model from `Keys`.
    """

    sections: ClassVar[dict[str, type]] = {}
    optional_sections: ClassVar[dict[str, type]] = {}
    data_config: ClassVar[type]
    loss_config: ClassVar[type] = NoLossConfig
    non_gradient_params: ClassVar[frozenset[str]] = frozenset()
    accumulates: ClassVar[bool] = False

    def __init__(self, config: Config, data: Input, make: Callable[[Keys], nnx.Module]):
        self.config, self.data = config, data
        self.make = make
        self.dtype = jnp.dtype(config.dtype)
        self.abstract = nnx.eval_shape(lambda: make(Keys(params=0)))
        self.graph = nnx.graphdef(self.abstract)

    # ---- Config and input ----------------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """One message per wrong setting, for checks that are specific to the objective."""
        del config
        return []

    @classmethod
    def open_input(cls, config: Config, text_tokenizer: TextTokenizer | None = None, split: str = "train") -> Input:
        """Opens the stage's data.

        Args:
          text_tokenizer: the text tokenizer of a checkpoint, used instead of training a new one.
          split: "train" or "test" (held out).

        Raises:
          ConfigError: no source is named.
          DataError: sources or records are missing or unusable.
        """
        raise NotImplementedError

    @classmethod
    def abstract_input(cls, config: Config, text_rows: int = 32_000, codes: int = 16_384) -> Input:
        """An input without data, for compilation and memory checks.

        Args:
          text_rows, codes: vocabulary sizes; the defaults are published ones (LLaMA, LaVIT).
        """
        raise NotImplementedError

    @classmethod
    def batch_spec(cls, config: Config, rows: int = 0) -> BatchSpec:
        """Name → (shape, dtype) of every array of a global batch of `rows` rows; 0 is `batch_rows(config)`."""
        raise NotImplementedError

    @classmethod
    def batch_rows(cls, config: Config, multiple: int = 1) -> int:
        """Number of rows of a global batch, without looking at data; an estimate if rows hold several examples.

        Args:
          multiple: packed rows are padded to a multiple of it.
        """
        del multiple
        return config.train.batch_size

    # ---- Parameters and loss -------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> Tree:
        """Initialized parameters, float32, as a nested dict."""
        return nnx.to_pure_dict(nnx.state(self.make(Keys(params=key)), nnx.Param))

    def module(self, params: Tree) -> Any:
        """The model with the given parameters."""
        return nnx.merge(self.graph, params)

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """Loss of a batch, a float32 scalar, with auxiliary outputs.

        Args:
          params: nested dict of parameters.
          batch: arrays as in `batch_spec`.
          key: random key of the step.
          step: step number, int32 scalar.
        """
        raise NotImplementedError

    def prepare(self, params: Tree, batches: Iterator[Batch]) -> Tree:
        """Prepares the parameters of a new run before its first step (k-means for codebooks); by default the identity.

        Args:
          batches: batches from the start of the data.
        """
        del batches
        return params

    def visualize(self, params: Tree, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Images for inspection: name → uint8 [H, W, 3], computed from a host batch."""
        del params, batch
        return {}

    def warnings(self, step: int, metrics: dict[str, float]) -> dict[str, str]:
        """What the logged metrics show to be wrong: name → one line with the cause and the remedy.

        The training loop calls it at each log line and prints each name once.

        Args:
          step: number of completed steps. metrics: means over the steps since the last log line.
        """
        del step, metrics
        return {}

    # ---- Accounting ----------------------------------------------------------------------------------------------

    def trained_parts(self) -> set[str]:
        """First path components of all trained parameters ("language", "merger", ...)."""
        paths = [path for path, _ in flatten(jax.eval_shape(self.init, jax.random.key(0)))]
        values = optim.match_rules(paths, list(self.config.optimizer.rules))
        return {path.split("/")[0] for path in paths if values[path] is not None}

    def step_flops(self, batch: Batch) -> float:
        """Floating-point operations of the matrix products and convolutions of a step, without recomputation.

        Counted in the jaxpr of the gradient of the loss; objectives with their own formula override this method.

        Args:
          batch: abstract arrays.
        """
        rules = list(self.config.optimizer.rules)
        plain = dataclasses.replace(
            self.config,
            model={name: _without_remat(section) for name, section in self.config.model.items()},
            loss=_without_remat(self.config.loss),
        )
        kind: Any = type(self)
        objective = kind(plain, self.data)
        trained, frozen, _ = optim.split(jax.eval_shape(objective.init, jax.random.key(0)), rules)

        def loss(trained: Tree, frozen: Tree, batch: Batch) -> jax.Array:
            return objective.loss(optim.join(trained, frozen), batch, jax.random.key(0), jnp.asarray(0))[0]

        return count_flops(jax.make_jaxpr(jax.grad(loss))(trained, frozen, batch).jaxpr)


def _without_remat(section: Any) -> Any:
    """The config section with `remat` set to "none", if it has that setting."""
    has_remat = any(field.name == "remat" for field in dataclasses.fields(section))
    return dataclasses.replace(section, remat="none") if has_remat else section


def image_spec(config: Config, rows: int = 0, size: int = 0) -> BatchSpec:
    """Batch spec of images uint8 [B, S, S, 3]; B is `rows` or the batch size, S `size` or `config.data.image_size`."""
    size = size or config.data.image_size
    return {"images": ((rows or config.train.batch_size, size, size, 3), np.dtype(np.uint8))}
