"""From a config file to a complete, checked `Config`; and from a checkpoint's JSON back to one.

A config file returns the settings that it chooses. `complete` adds every other one at its default, so that all of them
can be overridden and a saved config does not depend on defaults.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from unimm_jax import config as config_lib
from unimm_jax import evals, legacy, objectives, storage
from unimm_jax.config import COMPANIONS, Config, merged, problems_of, unknown
from unimm_jax.errors import ConfigError, UserError
from unimm_jax.models.transformer import ACTIVATIONS, REMAT

SECTION_ORDER = (
    *config_lib.PLAIN, *config_lib.DEFAULTS, *config_lib.SHARED, "data", "loss", "model", *config_lib.FREE,
)  # fmt: skip


# ---- Config files ----------------------------------------------------------------------------------------------------


def config_directory() -> pathlib.Path:
    """Where the shipped config files are: inside the installed package, or beside it in a clone."""
    inside = pathlib.Path(__file__).parent / "configs"
    return inside if inside.is_dir() else pathlib.Path(__file__).parent.parent / "configs"


def stages() -> list[str]:
    """Names of the shipped config files."""
    return sorted(f.stem for f in config_directory().glob("*.py") if f.stem not in ("__init__", "common"))


def load(spec: str) -> ConfigDict:
    """Loads a config file and completes its config.

    Args:
      spec: "stage2", "configs/stage2.py" or the path of a file of yours, with ":SIZE" at the end for a size.

    Raises:
      ConfigError: no such file, a file that raises or has no `get_config`, or unknown settings.
    """
    name, _, size = spec.partition(":")
    module = _config_module(name)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {name} has no function get_config")
    try:
        found = module.get_config(size) if size else module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(f"config file {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, ConfigDict | Mapping):
        raise ConfigError(f"config file {name}: get_config returned {type(found).__name__}, not a config")
    return complete(found)


def _config_module(name: str) -> ModuleType:
    directory = config_directory()
    shipped = directory / (pathlib.Path(name).stem + ".py")
    is_shipped = name in (shipped.stem, f"configs/{shipped.name}") and shipped.exists()
    path = pathlib.Path(name).expanduser()
    if not path.is_file() and is_shipped:
        path = shipped
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, stages(), 1)
        hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(stages())}"
        raise ConfigError(f"there is no config file {name}; {hint}")
    _register_configs(directory)
    if path.resolve() == shipped.resolve():
        return importlib.import_module(f"configs.{shipped.stem}")
    spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(f"config file {name} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _register_configs(directory: pathlib.Path) -> None:
    """Makes the shipped files importable as the package `configs`, from everywhere."""
    if "configs" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "configs", directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["configs"] = module
    spec.loader.exec_module(module)


# ---- Completing and parsing ------------------------------------------------------------------------------------------


def complete(given: Mapping[str, Any]) -> ConfigDict:
    """A config with every setting: those given, others at their defaults.

    Raises:
      ConfigError: unknown sections or settings, with the nearest known name.
    """
    return ConfigDict(_complete(_plain(given)), type_safe=True)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    not_sections = [
        n for n in (*config_lib.SHARED, "data", "loss", "model", *config_lib.FREE) if given.get(n) is not None
    ]
    wrong = [
        f"config.{n} is {given[n]!r}; it must be a section of settings" for n in not_sections if not _is_dict(given[n])
    ]
    for section in ("model", "evals"):
        if _is_dict(given.get(section)):
            wrong += [
                f"config.{section}.{n} is {v!r}; it must be a section"
                for n, v in given[section].items()
                if not _is_dict(v)
            ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    wrong = unknown("config", given, SECTION_ORDER)
    wrong += [f"config.{name} is missing" for name in config_lib.PLAIN if name not in given]
    if wrong:
        raise ConfigError("\n".join(wrong))
    objective = objectives.get(given["objective"])
    found: dict[str, Any] = {name: given[name] for name in config_lib.PLAIN}
    found |= {name: given.get(name, default) for name, default in config_lib.DEFAULTS.items()}
    sections = config_lib.SHARED | {"data": objective.data_config, "loss": objective.loss_config}
    for name, section in sections.items():
        settings = given.get(name) or {}
        wrong += unknown(f"config.{name}", settings, (f.name for f in dataclasses.fields(section)))
        found[name] = merged(section, settings)
    known = objective.sections | objective.optional_sections
    models = given.get("model") or {}
    wrong += unknown("config.model", models, known)
    found["model"] = {}
    for name, section in known.items():
        if name in models or name in objective.sections:
            settings = models.get(name) or {}
            wrong += unknown(f"config.model.{name}", settings, (f.name for f in dataclasses.fields(section)))
            found["model"][name] = merged(section, settings)
    found["evals"] = {}
    for name, entry in (given.get("evals") or {}).items():
        try:
            found["evals"][name] = evals.complete(f"config.evals.{name}", entry)
        except ConfigError as error:
            wrong.append(str(error))
    found["companions"] = dict(given.get("companions") or {})
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def parse(given: Mapping[str, Any]) -> Config:
    """The typed config. Incomplete configs are completed.

    Raises:
      ConfigError: all unknown settings, wrong types, values out of range and conflicts, one per line.
    """
    found = _complete(_plain(given))
    objective = objectives.get(found["objective"])
    sections = config_lib.SHARED | {"data": objective.data_config, "loss": objective.loss_config}
    known = objective.sections | objective.optional_sections
    typed: dict[str, Any] = {name: section(**found[name]) for name, section in sections.items()}
    models = {name: known[name](**settings) for name, settings in found["model"].items()}
    config = Config(**(found | typed | {"model": models}))
    wrong = _values(config)
    wrong = wrong or _structure(config)
    wrong = wrong or _conflicts(config) + _micro_batches(config, objective) + objective.check(config)
    if wrong:
        raise ConfigError("\n".join(f"- {sentence}" for sentence in wrong))
    return config


def _micro_batches(config: Config, objective: Any) -> list[str]:
    """A sentence if the batch cannot be accumulated as the config says."""
    parts = config.train.micro_batches
    if parts > 1 and not objective.accumulates:
        return [
            f"config.train.micro_batches is {parts}; the objective {config.objective} does not accumulate gradients, "
            "so it must be 1"
        ]
    return []


def _plain(value: Any) -> Any:
    """ConfigDicts as dicts, lists as tuples, at every depth."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def from_json(text: str) -> Config:
    """The config of a checkpoint, also of one that an older version wrote.

    Raises:
      ConfigError: not a config, or one of a newer version.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the saved config is not JSON: {error}") from None
    written = found.pop("format", 1)
    if written > legacy.FORMAT:
        raise ConfigError(
            f"the saved config has format {written}; this version of unimm_jax reads up to {legacy.FORMAT}. Update "
            "unimm_jax"
        )
    return parse(legacy.config(found) if written == 1 else found)


def sections_from_json(text: str) -> dict[str, Any]:
    """The model sections of a checkpoint's config, also of imported weights, which have no objective.

    Raises:
      ConfigError: not a config, or unknown sections or settings.
    """
    found = json.loads(text)
    found = legacy.config(found) if found.pop("format", 1) == 1 else found
    classes = [objectives.get(name) for name in objectives.REGISTRY]
    known = {name: kind for c in classes for name, kind in (c.sections | c.optional_sections).items()}
    models = _plain(found.get("model") or {})
    wrong = unknown("the saved config's model", models, known)
    for name in models.keys() & known.keys():
        wrong += unknown(f"the saved config's model.{name}", models[name], config_lib.defaults_of(known[name]))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return {name: known[name](**merged(known[name], settings)) for name, settings in models.items()}


def to_text(config: Config) -> str:
    """One line per setting, "train.steps = 500", for reading and for golden files."""
    lines = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        else:
            lines.append(f"{name} = {value!r}")

    walk(config.as_dict(), "")
    return "\n".join(lines) + "\n"


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _values(config: Config) -> list[str]:
    """Wrong types and values out of range."""
    wrong = []
    for name in (*config_lib.SHARED, "data", "loss"):
        wrong += problems_of(f"config.{name}", getattr(config, name))
    for name, section in config.model.items():
        wrong += problems_of(f"config.model.{name}", section)
        wrong += _model_values(f"config.model.{name}", section)
    if config.dtype not in ("float32", "bfloat16"):
        wrong.append(f"config.dtype is {config.dtype!r}; it is float32 or bfloat16")
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**31:
        wrong.append(f"config.seed is {config.seed!r}; it must be an integer from 0 to 2147483647")
    for name, entry in config.evals.items():
        wrong += evals.problems(f"config.evals.{name}", entry, config)
    return wrong


# Settings of model sections that may be 0; all other integers are at least 1
MAY_BE_ZERO = {"top_k", "pooled", "empty", "addition_time_embed_dim", "projection_class_embeddings_input_dim"}
# Settings of model sections with a fixed set of values
CHOICES: dict[str, tuple[str, ...]] = {
    "activation": tuple(ACTIVATIONS),
    "remat": tuple(REMAT),
    "output_norm": ("none", "plain", "affine"),
    "positions": ("order", "grid"),
    "selection": ("argmax", "sample", "top_k", "all"),
    "architecture": ("dynamic", "bidirectional"),
    "quantizer": ("ema", "simvq"),
}


def _model_values(where: str, section: Any) -> list[str]:
    """Wrong integers and names of a model section."""
    wrong = []
    for field in dataclasses.fields(section):
        name, value = field.name, getattr(section, field.name)
        low = 0 if name in MAY_BE_ZERO else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < low:
            wrong.append(f"{where}.{name} is {value}; it must be at least {low}")
        if name in CHOICES and value not in CHOICES[name]:
            wrong.append(f"{where}.{name} is {value!r}; it is one of {', '.join(CHOICES[name])}")
    return wrong


INIT_FROM = ("checkpoint", "rename", "optional", "kind", "part", "allow")


def _structure(config: Config) -> list[str]:
    """Wrong shapes of `rules`, `mesh`, `init_from` and `companions`."""
    wrong, rules = [], config.optimizer.rules
    for rule in rules if isinstance(rules, tuple) else [rules]:
        fits = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)
        if not fits or not (rule[1] is None or isinstance(rule[1], int | float)):
            wrong.append(
                f"config.optimizer.rules: {rule!r} is not a pair of a regular expression and a multiplier or None"
            )
    if not isinstance(config.mesh, tuple) or not all(isinstance(n, int) for n in config.mesh):
        wrong.append(f"config.mesh is {config.mesh!r}; it is () or (data, fsdp, tensor) with at most one -1")
    entries = config.init_from if isinstance(config.init_from, tuple) else (config.init_from,)
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not {"checkpoint", "rename"} <= set(entry):
            wrong.append(f"config.init_from[{i}] is {entry!r}; it must be a dict with checkpoint and rename")
            continue
        wrong += unknown(f"config.init_from[{i}]", entry, INIT_FROM)
        if not entry["rename"]:
            wrong.append(f"config.init_from[{i}].rename is empty, so nothing is read; (('', ''),) reads all parameters")
        for pair in entry["rename"]:
            try:
                pattern, _ = pair
                re.compile(pattern)
            except (re.error, TypeError, ValueError) as error:
                wrong.append(
                    f"config.init_from[{i}].rename: {pair!r} is not a pair of a regular expression and a name ({error})"
                )
    return wrong + unknown("config.companions", config.companions, COMPANIONS)


def _conflicts(config: Config) -> list[str]:
    """Settings that do not fit each other, whatever the objective."""
    wrong = []
    for pattern, value in config.optimizer.rules:
        try:
            re.compile(pattern)
        except re.error as error:
            wrong.append(f"config.optimizer.rules: {pattern!r} is not a regular expression ({error})")
        if value is not None and not 0 < value < float("inf"):
            wrong.append(
                f"config.optimizer.rules: {pattern!r} has the multiplier {value}; it is above 0, or None to freeze"
            )
    if config.mesh and (len(config.mesh) != 3 or sum(n == -1 for n in config.mesh) > 1 or 0 in config.mesh):
        wrong.append(f"config.mesh is {config.mesh}; it is () or (data, fsdp, tensor) with at most one -1")
    encoder, size = config.model["encoder"], config.data.image_size
    if size != encoder.image_size:
        wrong.append(f"config.data.image_size {size} differs from config.model.encoder.image_size {encoder.image_size}")
    if size % encoder.patch_size:
        wrong.append(f"config.data.image_size {size} is not a multiple of the patch size {encoder.patch_size}")
    for name in ("encoder", "image_tokenizer", "text_tower"):
        if name in config.model:
            width, heads = getattr(config.model[name], "width", encoder.width), config.model[name].heads
            if heads < 1 or width % heads:
                wrong.append(f"config.model.{name}: width {width} does not divide by {heads} heads")
    tokenizer = config.model.get("image_tokenizer")
    if tokenizer is not None and tokenizer.architecture == "bidirectional" and tokenizer.selection != "all":
        wrong.append(
            f"config.model.image_tokenizer.selection is {tokenizer.selection!r}; it must be 'all', because a "
            "bidirectional image tokenizer has no selector"
        )
    return wrong


def check_paths(config: Config, workdir: str | pathlib.Path) -> None:
    """Checks that the records and checkpoints that a config names exist.

    Raises:
      ConfigError: lists all that are missing, and what makes them.
    """
    wrong = []
    if hasattr(config.data, "records"):
        path = storage.at(workdir, config.data.records)
        if not (path / "header.json").exists():
            wrong.append(
                f"config.data.records: {path} holds no finished records; run python -m unimm_jax.pretokenize first"
            )
    for entry in config.init_from:
        path = storage.at(workdir, entry["checkpoint"])
        if not path.exists():
            wrong.append(f"config.init_from: there is no checkpoint at {path}; train that stage first")
    if wrong:
        raise ConfigError("\n".join(f"- {sentence}" for sentence in wrong))
