"""What an import reads: tables of names with their sources, checked as a whole before anything is read."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from unimm_jax import progress, sharding
from unimm_jax.errors import WeightMismatchError
from unimm_jax.interop.files import Tensors
from unimm_jax.interop.table import Entry, Shape, compare, foreign_shapes, to_ours
from unimm_jax.models.keys import Keys


class Parts(nnx.Module):
    """Modules side by side, each under its own name.

    Args (constructor):
      makers: name → what builds the module.
    """

    def __init__(self, *, rngs: Keys, **makers: Callable[..., nnx.Module]):
        for name, make in makers.items():
            setattr(self, name, make(rngs=rngs))


def _nothing(_: str) -> bool:
    return False


def _itself(name: str) -> str:
    return name


class Importer:
    """Collects what is to be read, checks all of it, and reads it onto a mesh. Has the interface of `Stored`.

    Args (constructor):
      make: builds the module whose parameters are imported.

    Attributes:
      shapes: path → shape. shardings: path → sharding over all devices. problems: what does not fit, see `read`.
    """

    def __init__(self, make: Callable[..., nnx.Module]):
        abstract = nnx.eval_shape(lambda: make(rngs=Keys(params=0)))
        mesh = sharding.make_mesh((1, -1, 1))
        self.shardings = dict(sharding.flatten(sharding.param_shardings(abstract, mesh)))
        state = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
        self.shapes: dict[str, Shape] = {path: tuple(leaf.shape) for path, leaf in sharding.flatten(state)}
        self.problems: list[str] = []
        self._reads: list[tuple[Entry, Callable[[str], np.ndarray]]] = []
        self._makes: dict[str, Callable[[], np.ndarray]] = {}

    def add(
        self,
        table: list[Entry],
        source: Tensors,
        unused: Callable[[str], bool] = _nothing,
        rename: Callable[[str], str] = _itself,
    ) -> None:
        """Plans to read a table from a source. Names and shapes that do not fit are collected in `problems`.

        Args:
          unused: whether a tensor may be left out. rename: a source's own name → the table's.
        """
        names = {rename(name): name for name in source.shapes}
        present = {new: source.shapes[old] for new, old in names.items()}
        try:
            compare(foreign_shapes(table, self.shapes), present, unused)
        except WeightMismatchError as error:
            where = ", ".join(f.name for f in source.files[:3])
            self.problems.append(f"{where}: {error}")

        def read(name: str) -> np.ndarray:
            return source[names[name]]

        self._reads += [(entry, read) for entry in table]

    def make(self, path: str, value: Callable[[], np.ndarray]) -> None:
        """Plans a parameter that no file holds."""
        self._makes[path] = value

    def check(self) -> None:
        """Checks that everything fits and every parameter has a source.

        Raises:
          WeightMismatchError: lists all problems.
        """
        given = {entry.ours for entry, _ in self._reads} | set(self._makes)
        missing = [path for path in self.shapes if path not in given]
        problems = [*self.problems, *(["no tensor for " + ", ".join(missing)] if missing else [])]
        if problems:
            raise WeightMismatchError("nothing was read:\n" + "\n".join(problems))

    def load(self) -> dict[str, Any]:
        """All parameters as a nested dict, over all devices; see `read`."""
        return sharding.unflatten(dict(self.read(self.shardings)))

    def read(self, shardings: dict[str, Any]) -> Iterator[tuple[str, jax.Array]]:
        """Pairs of path and array for the paths given, each on its sharding, in the dtype of the file.

        Raises:
          WeightMismatchError: see `check`.
        """
        self.check()
        total = sum(int(np.prod(self.shapes[path])) for path in shardings)
        done, began, printed = 0, time.perf_counter(), time.perf_counter()
        for entry, read in self._reads:
            if entry.ours not in shardings:
                continue
            array = to_ours(entry, read, self.shapes[entry.ours])
            yield entry.ours, _put(array, shardings[entry.ours])
            done += array.size
            if time.perf_counter() - printed > 5:
                printed = time.perf_counter()
                left = (total - done) / max(done, 1) * (printed - began)
                print(
                    f"import  {done / 1e6:.0f} of {total / 1e6:.0f} million parameters  ETA {progress.duration(left)}",
                    flush=True,
                )
        for path, value in self._makes.items():
            if path in shardings:
                yield path, _put(value(), shardings[path])


class Part(NamedTuple):
    """One part of an import: what reads it, and its model sections (name → config dataclass)."""

    importer: Importer
    model: dict[str, Any]


# name of a part → part; sources with one part name it ""
ImportPlan = dict[str, Part]


def _put(array: np.ndarray, where: Any) -> jax.Array:
    return jax.block_until_ready(jax.make_array_from_callback(array.shape, where, array.__getitem__))


def init_rows_from_text(importer: Importer, name: str, used: int, source: Tensors, tensor: str) -> None:
    """Plans new visual rows: normal, with mean and standard deviation of the text rows, in their dtype.

    Args:
      name: "embed_visual" or "head_visual". used: rows that are not padding. tensor: name of the text rows in `source`.
    """
    path = f"language/{name}"
    shape = importer.shapes[path]

    def make() -> np.ndarray:
        table = source[tensor]
        sample = table[:: max(len(table) // 4096, 1)].astype(np.float32)
        rng = np.random.default_rng([0, len(path)])
        rows = rng.normal(sample.mean(), sample.std(), shape).astype(np.float32)
        rows[used:] = 0
        return rows.astype(table.dtype)

    importer.make(path, make)
