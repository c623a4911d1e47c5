"""Evaluators by name. A config's `evals` section names them; `unimm_jax.evaluate` runs them on a checkpoint.

To add one: write a file with a subclass of `base.Evaluator` and add its line to `REGISTRY`.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from unimm_jax.config import Config, merged, problems_of, unknown
from unimm_jax.data import sources as registry
from unimm_jax.data.sources import split_sources
from unimm_jax.errors import CheckpointError, ConfigError

# type → "module:class"; imported on first use
REGISTRY = {
    "loss": "unimm_jax.evals.heldout_loss:HeldOutLoss",
    "scenes": "unimm_jax.evals.scenes:Scenes",
    "edits": "unimm_jax.evals.edits:Edits",
    "compositions": "unimm_jax.evals.compositions:Compositions",
    "small_objects": "unimm_jax.evals.small_objects:SmallObjects",
    "stories": "unimm_jax.evals.stories:Stories",
    "assessments": "unimm_jax.evals.assessments:Assessments",
    "captions": "unimm_jax.evals.captions:Captions",
    "answers": "unimm_jax.evals.answers:Answers",
}


def get(name: str) -> Any:
    """The class of an evaluator.

    Raises:
      ConfigError: unknown name.
    """
    if name not in REGISTRY:
        raise ConfigError(f"there is no evaluator {name!r}; evaluators are {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def complete(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `config.evals` with every option of its evaluator.

    Raises:
      ConfigError: no or an unknown type, or an unknown option.
    """
    if "type" not in entry:
        raise ConfigError(f"{where} has no type; it is one of {', '.join(REGISTRY)}")
    options = get(entry["type"]).options
    given = {name: value for name, value in entry.items() if name != "type"}
    wrong = unknown(where, given, (field.name for field in dataclasses.fields(options)))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return {"type": entry["type"]} | merged(options, given)


def problems(where: str, entry: Mapping[str, Any], config: Config | None = None) -> list[str]:
    """A sentence for every option of a complete entry that is wrong.

    Args:
      config: of the stage; with it, also whether the evaluator can run on the stage.
    """
    reasons = get(entry["type"]).check(config) if config is not None else []
    return problems_of(where, options_of(entry)) + [f"{where}: {reason}" for reason in reasons]


def options_of(entry: Mapping[str, Any]) -> Any:
    """The options dataclass of a complete entry."""
    return get(entry["type"]).options(**{name: value for name, value in entry.items() if name != "type"})


def default_evals(header: Mapping[str, Any]) -> list[str]:
    """The evaluators of a language stage, by the sources in its header.

    Scenes get "scenes", their edits "edits", their compositions "compositions", their stories "stories", sources with
    captions "captions", conversations "answers", a mixture several of them. Other sources get "loss".

    Raises:
      CheckpointError: the model was not trained on sources (imported weights).
    """
    if not header.get("sources"):
        raise CheckpointError(
            "the checkpoint names no data sources (imported weights have none), so no evaluator is chosen; give "
            "--evals=scenes"
        )
    sources = split_sources(header["sources"])
    wanted = set(map(evaluator_of, sources))
    return [name for name in REGISTRY if name in wanted] or ["loss"]


def evaluator_of(source: str) -> str:
    """The evaluator of a source, "" for none. A directory without its format counts as one with captions."""
    name = source.partition(":")[0]
    return str(registry.get(name).evaluator) if name in registry.REGISTRY else "captions"


def is_scenes(source: str) -> bool:
    """Whether a source is the embedded scenes."""
    return source.partition(":")[0] == "scenes"
