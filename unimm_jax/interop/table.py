"""Tables of names, used by both import and export.

A table is a list of `Entry`. Each entry says which tensor of a foreign checkpoint is which parameter here, and how the
layout of one becomes that of the other. Import and export share the tables, so they know the same names.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from unimm_jax.errors import WeightMismatchError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter here and its foreign tensor.

    Attributes:
      ours: parameter path.
      theirs: tensor name; "{}" is the layer's number where `layers` is set.
      transform: how the foreign tensor becomes the parameter, a name of `TRANSFORMS`.
      layers: layers stacked on the parameter's first axis; 0 for a parameter that is not stacked.
      part: (index, count) of equal blocks of the tensor's first axis that this parameter is; fused q, k, v.
      rows: (start, stop) of the tensor's first axis that this parameter is; text or visual rows of an embedding.
    """

    ours: str
    theirs: str
    transform: str = "same"
    layers: int = 0
    part: tuple[int, int] = (0, 1)
    rows: tuple[int, int] | None = None

    def names(self) -> list[str]:
        """Names of the foreign tensors of this parameter, in the order of its layers."""
        return [self.theirs.format(i) for i in range(self.layers)] if self.layers else [self.theirs]


class Transform(NamedTuple):
    """How one foreign tensor and one layer's parameter become each other.

    Attributes:
      read: (foreign array, shape of the parameter) → parameter. write: parameter → foreign array.
      shape: shape of the parameter → shape of the foreign tensor.
    """

    read: Callable[[np.ndarray, Shape], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


def _heads_shape(shape: Shape) -> Shape:
    return (shape[1] * shape[2], shape[0])


def _patch_shape(shape: Shape) -> Shape:
    side = round((shape[0] / 3) ** 0.5)
    return (shape[1], 3, side, side)


def _write_patch(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] / 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


TRANSFORMS: dict[str, Transform] = {
    # equal up to axes of length one, which the parameter does not have
    "same": Transform(lambda x, s: x.reshape(s), lambda x: x, lambda s: s),
    "batched": Transform(lambda x, s: x.reshape(s), lambda x: x[None], lambda s: (1, *s)),
    "batched2": Transform(lambda x, s: x.reshape(s), lambda x: x[None, None], lambda s: (1, 1, *s)),
    # [out, in] → [in, out]
    "linear": Transform(lambda x, s: x.T, lambda x: x.T, lambda s: (s[1], s[0])),
    # [N·H, D] → [D, N, H], and its bias [N·H] → [N, H]
    "heads": Transform(lambda x, s: x.T.reshape(s), lambda x: x.reshape(x.shape[0], -1).T, _heads_shape),
    "heads_bias": Transform(lambda x, s: x.reshape(s), lambda x: x.reshape(-1), lambda s: (s[0] * s[1],)),
    # [D, N·H] → [N, H, D]
    "output": Transform(
        lambda x, s: x.T.reshape(s), lambda x: x.reshape(-1, x.shape[-1]).T, lambda s: (s[2], s[0] * s[1])
    ),
    # convolution over patches [D, 3, p, p] → linear layer on patches flattened row by row, channel last [p·p·3, D]
    "patch": Transform(lambda x, s: x.transpose(2, 3, 1, 0).reshape(s), _write_patch, _patch_shape),
    # convolution [out, in, h, w] → [h, w, in, out]
    "conv": Transform(
        lambda x, s: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1), lambda s: (s[3], s[2], s[0], s[1])
    ),
    # 1 × 1 convolution [out, in, 1, 1] → linear layer [in, out]
    "pointwise": Transform(lambda x, s: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None], lambda s: (s[1], s[0], 1, 1)),
}


