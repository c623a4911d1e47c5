"""Environment variables that hold numbers."""

import os

from unimm_jax.errors import ConfigError


def number(name: str, default: float) -> float:
    """The value of an environment variable, or a default if it is not set or empty.

    Raises:
      ConfigError: it is no number, or below 0.
    """
    text = os.environ.get(name) or str(default)
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise ConfigError(f"the environment variable {name} is {text!r}; give a number, such as {default:g}")
    return found
