"""Repeats the first steps of a run and names what differs from its run card."""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax

from unimm_jax import objectives, runcard, storage, train
from unimm_jax.config import Config
from unimm_jax.data import digests
from unimm_jax.data.pipeline import Input
from unimm_jax.errors import ConfigError, DataError

NAMED_EXAMPLES = 10  # examples that are named; others are counted
Card = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a repetition found: a line for each difference, and a line that sums it up."""

    differences: list[str]
    summary: str


def saved_config(run: pathlib.Path) -> str:
    """The text of the saved config of a workdir.

    Raises:
      DataError: there is none.
    """
    if not storage.kind(run / "config.json"):
        raise DataError(f"{run} has no config.json; give the workdir of a run")
    return storage.read(run / "config.json").decode()


def repeat(run: pathlib.Path, config: Config, steps: int, output: str = "") -> Comparison:
    """Repeats the first steps of a run and compares them with its run card.

    Paths in the config start at the run's workdir. No evaluation runs, and no checkpoint is written. All processes
    repeat the steps; the first one compares.

    Args:
      run: the workdir. config: its saved config, with changes if wanted.
      steps: number of steps to repeat; fewer if the card has fewer.
      output: workdir of the repetition, which is kept; empty for a temporary directory.

    Raises:
      DataError: there is no run card or none with first steps, data is missing, or `output` is in use.
      ConfigError: records or checkpoints that the config names are missing.
    """
    card = runcard.read(run)
    recorded = _recorded(card)
    if not recorded:
        raise DataError(
            f"the run card of {run} lacks the first steps: the run started with an older version, or stopped before "
            "its first checkpoint. Run it again to get a new one"
        )
    if output and any(storage.kind(storage.path(output) / name) for name in (runcard.FILE, "checkpoints")):
        raise DataError(f"{output} holds another run; give another --output")
    if not output and jax.process_count() > 1:
        raise ConfigError("several processes need --output, a new directory that all of them share")
    there = _with_absolute_paths(config, run)
    count = min(steps, recorded)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        place = storage.path(output or folder)
        try:
            train.train(_without_extras(there), place, count)
        except (ConfigError, DataError) as error:
            raise type(error)(
                f"{run} cannot be repeated: {str(error).removeprefix('- ')}. Restore what is missing, or give its new "
                "place, for example with --config.data.records=DIR"
            ) from None
        if jax.process_index():
            return Comparison([], "")
        new = runcard.read(place)
    if len(new["steps"]) < count:
        raise DataError(f"the repetition was stopped after {len(new['steps'])} of {count} steps; start it again")
    found = list(named_values(new["sessions"][0]["environment"], card["sessions"][0]["environment"]))
    found += config_differences(runcard.flat(config), card["config"])
    found += weight_differences(new["weights"], card["weights"])
    found += data_differences(new["data"], card["data"])
    found += batch_differences(new["steps"], card["steps"][:count], lambda: _open(there))
    losses = metric_differences(new["steps"], card["steps"][:count])
    return Comparison(found + losses, summary(len(found), losses, count))


def _recorded(card: Card) -> int:
    """Number of recorded steps from the first one on that one environment and one config took."""
    first, count = card["sessions"][0], len(card["steps"])
    if first["start"] or [step["step"] for step in card["steps"]] != list(range(1, count + 1)):
        return 0
    for session in card["sessions"][1:]:
        if session["changed"] or session["environment"] != first["environment"]:
            count = min(count, session["start"])
    return count


def _with_absolute_paths(config: Config, run: pathlib.Path) -> Config:
    entries = tuple(entry | {"checkpoint": str(storage.at(run, entry["checkpoint"]))} for entry in config.init_from)
    found = dataclasses.replace(config, init_from=entries)
    if hasattr(config.data, "records"):
        records = str(storage.at(run, config.data.records))
        found = dataclasses.replace(found, data=dataclasses.replace(config.data, records=records))
    return found


def _without_extras(config: Config) -> Config:
    """The config without what changes no step: evaluations, checkpoints, images, profiles, W&B."""
    never = config.train.steps + 1
    plain = dataclasses.replace(config.train, checkpoint_every=never, image_every=never, profile=0, wandb="")
    return dataclasses.replace(config, train=plain, evals={})


def _open(config: Config) -> Input:
    found: Input = objectives.get(config.objective).open_input(config)
    return found


# ---- Differences -----------------------------------------------------------------------------------------------------


def named_values(now: dict[str, Any], was: dict[str, Any]) -> Iterator[str]:
    """A line for each name whose value differs or that only one side has."""
    for name in [*now, *(name for name in was if name not in now)]:
        if name not in was:
            yield f"{name} {now[name]}, was not there"
        elif name not in now:
            yield f"{name} is not there, was {was[name]}"
        elif now[name] != was[name]:
            yield f"{name} {now[name]}, was {was[name]}"


def config_differences(now: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """A line for each setting that differs. Places of records and checkpoints are left to the digests of these."""

    def comparable(settings: dict[str, Any]) -> dict[str, Any]:
        found = {f"config.{name}": value for name, value in settings.items() if name != "data.records"}
        entries = settings.get("init_from", [])
        found["config.init_from"] = [{k: v for k, v in entry.items() if k != "checkpoint"} for entry in entries]
        return found

    return list(named_values(comparable(now), comparable(was)))


def weight_differences(now: list[dict[str, Any]], was: list[dict[str, Any]]) -> list[str]:
    """A line for each place of `init_from` that holds other files."""

    def named(entry: dict[str, Any]) -> str:
        step = f" step {entry['step']}" if "step" in entry else ""
        return f"{entry['path']}{step} (digest {entry['digest']})"

    found = [f"initial weights: {named(a)}, was {named(b)}" for a, b in zip(now, was) if a["digest"] != b["digest"]]
    if len(now) != len(was):
        found.append(f"initial weights: {len(now)} checkpoints, was {len(was)}")
    return found


def data_differences(now: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """A line for each entry of the header of the data that differs; for fingerprints, one for each source."""
    sources = [name.strip() for name in str(now.get("sources", "")).split(";")]
    plain: list[dict[str, Any]] = []
    for header in (now, was):
        plain.append({})
        for name, value in header.items():
            if "fingerprints" in name and len(value) == len(sources):
                plain[-1] |= {f"data: fingerprint of {source}": one for source, one in zip(sources, value)}
            else:
                plain[-1][f"data: {name}"] = value
    return list(named_values(*plain))


def batch_differences(now: list[Card], was: list[Card], open_input: Callable[[], Input]) -> list[str]:
    """A line for each example that differs, with the record that it comes from; further ones are counted.

    Args:
      now, was: records of the same steps. open_input: opens the data, to find the records.
    """
    found: list[str] = []
    differing: list[tuple[int, str, int, int, int]] = []  # (step, arrays, rows, row, example)
    for a, b in zip(now, was, strict=True):
        arrays = [name for name in {**a["arrays"], **b["arrays"]} if a["arrays"].get(name) != b["arrays"].get(name)]
        rows, former = digests.examples_of(a["examples"]), digests.examples_of(b["examples"])
        if len(rows) != len(former):
            found.append(f"step {a['step']}: the batch has {len(rows)} rows, was {len(former)}")
            continue
        places = [
            (a["step"], ", ".join(arrays), len(rows), i, j)
            for i, (new, old) in enumerate(zip(rows, former, strict=True))
            for j, digest in enumerate(new)
            if len(new) != len(old) or digest != old[j]
        ]
        differing += places
        if arrays and not places:
            found.append(f"step {a['step']}: {', '.join(arrays)} differ outside of the examples")
    data = open_input() if differing else None
    for step, names, count, row, example in differing[:NAMED_EXAMPLES]:
        assert data is not None
        name, origin = digests.name_of(data, row, example, count), digests.origin(data, step - 1, row, example)
        found.append(f"step {step}: {name} differs ({names}): {origin}")
    if (more := len(differing) - NAMED_EXAMPLES) > 0:
        found.append(f"{more} more examples differ, the last one in step {differing[-1][0]}")
    return found


def metric_differences(now: list[Card], was: list[Card]) -> list[str]:
    """A line for the loss and for each other metric that differs, with the first step where it does."""
    found = []
    for name in sorted({*now[0]["metrics"], *was[0]["metrics"]}, key=lambda name: (name != "loss", name)):
        for a, b in zip(now, was, strict=True):
            new, old = (step["metrics"].get(name) for step in (a, b))
            if new == old:
                continue
            if new is None or old is None:
                found.append(f"step {a['step']}: {name} is {'not there' if new is None else 'new'}")
            else:
                x, y = float.fromhex(new), float.fromhex(old)
                relative = f"{abs(x - y) / abs(y):.1e}" if y else f"{abs(x - y):.1e} absolute"
                found.append(f"step {a['step']}: {name} {x:.9g}, was {y:.9g} (relative {relative}); first difference")
            break
    return found


def summary(others: int, metrics: list[str], steps: int) -> str:
    """The last line: whether everything, or only the metrics, repeat.

    Args:
      others: number of differences that are not of metrics. metrics: the lines of `metric_differences`.
    """
    named = f"{steps} steps" if steps > 1 else "1 step"
    if not others and not metrics:
        return f"{named} {'repeat' if steps > 1 else 'repeats'} bitwise"
    if not metrics:
        return f"{others} {'things differ' if others > 1 else 'thing differs'}, but all metrics of {named} are equal"
    if not any(": loss " in line for line in metrics):
        return f"the losses of {named} are equal, other metrics differ"
    return f"the losses differ within {named}"
