"""Optimizers, learning-rate schedules, and the rules that select trained parameters by regex."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unimm_jax.config import OptimizerConfig
from unimm_jax.errors import ConfigError
from unimm_jax.sharding import flatten, unflatten

Tree = Any


def match_rules(paths: list[str], rules: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Path → value of the rule whose regex matches the whole path.

    Args:
      paths: parameter paths, "a/b/c".
      rules: pairs (regex, value).

    Raises:
      ConfigError: lists every path that no rule or several rules match, and every rule that matches no path.
    """
    problems, found, used = [], {}, set()
    for path in paths:
        hits = [i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, path)]
        used.update(hits)
        if len(hits) == 1:
            found[path] = rules[hits[0]][1]
        elif not hits:
            problems.append(f"no rule matches {path}")
        else:
            problems.append(f"{len(hits)} rules match {path}: {[rules[i][0] for i in hits]}")
    problems += [f"rule {p!r} matches no parameter" for i, (p, _) in enumerate(rules) if i not in used]
    if problems:
        raise ConfigError("config.optimizer.rules:\n  " + "\n  ".join(problems))
    return found


def split(params: Tree, rules: Sequence[tuple[str, float | None]]) -> tuple[Tree, Tree, dict[str, float]]:
    """Splits parameters into (trained, frozen, path → learning-rate multiplier of the trained ones).

    Args:
      params: nested dict of parameters.
      rules: pairs (regex, multiplier of the learning rate, or None for frozen).

    Raises:
      ConfigError: see `match_rules`.
    """
    flat = dict(flatten(params))
    values = match_rules(list(flat), rules)
    trained = {p: leaf for p, leaf in flat.items() if values[p] is not None}
    frozen = {p: leaf for p, leaf in flat.items() if values[p] is None}
    return unflatten(trained), unflatten(frozen), {p: v for p, v in values.items() if v is not None}


def join(a: Tree, b: Tree) -> Tree:
    """Merges two disjoint parameter trees; the inverse of `split`."""
    return unflatten(dict(flatten(a)) | dict(flatten(b)))


def schedule(c: OptimizerConfig, steps: int, rate: float) -> optax.Schedule:
    """Linear warmup over the share `c.warmup` of the steps, then cosine decay to `c.end` of the peak, or constant.

    Args:
      steps: number of steps of the run.
      rate: peak learning rate.
    """
    warmup = max(int(steps * c.warmup), 1)
    if c.schedule == "constant":
        return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)], [warmup])
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1), end_value=rate * c.end)


def _is_matrix(path: str, leaf: Any) -> bool:
    """Whether Muon updates a parameter: kernels of linear layers; no embeddings, output heads or convolutions."""
    return path.endswith("kernel") and not re.search(r"patch_embed|pixel_head|/out/|conv", path) and leaf.ndim >= 2


def make(c: OptimizerConfig, steps: int, trained: Tree, multipliers: dict[str, float]) -> optax.GradientTransformation:
    """The optimizer that a config's `optimizer` section describes.

    AdamW for all parameters, or Muon for kernels of linear layers and AdamW for the rest. Gradients are clipped by
    global norm first. Weight decay applies to kernels only.

    Args:
      steps: number of steps of the run.
      trained, multipliers: from `split`.
    """
    labels = {}
    for path, leaf in flatten(trained):
        kind = "muon" if c.name == "muon" and _is_matrix(path, leaf) else "adamw"
        labels[path] = f"{kind} {multipliers[path]:g}"
    groups = {}
    for label in set(labels.values()):
        kind, multiplier = label.split()
        rate = (c.muon_learning_rate if kind == "muon" else c.learning_rate) * float(multiplier)
        rate_of_step = schedule(c, steps, rate)
        if kind == "muon":
            groups[label] = optax.contrib.muon(
                rate_of_step,
                weight_decay=c.weight_decay,
                muon_weight_dimension_numbers=_matrix_axes,
                consistent_rms=0.2,
            )
        else:
            groups[label] = optax.adamw(
                rate_of_step, c.beta1, c.beta2, c.eps, weight_decay=c.weight_decay, mask=_decays
            )
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        optax.transforms.partition(groups, unflatten(labels)),
    )


def _decays(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", tree)


def _matrix_axes(tree: Tree) -> Tree:
    """Input and output axes of kernels, for Muon.

    Kernels are [D, N, H] and [N, H, D] in attention, else [D, F]; an additional leading axis is the stack of layers.
    """

    def axes(path: tuple, leaf: Any) -> Any:
        if not hasattr(leaf, "ndim"):
            return None
        name = str(getattr(path[-2], "key", ""))
        body = 3 if name in ("q", "k", "v", "o", "to_q", "to_k", "to_v", "to_out") else 2
        first = leaf.ndim - body
        if body == 2:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=first + 1)
        if name in ("o", "to_out"):
            return optax.contrib.MuonDimensionNumbers(reduction_axis=(first, first + 1), output_axis=first + 2)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=(first + 1, first + 2))

    return jax.tree_util.tree_map_with_path(axes, tree, is_leaf=lambda x: x is None)


def global_norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves, float32 scalar."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.asarray(0.0)))
