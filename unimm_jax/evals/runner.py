"""Runs evaluators on a checkpoint and writes what they find: scores, examples, images and outcomes."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from unimm_jax import evals, storage
from unimm_jax.data.transforms import encode_png
from unimm_jax.errors import ConfigError
from unimm_jax.evals.base import Context, Result
from unimm_jax.inference.loading import Model, load_model

# where the scores of an evaluator are, if it is not the only one; "" is the top level, others are under their name
SECTIONS = dict.fromkeys(("scenes", "edits", "compositions", "stories", "small_objects", "assessments"), "")
SECTIONS |= {"captions": "own_images", "loss": "held_out"}


def evaluate(
    checkpoint: str, output: str, names: Sequence[str] = (), options: Mapping[str, Any] | None = None, tensor: int = 1
) -> dict[str, Any]:
    """Evaluates a language stage and returns the content of `scores.json`.

    Scores of a single evaluator are at the top level. Of several, those of scenes, edits, compositions, stories, small
    objects and assessments are, and every other evaluator has a section. Images and examples of all but the scenes are
    in a subdirectory.

    Args:
      checkpoint: workdir or step directory. output: directory for everything that is written.
      names: evaluators; by the sources of the model if empty (`evals.default_evals`).
      options: options of the evaluators; each gets those that it has.
      tensor: local devices over which the language model is split.

    Raises:
      CheckpointError: not a language stage that reads images. ConfigError: unknown evaluators or options.
    """
    began = time.perf_counter()
    for name in names:
        evals.get(name)  # raises for unknown ones before anything is loaded
    model = load_model(checkpoint, tensor)
    names = list(dict.fromkeys(names)) or evals.default_evals(model.header)
    entries = entries_of(names, options or {}, model)
    context = context_of(model)
    folder = storage.path(output)
    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Any] = {}
    for name in names:
        evaluator = evals.get(name)(evals.options_of(entries[name]))
        with jax.set_mesh(model.mesh):
            result = evaluator.run(context)
        section = SECTIONS.get(name, name) if len(names) > 1 else ""
        is_first = name == "scenes" or len(names) == 1
        write(result, folder if is_first else folder / (section or name))
        found = result.scores | result.settings
        scores = found | scores if not section else scores | {section: found}
    scores["evaluation_seconds"] = round(time.perf_counter() - began, 1)
    storage.write_whole(folder / "scores.json", json.dumps(scores, indent=1).encode())
    storage.write_whole(folder / "done.json", json.dumps({"seconds": scores["evaluation_seconds"]}).encode())
    return scores


def entries_of(names: Sequence[str], options: Mapping[str, Any], model: Model) -> dict[str, dict[str, Any]]:
    """Complete entries of the evaluators, with the options that each has.

    Raises:
      ConfigError: an option that none of them has, a value out of range, or an evaluator that does not fit the model.
    """
    entries, used = {}, set()
    for name in names:
        known = {field.name for field in dataclasses.fields(evals.get(name).options)}
        given = {key: value for key, value in options.items() if key in known}
        used |= set(given)
        entries[name] = evals.complete(name, {"type": name} | given)
    wrong = [f"--{key} is an option of none of the evaluators {', '.join(names)}" for key in options if key not in used]
    wrong += [problem for name in names for problem in evals.problems(name, entries[name], model.config)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return entries


def context_of(model: Model) -> Context:
    """A model as the evaluators get it."""
    records = str(storage.at(model.workdir, model.config.data.records))
    return Context(
        config=dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, records=records)),
        objective=model.objective,
        params=model.params,
        step=model.step,
        mesh=model.mesh,
        workdir=model.workdir,
        header=model.header,
        text_tokenizer=model.text_tokenizer,
    )


def write(result: Result, folder: pathlib.Path) -> None:
    """Writes sheets, the images of examples, `examples.json`, and `outcomes.json` with 1 for what is right."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in result.images.items():
        (folder / f"{name}.png").write_bytes(encode_png(image))
    examples: dict[str, list[dict[str, Any]]] = {}
    for kind, rows in result.examples.items():
        examples[kind] = [{key: value for key, value in row.items() if key != "image"} for row in rows]
        for row in rows:
            if "image" in row:
                (folder / row["file"]).write_bytes(encode_png(row["image"]))
    (folder / "examples.json").write_text(json.dumps(examples, indent=1))
    if result.outcomes:
        outcomes = {score: [int(ok) for ok in found] for score, found in result.outcomes.items()}
        (folder / "outcomes.json").write_text(json.dumps(outcomes))
    else:
        (folder / "outcomes.json").unlink(missing_ok=True)  # of an earlier evaluation
