"""Reads published JSON configs (`config.json`, `preprocessor_config.json`), which may come from strangers."""

import json
import math
import pathlib
from typing import Any

from unimm_jax.errors import UnsupportedConfigError, WeightsFileError

MAX_INTEGER = 2**24  # above every size of a published model


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      WeightsFileError: no such file, or one that does not hold a JSON object in UTF-8.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsFileError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise WeightsFileError(f"{file} is not JSON: it is not UTF-8 text") from None
    except RecursionError:
        raise WeightsFileError(f"{file} is not a config: its JSON is nested too deeply") from None
    except ValueError as error:
        raise WeightsFileError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise WeightsFileError(f"{file} is not a config: it holds a {type(found).__name__} instead of a JSON object")
    return found


def read_config(source: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a directory of weights, or beside a file of weights.

    Raises:
      WeightsFileError: there is none, or it cannot be read.
    """
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not source.exists():
        raise WeightsFileError(f"there is no file or directory {source}")
    if not file.exists():
        raise WeightsFileError(f"there is no {file}; the architecture is read from it")
    return read_json(file)


class Settings:
    """Typed access to a published config: values of a wrong type or out of range are errors that name the setting.

    Args (constructor):
      found: the config. defaults: values of settings that the config leaves out.
    """

    def __init__(self, found: dict[str, Any], defaults: dict[str, Any] | None = None):
        # null means "default" in published configs
        self.values = (defaults or {}) | {name: value for name, value in found.items() if value is not None}

    def get(self, name: str, default: Any = None) -> Any:
        """A setting of any type."""
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None, most: int = MAX_INTEGER) -> int:
        """A positive integer."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise UnsupportedConfigError(f"config.json: {name} is {value!r}; an integer from 1 to {most} is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._required(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UnsupportedConfigError(f"config.json: {name} is {value!r}; a positive number is needed")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise UnsupportedConfigError(f"config.json: {name} is {value!r}; true or false is needed")
        return value

    def integers(self, name: str, default: Any = None) -> int | tuple[int, ...]:
        """A positive integer, or a list of them."""
        value = self._required(name, default)
        if not isinstance(value, list | tuple):
            return self.integer(name, default)
        return tuple(Settings({name: item}).integer(name) for item in value)

    def section(self, name: str) -> dict[str, Any]:
        """A nested object; empty if there is none."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise UnsupportedConfigError(f"config.json: {name} is {value!r}; an object is needed")
        return value

    def _required(self, name: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is None:
            raise UnsupportedConfigError(f"config.json has no {name}")
        return value
