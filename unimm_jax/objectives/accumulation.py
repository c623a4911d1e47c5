"""The loss of a batch, and its gradient, computed over micro-batches one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.models.partitioning import constrain
from unimm_jax.objectives.base import Aux

Tree = Any


def key_of_part(key: jax.Array, number: Any, parts: int) -> jax.Array:
    """The random key of a micro-batch: each of several has its own noise."""
    return key if parts == 1 else jax.random.fold_in(key, number)


def value_and_grad(loss: Callable[[Tree, Any, Any], Any], params: Tree, batch: Any, parts: int) -> Any:
    """`jax.value_and_grad(loss, has_aux=True)(params, batch, 0)`, with the activations of one micro-batch in memory.

    The loss of the batch must be the mean of the losses of its micro-batches, weighted by `Aux.weight`; a metric is the
    mean weighted by its entry in `Aux.metric_weights`, or by `Aux.weight`. Sums are float32.

    Args:
      loss: (params, micro-batch, number of the micro-batch) → (loss, `Aux` without updates).
      batch: arrays with the same leading size, a multiple of `parts` times the devices of the batch axis.
      parts: number of micro-batches. A micro-batch takes every `parts`-th row, so no row moves between devices.

    Returns:
      ((loss, aux), gradient).
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, batch, 0)

    def one(micro: Any, number: Any) -> tuple[Any, Tree]:
        (value, aux), grads = gradient(params, micro, number)
        return _weighted(value, aux), jax.tree.map(lambda g: g.astype(jnp.float32) * aux.weight, grads)

    found, grads = _sum_over_parts(one, batch, parts)
    (_, weight), _ = found
    grads = jax.tree.map(lambda g, p: _mean(g, weight).astype(p.dtype), grads, params)
    return _means(found), grads


def mean_loss(loss: Callable[[Tree, Any, Any], Any], params: Tree, batch: Any, parts: int) -> Any:
    """(loss, aux) of `value_and_grad`, without the gradient."""
    if parts == 1:
        return loss(params, batch, 0)
    return _means(_sum_over_parts(lambda micro, number: _weighted(*loss(params, micro, number)), batch, parts))


def _weighted(value: jax.Array, aux: Aux) -> Any:
    """The loss times its weight, with the weight; and the same for each metric, by name."""
    weights = {name: aux.metric_weights.get(name, aux.weight) for name in aux.metrics}
    metrics = {name: (x * weights[name], weights[name]) for name, x in aux.metrics.items()}
    return (value * aux.weight, aux.weight), metrics


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.maximum(weight, 1e-6)


def _means(sums: Any) -> tuple[jax.Array, Aux]:
    """(loss, aux) from sums of `_weighted`."""
    (total, weight), metrics = sums
    return _mean(total, weight), Aux({name: _mean(*pair) for name, pair in metrics.items()}, weight=weight)


def _sum_over_parts(one: Callable[[Any, Any], Tree], batch: Any, parts: int) -> Tree:
    """The sum of a function of (micro-batch, its number), float32."""

    def split(x: jax.Array) -> jax.Array:
        rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(rows, None, "batch", *[None] * (x.ndim - 1))

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    numbers = jnp.arange(parts)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(one, first, numbers[0]))

    def add(total: Any, numbered: tuple[Any, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*numbered)), None

    total, _ = jax.lax.scan(add, zero, (micro_batches, numbers))
    return total
