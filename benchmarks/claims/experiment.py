"""What the entry points share: their flags, and writing tables, numbers and plots."""

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims.stages import compile_fast
from unimm_jax.evals.bootstrap import Difference

Row = Sequence[str | float | int | Difference | None]
LABELS = {"drawing": "text to image", "drawing_strict": "text to image, strict", "matched": "matching"}


def local_path(text: str) -> pathlib.Path:
    """The type of a flag that names a local directory."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a local path")
    return pathlib.Path(text)


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The flags of every experiment."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=local_path, default=pathlib.Path(output), help="directory of the experiment")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--lanes", type=int, default=1, help="seeds that are trained at the same time")
    found.add_argument("--quick", action="store_true", help="tiny models and few steps: tests the program only")
    return found


def read_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags of the command line. Seeds that repeat, and `--runs` of another number, are refused."""
    flags = parser.parse_args()
    if len(set(flags.seeds)) < len(flags.seeds):
        parser.error("--seeds must differ")
    runs = getattr(flags, "runs", None)
    if runs and len(runs) != len(flags.seeds):
        parser.error(f"--runs has {len(runs)} directories for {len(flags.seeds)} seeds")
    return flags


def cell(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return "never" if math.isinf(value) else f"{value:.3f}"
    return str(value)


def table(head: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def labeled(found: Mapping[str, Difference]) -> dict[str, Difference]:
    """Differences by the names that tables and plots show: in "ARM - ARM, MEASURE", the measure is written in words."""
    parts = {name: name.rpartition(", ") for name in found}
    return {arms + comma + LABELS.get(measure, measure): found[name] for name, (arms, comma, measure) in parts.items()}


def comparison_table(found: Mapping[str, Difference]) -> str:
    """A table of differences between arms, by name."""
    rows = [
        (name, d.first, d.second, d, ", ".join(f"{x:+.3f}" for x in d.per_seed), d.verdict)
        for name, d in labeled(found).items()
    ]
    head = ("comparison (first - second)", "first", "second", "difference [95% interval]", "per seed", "verdict")
    return table(head, rows)


def write(
    output: pathlib.Path, title: str, sections: Mapping[str, str], numbers: Any, plots: Mapping[str, str]
) -> None:
    """Writes `results.md`, `results.json` and the plots, and prints the tables.

    Args:
      sections: heading → Markdown. numbers: everything, for JSON. plots: file name without ending → SVG.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = f"# {title}\n\n" + "\n\n".join(f"## {heading}\n\n{body}" for heading, body in sections.items()) + "\n"
    for name, picture in plots.items():
        (output / f"{name}.svg").write_text(picture)
        text += f"\n![{name.replace('_', ' ')}]({name}.svg)\n"
    (output / "results.md").write_text(text)
    (output / "results.json").write_text(json.dumps(_plain(numbers), indent=1))
    print(text)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: differences as dicts, infinity as "never"."""
    if isinstance(value, Difference):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return "never" if isinstance(value, float) and math.isinf(value) else value


def prepare(output: pathlib.Path, name: str, quick: bool, **settings: Any) -> pathlib.Path:
    """The output directory, absolute, with a note of the settings that its results depend on.

    Args:
      name: of the experiment. settings: others that must not change when it resumes.

    Raises:
      SystemExit: it holds results of other settings.
    """
    if quick:
        compile_fast()
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    note = output / "settings.json"
    text = json.dumps(dict(experiment=name, quick=quick) | settings, indent=1, default=str)
    if note.exists() and note.read_text() != text:
        raise SystemExit(f"{output} holds results of other settings ({note}); give another --output")
    note.write_text(text)
    return output
