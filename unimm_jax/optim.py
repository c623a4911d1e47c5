"""Optimisers: who trains (by regex, every parameter matched exactly once), at what rate, on what schedule."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unimm_jax.sharding import flatten, unflatten

Tree = Any


def match_rules(paths: list[str], rules: list[tuple[str, Any]]) -> dict[str, Any]:
    """path → the value of the one rule whose regex matches it from the start to the end.

    Raises:
      ValueError: lists every path that no rule or more than one rule matches, and every rule that matches nothing.
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
        raise ValueError("config.optimizer.rules:\n  " + "\n  ".join(problems))
    return found


def split(params: Tree, rules: list[tuple[str, float | None]]) -> tuple[Tree, Tree, dict[str, float]]:
    """(trained, frozen, path → rate multiplier). A rule's value is the multiplier of the rate, or None for frozen."""
    flat = dict(flatten(params))
    values = match_rules(list(flat), rules)
    trained = {p: leaf for p, leaf in flat.items() if values[p] is not None}
    frozen = {p: leaf for p, leaf in flat.items() if values[p] is None}
    return unflatten(trained), unflatten(frozen), {p: v for p, v in values.items() if v is not None}


def join(a: Tree, b: Tree) -> Tree:
    """Two disjoint parameter trees as one."""
    return unflatten(dict(flatten(a)) | dict(flatten(b)))


def schedule(c: Any, steps: int, rate: float) -> optax.Schedule:
    """Linear warm-up over `c.warmup` (a share of the steps), then cosine to `c.end` of the peak, or constant."""
    warmup = max(int(steps * c.warmup), 1)
    if c.schedule == "constant":
        return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)], [warmup])
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1), end_value=rate * c.end)


def _is_matrix(path: str, leaf: Any) -> bool:
    """Whether Muon takes a parameter: kernels of linear layers, stacked or not; no embeddings, heads, convolutions."""
    return path.endswith("kernel") and not re.search(r"patch_embed|pixel_head|/out/|conv", path) and leaf.ndim >= 2


def make(c: Any, steps: int, trained: Tree, multipliers: dict[str, float]) -> optax.GradientTransformation:
    """The optimiser of a config's `optimizer` section over the trained parameters.

    "adamw" everywhere, or "muon" on the kernels of linear layers with AdamW for the rest. Weight decay is on kernels
    only. Gradients are clipped by their global norm first.
    """
    labels = {}
    for path, leaf in flatten(trained):
        kind = "muon" if c.name == "muon" and _is_matrix(path, leaf) else "adamw"
        labels[path] = f"{kind} {multipliers[path]:g}"
    groups = {}
    for label in set(labels.values()):
        kind, multiplier = label.split()
        rate = (c.muon_rate if kind == "muon" else c.rate) * float(multiplier)
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
        optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(),
        optax.transforms.partition(groups, unflatten(labels)),
    )


def _decays(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", tree)


def _matrix_axes(tree: Tree) -> Tree:
    """Which axes of a kernel are its input and output: attention's [D, N, H] and [N, H, D], linear's [D, F]; a leading
    axis on top is the stack of layers."""

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
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.asarray(0.0)))
