"""What the generated sources share: records that are a function of a few options and the index. Nothing is stored."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Self

from unimm_jax.data.outlines import Record
from unimm_jax.data.sources.base import SPLITS
from unimm_jax.errors import DataError

POSITIVE = ("count", "size", "turns")  # options that are at least 1


@dataclasses.dataclass(eq=False)
class GeneratedSource:
    """Base class. Subclasses are dataclasses whose fields are their options; they implement `__getitem__`.

    The order of the fields is that of the values in the fingerprint, so new options are added at the end.

    Attributes:
      format: name of the source in descriptions. evaluator: see `Source`.
      version: incremented when the same arguments give other scenes, images or texts.
      split: "train" or "test". count: number of records. seed: data set seed.
    """

    splits: ClassVar[tuple[str, ...]] = SPLITS
    format: ClassVar[str]
    evaluator: ClassVar[str]
    version: ClassVar[int] = 1

    split: str = "train"
    count: int = 6000
    seed: int = 0

    def __post_init__(self) -> None:
        self.name = f"{self.format}:{self.split}"

    @classmethod
    def open(cls, options: str, split: str) -> Self:
        """Opens a source from options such as "count=2000,seed=1"; all are optional.

        Raises:
          DataError: unknown option, a value that is not a number, or one out of range.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "split"]
        known: dict[str, Callable[[str], int | float]] = {name: type(getattr(cls, name)) for name in names}
        found: dict[str, int | float] = {}
        for item in filter(None, options.split(",")):
            name, _, value = item.partition("=")
            if name not in known:
                raise DataError(f"{cls.format} has no option {name!r}; it has {', '.join(known)}")
            try:
                found[name] = known[name](value)
            except ValueError:
                raise DataError(f"{cls.format} option {name}={value!r} is not a number") from None
            if name in POSITIVE and found[name] < 1:
                raise DataError(f"{cls.format} option {name}={value} must be at least 1")
            if name == "scale" and not 0 < found[name] <= 1:
                raise DataError(f"{cls.format} option scale={value} must be above 0 and at most 1")
            if name == "seed" and found[name] < 0:
                raise DataError(f"{cls.format} option seed={value} must not be negative")
        return cls(split, **found)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """See `Source.__getitem__`."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"{self.name}/{index}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return " ".join([self.format, f"v{self.version}", *map(str, values)])
