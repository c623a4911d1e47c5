"""The flags --config=FILE[:SIZE] and --config.SECTION.SETTING=VALUE of the commands that take a config."""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from unimm_jax.errors import ConfigError, UserError


def define_config(load: Callable[[list[str]], ConfigDict | None] | None = None) -> Callable[[], ConfigDict]:
    """Defines the flags. Call it before flags are parsed.

    The file that --config names is loaded at once, so that every setting of it is a flag.

    Args:
      load: command line → complete config; loads the file that --config names if None.

    Returns:
      a function that gives the complete config with the overrides of the command line, once flags are parsed. It raises
      a `ConfigError` for a missing or failing file and for unknown settings.
    """
    try:
        config = (load or _load)(sys.argv)
        wrong = _unknown_overrides(sys.argv, config) if config is not None else []
        if wrong:
            raise ConfigError("\n".join(wrong))
    except UserError as error:  # raised when flags are parsed, where errors are reported
        return _raising(error)
    if config is None:
        flags.DEFINE_string("config", None, "A config file, configs/STAGE.py[:SIZE] or STAGE[:SIZE].")
        return _raising(ConfigError("--config is missing; give a config file, for example configs/stage2.py:laptop"))
    sys.argv = [a for i, a in enumerate(sys.argv) if not _is_config_file(sys.argv, i)]
    holder = config_flags.DEFINE_config_dict(
        "config", config, "A config file, configs/STAGE.py[:SIZE] or STAGE[:SIZE]."
    )
    return lambda: holder.value


def _raising(error: UserError) -> Callable[[], ConfigDict]:
    """A function that raises; flags of the config are accepted and ignored, so that the error is the first one."""
    sys.argv = [a for i, a in enumerate(sys.argv) if not (_is_config_file(sys.argv, i) or _is_override(a))]

    def config() -> ConfigDict:
        raise error

    return config


def _is_config_file(argv: list[str], i: int) -> bool:
    """Whether an argument is --config=FILE, --config, or the FILE after --config."""
    return (
        argv[i].lstrip("-").partition("=")[0] == "config"
        and argv[i].startswith("-")
        or (i > 0 and argv[i - 1] in ("--config", "-config"))
    )


def _is_override(argument: str) -> bool:
    return argument.startswith(("--config.", "-config."))


def _load(argv: list[str]) -> ConfigDict | None:
    from unimm_jax import resolve

    found = None  # the last one wins, as for all flags
    for i, argument in enumerate(argv[1:], 1):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            found = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return None if found is None else resolve.load(found)


def _unknown_overrides(argv: list[str], config: ConfigDict) -> list[str]:
    """A sentence for every override of a setting that the config lacks, with the nearest one."""
    known = list(_dotted(config))
    found = []
    for argument in filter(_is_override, argv[1:]):
        name = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            found.append(f"there is no setting config.{name}{hint} (--print_config lists all)")
    return found


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _dotted(value, f"{prefix}{key}.")
