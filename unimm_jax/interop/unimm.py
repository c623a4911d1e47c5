"""The exported model's own PyTorch names (`modeling_unimm.py`): the parameter tree's paths, layer by layer."""

import re
from collections.abc import Mapping

from unimm_jax.interop.table import Entry, Shape

_STACK = re.compile(r"(blocks)/(?!\d)")


def table(shapes: Mapping[str, Shape]) -> list[Entry]:
    """Names of all given parameters: "a/blocks/q/kernel" of L layers is "a.blocks.{}.q.weight"."""
    found = []
    for path, shape in shapes.items():
        layers = shape[0] if _STACK.search(path) else 0
        own = len(shape) - bool(layers)
        name = re.sub(r"(kernel|scale)$", "weight", _STACK.sub(r"\1.{}/", path)).replace("/", ".")
        transform = "same"
        if path.endswith("kernel"):
            merges = re.search(r"/(o|to_out)/kernel$", path) is not None
            transform = {2: "linear", 3: "output" if merges else "heads", 4: "conv"}[own]
        elif path.endswith("bias") and own == 2:
            transform = "heads_bias"
        found.append(Entry(path, name, transform, layers))
    return found
