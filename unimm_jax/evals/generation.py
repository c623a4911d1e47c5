"""What the evaluators that generate images and text share: a generator that is built once and follows the training."""

import dataclasses
from typing import Any, ClassVar

import jax

from unimm_jax.config import Config
from unimm_jax.errors import CheckpointError
from unimm_jax.evals.base import Context, Evaluator, Result
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import LoadedTokenizer, Model, load_companions

Companions = tuple[LoadedTokenizer, dict[str, tuple[Any, Any]]]
EVALUATION_SEED = 1000  # of test scenes, prompts and sampling; the same for every model
BATCH = 64  # images, prompts or questions at a time


class GeneratingEvaluator(Evaluator):
    """Base class. Subclasses implement `score`.

    The companions of the model (image tokenizer, decoders) are read and the generator is compiled at the first call;
    later calls exchange the parameters only.

    Attributes:
      answer_length: maximum number of tokens per answer.
    """

    answer_length: ClassVar[int] = 40

    def __init__(self, options: Any):
        super().__init__(options)
        self._generator: Generator | None = None
        self._said = False

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """See `Evaluator.check`."""
        if config.objective == "language_modeling" and config.data.images_per_row:
            return []
        return [f"it needs a language model that reads images (stage 1, 2 or 3); {config.name} has none"]

    def run(self, context: Context) -> Result:
        """See `Evaluator.run`. With several processes there are no scores."""
        if jax.process_count() > 1:
            if not self._said and jax.process_index() == 0:
                name = type(self).__name__
                print(f"{context.config.name}: {name} runs in a single process only; no scores", flush=True)
            self._said = True
            return Result({})
        return self.score(self._generator_of(context), context)

    def score(self, generator: Generator, context: Context) -> Result:
        """Evaluates the model of a generator."""
        raise NotImplementedError

    def can_draw(self, generator: Generator, context: Context, what: str) -> bool:
        """Whether a decoder is beside the model; if not, says once that `what` is not scored."""
        if not generator.decoders and not self._said:
            self._said = True
            print(f"{context.config.name}: no decoder is beside the model; {what} is not scored", flush=True)
        return bool(generator.decoders)

    def _generator_of(self, context: Context) -> Generator:
        if self._generator is None:
            if context.text_tokenizer is None:
                raise CheckpointError(f"{context.config.name} has no text tokenizer")
            model = Model(
                config=context.config,
                objective=context.objective,
                params=context.params,
                mesh=context.mesh,
                header=context.header,
                text_tokenizer=context.text_tokenizer,
                workdir=context.workdir,
            )
            batch = -(-BATCH // context.mesh.size) * context.mesh.size
            companions = _replicated(load_companions(model), context.mesh)
            self._generator = Generator(model, batch, answer_length=self.answer_length, companions=companions)
        self._generator.params = self._generator.model.params = context.params
        return self._generator


def _replicated(companions: Companions, mesh: jax.sharding.Mesh) -> Companions:
    """The companions with their parameters on every device of the mesh, as programs under `jax.set_mesh` need them."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tokenizer, decoders = companions
    tokenizer = dataclasses.replace(tokenizer, params=jax.device_put(tokenizer.params, sharding))
    return tokenizer, {name: (kind, jax.device_put(params, sharding)) for name, (kind, params) in decoders.items()}
