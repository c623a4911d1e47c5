"""Counts floating-point operations of a program."""

import math
from typing import Any


def count_flops(jaxpr: Any) -> float:
    """Floating-point operations of all matrix products and convolutions of a program; loops count each iteration.

    Args:
      jaxpr: a `jax.core.Jaxpr`.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shared = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * shared
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # all axes but the output channels
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * count_flops(inner)
    return total
