"""The training loss on the held-out split of the stage's own data."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from unimm_jax import distributed, sharding
from unimm_jax.config import ranged
from unimm_jax.errors import DamagedRecordsError, DataError
from unimm_jax.evals.base import Context, Evaluator, Options, Result
from unimm_jax.objectives import accumulation
from unimm_jax.objectives.base import Tree


@dataclasses.dataclass(frozen=True)
class HeldOutLossOptions(Options):
    """Options.

    Attributes:
      batches: number of batches.
      batch_size: examples (or images, or tokens) of a batch; 0 is the batch size of training.
    """

    every: int = ranged(1000, low=0)
    batches: int = ranged(4, low=1)
    batch_size: int = ranged(0, low=0)


class HeldOutLoss(Evaluator):
    """Mean loss and metrics over the same batches and the same noise at every call.

    The batches are the first ones of the held-out split under the config's seed. As in training, a batch is computed in
    `config.train.micro_batches` parts; images whose number this does not divide, in as many as divide both. Without a
    held-out split there are no scores.
    """

    options = HeldOutLossOptions

    def __init__(self, options: HeldOutLossOptions):
        super().__init__(options)
        self._batches: list[tuple[int, dict[str, np.ndarray]]] | None = None  # (rows, batch), in host memory
        self._loss: Any = None

    def run(self, context: Context) -> Result:
        """See `Evaluator.run`."""
        if self._batches is None:
            self._open(context)
        assert self._batches is not None
        found: dict[str, list[float]] = {}
        step = jax.numpy.asarray(context.config.train.steps, jax.numpy.int32)
        for index, (size, rows) in enumerate(self._batches):
            batch = sharding.put_batch(rows, context.mesh, size)
            loss, metrics = self._loss(context.params, batch, index, step)
            for name, value in ({"loss": loss} | metrics).items():
                found.setdefault(name, []).append(float(value))
        return Result({name: float(np.mean(values)) for name, values in found.items()})

    def _open(self, context: Context) -> None:
        config = context.config
        changed = dict(batch_size=self.settings.batch_size or config.train.batch_size, steps=self.settings.batches)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changed))
        try:
            data = type(context.objective).open_input(config, context.text_tokenizer, "test")
        except DamagedRecordsError:
            raise
        except DataError as error:
            data, reason = None, str(error)
        there = [answer == b"yes" for answer in distributed.gather(b"no" if data is None else b"yes")]
        if data is None and not any(there):
            print(f"{config.name}: no held-out loss ({reason})", flush=True)
            self._batches = []
            return
        if data is None or not all(there):
            without = [number for number, is_there in enumerate(there) if not is_there]
            raise DataError(f"the held-out data are missing on processes {without} only; make the paths equal")
        share, ways = functools.partial(sharding.local_rows, context.mesh), sharding.batch_ways(context.mesh)
        multiple = ways * config.train.micro_batches  # packed rows are padded to it, as in training
        self._batches = [
            (data.size(index, multiple), data.batch(index, share, multiple)) for index in range(self.settings.batches)
        ]
        objective = context.objective

        def loss(params: Tree, batch: Any, index: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            parts = math.gcd(next(iter(batch.values())).shape[0] // ways, config.train.micro_batches)

            def of_part(params: Tree, rows: Any, part: Any) -> Any:
                return objective.loss(params, rows, accumulation.key_of_part(key, part, parts), step)

            key = jax.random.fold_in(jax.random.key(config.seed), index)
            value, aux = accumulation.mean_loss(of_part, params, batch, parts)
            return value, aux.metrics

        replicated = jax.sharding.NamedSharding(context.mesh, jax.sharding.PartitionSpec())
        self._loss = jax.jit(loss, out_shardings=replicated)