def foreign_shapes(table: Iterable[Entry], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """name → shape of every tensor that export writes and import reads, for parameters of the given shapes.

    Raises:
      ValueError: an invalid table; parts of a fused tensor differ in shape or leave gaps.
    """
    found: dict[str, Shape] = {}
    pieces: dict[str, list[tuple[Entry, Shape]]] = {}
    for entry in table:
        shape = shapes[entry.ours][1:] if entry.layers else shapes[entry.ours]
        for name in entry.names():
            pieces.setdefault(name, []).append((entry, TRANSFORMS[entry.transform].shape(shape)))
    for name, parts in pieces.items():
        entry, shape = parts[0]
        if entry.rows is not None:
            spans = sorted({e.rows for e, _ in parts if e.rows})
            if any(a[1] != b[0] for a, b in zip(spans, spans[1:], strict=False)) or spans[0][0]:
                raise ValueError(f"the rows of {name} leave gaps: {spans}")
            found[name] = (spans[-1][1], *shape[1:])
        else:
            if {e.part[0] for e, _ in parts} != set(range(entry.part[1])) or len({s for _, s in parts}) > 1:
                raise ValueError(f"the parts of {name} are not complete or not equal")
            found[name] = (shape[0] * entry.part[1], *shape[1:]) if shape else shape
    return found


def compare(expected: Mapping[str, Shape], present: Mapping[str, Shape], ignore: Callable[[str], bool]) -> None:
    """Checks the names and shapes of foreign tensors.

    Args:
      ignore: whether a tensor may be present without being in the table.

    Raises:
      WeightMismatchError: lists every tensor that is missing, unknown or of another shape.
    """
    problems = [f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in present]
    for name, shape in present.items():
        if name not in expected:
            problems += [] if ignore(name) else [f"{name} {list(shape)} is not known"]
        elif tuple(shape) != tuple(expected[name]):
            problems.append(f"{name} is {list(shape)}, the model needs {list(expected[name])}")
    if problems:
        raise WeightMismatchError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))


def layer_of(entry: Entry, array: np.ndarray, shape: Shape) -> np.ndarray:
    """One layer's parameter of `shape` from the foreign tensor; a view where the transform allows."""
    if entry.rows is not None:
        array = array[entry.rows[0] : entry.rows[1]]
        if len(array) < shape[0]:  # rows that only pad the vocabulary
            array = np.concatenate([array, np.zeros((shape[0] - len(array), *array.shape[1:]), array.dtype)])
    elif entry.part[1] > 1:
        size = array.shape[0] // entry.part[1]
        array = array[entry.part[0] * size : (entry.part[0] + 1) * size]
    return TRANSFORMS[entry.transform].read(array, shape)


def to_ours(entry: Entry, read: Callable[[str], np.ndarray], shape: Shape) -> np.ndarray:
    """The whole parameter of an entry, layers stacked.

    Args:
      read: foreign tensor by name.
    """
    if not entry.layers:
        return np.ascontiguousarray(layer_of(entry, read(entry.theirs), shape))
    first = layer_of(entry, read(entry.names()[0]), shape[1:])
    whole = np.empty(shape, first.dtype)
    for index, name in enumerate(entry.names()):
        whole[index] = layer_of(entry, read(name), shape[1:])
    return whole


def to_theirs(table: Iterable[Entry], get: Callable[[str], Any], names: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Yields (foreign name, numpy array) for the given names, assembling fused tensors.

    Args:
      get: parameter by path.
    """
    makers: dict[str, list[tuple[Entry, int | None]]] = {}
    for entry in table:
        for at, name in enumerate(entry.names()):
            makers.setdefault(name, []).append((entry, at if entry.layers else None))
    for name in names:
        parts = sorted(makers[name], key=lambda p: p[0].rows or p[0].part)
        blocks = []
        for entry, index in parts:
            value = get(entry.ours)
            value = np.asarray(value if index is None else value[index])
            if entry.rows is not None:
                value = value[: entry.rows[1] - entry.rows[0]]  # padding rows are not written
            blocks.append(TRANSFORMS[entry.transform].write(value))
        yield name, np.ascontiguousarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks))
