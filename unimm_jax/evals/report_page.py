"""The report of a run: one self-contained HTML file with scores, curves, images, questions and commands."""

import base64
import html
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from unimm_jax import storage
from unimm_jax.errors import DataError
from unimm_jax.evals.score_table import (
    DECODER_NAMES,
    SPLIT_NAMES,
    answer_scores,
    answers_of,
    sections,
)
from unimm_jax.metrics import read

STAGES = (
    "encoder", "selector", "tokenizer", "records", "pixel_decoder", "unet_decoder", "text", "stage1", "stage2",
    "evaluation_stage2", "drawings", "drawings/verdicts", "assessments", "records_stage3", "questions", "stage3",
    "evaluation_across",
)  # fmt: skip
# directories with the answers to own questions → title
ANSWERS = {"evaluation_test": "Answers to the test questions", "evaluation_train": "Answers to the training questions"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SPENT = {  # what training spends time on → color
    "steps": "#2457c5", "prepare": "#8a94a3", "compile": "#d9622b", "input": "#b3261e", "evaluation": "#0a7d36",
    "checkpoint": "#7a4fb5", "images": "#c9a227",
}  # fmt: skip
TRAINING_COLOR, HELD_OUT_COLOR = "#2457c5", "#d9622b"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;max-width:1080px;margin:2rem auto;padding:0 1rem;background:#fff}
h1{font-size:1.7rem;line-height:1.25}h3{font-size:1rem;margin:1rem 0 .2rem}
h2{font-size:1.2rem;margin-top:2.4rem;border-bottom:1px solid #dde3ea;padding-bottom:.3rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15rem 1.2rem .15rem 0;text-align:left}
td.n,th.n{text-align:right}tr.head th{padding-top:.7rem}
.images{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;width:128px;font-size:12px;line-height:1.35}
figure img{display:block;width:128px;margin-bottom:3px;outline:1px solid #ccd4dd;outline-offset:-1px}
.strips figure{width:auto;max-width:100%}.strips figure img{width:auto;height:104px;max-width:100%}
.wide img{max-width:100%;image-rendering:pixelated}.ok{color:#0a7d36}.no{color:#b3261e}
pre{background:#f4f6f8;padding:.8rem;overflow:auto;font-size:13px}small,.note{color:#5b6675}
.curves{display:flex;flex-wrap:wrap;gap:10px}svg{background:#f9fafb;border:1px solid #dde3ea}
.bar{display:inline-block;height:.7rem;background:#9db4e4}
"""


def build(run: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Writes `report.html` and the run's `scores.json`: (path of the page, scores).

    Raises:
      DataError: the run has not been evaluated.
    """
    folder = run / "evaluation"
    if not (folder / "scores.json").exists():
        raise DataError(
            f"{folder} holds no scores.json; run python -m unimm_jax.evaluate --checkpoint={run}/stage3 "
            f"--output={folder} first"
        )
    scores = json.loads((folder / "scores.json").read_text())
    scores["seconds"] = seconds_of(run) | {"evaluation": scores["evaluation_seconds"]}
    free = run / "evaluation_free" / "scores.json"
    if free.exists():
        scores["free_placement"] = json.loads(free.read_text())
    zero_shot = run / "evaluation_stage2" / "scores.json"  # before the model was trained on compositions
    if zero_shot.exists():
        scores["composition_zero_shot"] = json.loads(zero_shot.read_text())["composition"]
    across = run / "evaluation_across" / "scores.json"  # with small objects that lie across patches
    if across.exists():
        scores["small_objects_across"] = json.loads(across.read_text())["small_objects"]
    for name in ANSWERS:
        if (run / name / "scores.json").exists():
            scores[name] = json.loads((run / name / "scores.json").read_text())
    storage.write_whole(run / "scores.json", json.dumps(scores, indent=1).encode())
    parts = [introduction(scores), *score_tables(scores), *evaluation_images(folder)]
    for name in ("edits", "compositions", "stories", "small_objects", "assessments"):
        parts += evaluation_images(folder / name)
    if "own_images" in scores:
        parts += ["<h1>Own images</h1>", *evaluation_images(folder / "own_images")]
    for where, name in ((folder / "answers", "Answers"), *((run / key, name) for key, name in ANSWERS.items())):
        if (where / "examples.json").exists():
            parts += [f"<h1>{name}</h1>", *evaluation_images(where)]
    parts += [*curves(run), *time_table(scores["seconds"], spent_of(run)), versions(), commands(run)]
    page = run / "report.html"
    storage.write_whole(page, "\n".join(parts).encode())
    return page, scores


def finished(run: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The `done.json` of each finished stage."""
    files = {stage: run / stage / "done.json" for stage in STAGES}
    return {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}


def seconds_of(run: pathlib.Path) -> dict[str, float]:
    """Wall seconds of each finished stage."""
    return {stage: done["seconds"] for stage, done in finished(run).items()}


def spent_of(run: pathlib.Path) -> dict[str, dict[str, float]]:
    """What each finished training stage spent its time on other than steps, in seconds."""
    return {stage: done["spent"] for stage, done in finished(run).items() if "spent" in done}


def introduction(scores: dict[str, Any]) -> str:
    """The head of the page."""
    total = sum(scores["seconds"].values())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>unimm_jax report</title><style>{STYLE}</style>"
        "<h1>unimm_jax: a language model that understands and generates images, trained from scratch</h1>"
        f"<p>Training and evaluation took {total / 60:.1f} minutes ({total:.0f} s, without installation). "
        "All images below are chosen by index; failures are included.</p>"
    )


# ---- Scores ----------------------------------------------------------------------------------------------------------


def score_tables(scores: dict[str, Any]) -> list[str]:
    """All scores as tables."""
    parts = ["<h2>Scores</h2>"]
    if "questions" in scores:
        parts.append(f"<table>{scene_rows(scores)}</table>")
    elif "images" in scores:
        parts.append(f"<table>{caption_rows(scores)}</table>")
    if "free_placement" in scores:
        free = scores["free_placement"]
        parts.append(
            '<p class="note">Test scenes with free placement (in training, objects are near cell centers): questions '
            f"{free['questions']['overall']:.3f}, captions {free['caption']['content_words']:.3f}"
            + (f", reconstruction {free['reconstruction']:.3f}.</p>" if "reconstruction" in free else ".</p>")
        )
    for title, column, values in sections(scores):
        rows = "".join(row(name, f"{value:.3f}") for name, value in values)
        parts.append(f"<table>{head(title, 'correct' if column == 'right' else column)}{rows}</table>")
    if "own_images" in scores:
        parts.append(f"<h3>Own images</h3><table>{caption_rows(scores['own_images'])}</table>")
    for title, found in (("Answers", answers_of(scores)), *((ANSWERS[name], scores.get(name)) for name in ANSWERS)):
        if found:
            rows = "".join(row(name, f"{value:.3f}") for name, value in answer_scores(found))
            parts.append(f"<h3>{title}</h3><table>{head('answers', 'correct')}{rows}</table>")
    if "loss" in scores.get("held_out", {}):
        parts.append(f"<p>Held-out loss of the last stage: {scores['held_out']['loss']:.3f}</p>")
    return parts


def row(name: str, *values: str) -> str:
    """A table row: a name and numbers."""
    return f"<tr><td>{name}</td>" + "".join(f'<td class="n">{value}</td>' for value in values) + "</tr>"


def head(name: str, *columns: str) -> str:
    """A table row that heads others."""
    return f'<tr class="head"><th>{name}</th>' + "".join(f'<th class="n">{c}</th>' for c in columns) + "</tr>"


def scene_rows(scores: dict[str, Any]) -> str:
    """Scores of the scenes as table rows."""
    rows = []
    if "text_to_image" in scores:
        rows.append(head("text to image", "correct", "and nothing superfluous"))
        for task, value in scores["text_to_image"].items():
            rows.append(row(task.replace("_", " "), f"{value:.3f}", f"{scores['text_to_image_strict'][task]:.3f}"))
    rows.append(head("questions", "correct"))
    rows += [row(kind, f"{value:.3f}") for kind, value in scores["questions"].items()]
    rows.append(head("captions", "correct"))
    rows.append(row("content words", f"{scores['caption']['content_words']:.3f}"))
    rows.append(row("word for word", f"{scores['caption']['exact']:.3f}"))
    if "reconstruction" in scores:
        rows.append(head("objects reconstructed from codes", "share"))
        for name, value in scores["reconstruction_by_decoder"].items():
            rows.append(row(DECODER_NAMES.get(name, name), f"{value:.3f}"))
        value = scores["reconstruction_random_selection"]
        rows.append(row("with as many patches kept at random", f"{value:.3f}"))
    rows.append(head("image tokens"))
    rows.append(row("tokens per image", f"{scores['tokens_per_image']:.2f}"))
    rows.append(row("rank correlation with the number of objects", f"{scores['tokens_follow_objects']:.2f}"))
    return "\n".join(rows)


def caption_rows(scores: dict[str, Any]) -> str:
    """Scores of own images as table rows."""
    split = SPLIT_NAMES[scores.get("split", "train")]
    rows = [head(f"captions of {scores['images']} {split}", "correct")]
    rows.append(row("word for word (first 12 words)", f"{scores['caption']['exact']:.3f}"))
    if "words" in scores["caption"]:
        rows.append(row("words", f"{scores['caption']['words']:.3f}"))
    rows += [head("image tokens"), row("tokens per image", f"{scores['tokens_per_image']:.2f}")]
    return "\n".join(rows)


# ---- Images ----------------------------------------------------------------------------------------------------------


def image(file: pathlib.Path) -> str:
    """An <img> that holds the file itself."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def evaluation_images(folder: pathlib.Path) -> list[str]:
    """Sheets and examples that an evaluation wrote; none if its directory has only those of its evaluators."""
    if not (folder / "examples.json").exists():
        return []
    examples = json.loads((folder / "examples.json").read_text())
    parts = []
    if (folder / "kept.png").exists():
        parts.append("<h2>Patches that the selector keeps</h2>")
        parts.append('<p class="note">Dropped patches are faded; their content is merged into the kept ones.</p>')
        parts.append(f'<div class="wide">{image(folder / "kept.png")}</div>')
    for name, label in DECODER_NAMES.items():
        file = folder / f"reconstruction_{name}.png"
        if file.exists():
            parts.append(f"<h2>Reconstruction from codes: {label}</h2>")
            parts.append('<p class="note">Images above, their reconstructions below.</p>')
            parts.append(f'<div class="wide">{image(file)}</div>')
    if examples.get("samples"):
        parts += ["<h2>Text to image</h2>", *sample_figures(folder, examples["samples"])]
    for kind, title, note, figure, style in EXAMPLES:
        if examples.get(kind):
            found = figures([figure(folder, item) for item in examples[kind]])
            parts += [f"<h2>{title}</h2>", f'<p class="note">{note}</p>']
            parts.append(f'<div class="{style}">{found}</div>' if style else found)
    return parts


def figures(items: Sequence[str]) -> str:
    """Figures in rows."""
    return f'<div class="images">{"".join(items)}</div>'


def sample_figures(folder: pathlib.Path, samples: list[dict[str, Any]]) -> list[str]:
    """Generated images, by task, each with its prompt and whether it is correct."""
    parts = []
    for task in dict.fromkeys(item["task"] for item in samples):
        found = []
        for item in samples:
            if item["task"] != task:
                continue
            mark = ""
            if item.get("right") is not None:
                more = " (with something superfluous)" if item["right"] and not item["strict"] else ""
                mark = f'<span class="{css(item["right"])}">{"✓" if item["right"] else "✗"}</span>{more} '
            found.append(f"<figure>{image(folder / item['file'])}{mark}{html.escape(item['prompt'])}</figure>")
        parts += [f"<h3>{task.replace('_', ' ')}</h3>", figures(found)]
    return parts


def edit_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """The images of a chain of edits with its instructions."""
    marks = [f'<span class="{css(ok)}">{"✓" if ok else "✗"}</span>' for ok in item["right"]]
    lines = [f"{mark} {html.escape(text)}" for mark, text in zip(marks, item["instructions"], strict=True)]
    return f"<figure>{image(folder / item['file'])}{'<br>'.join(lines)}</figure>"


def composition_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """The images of a prompt and the result."""
    mark = f'<span class="{css(item["right"])}">{"✓" if item["right"] else "✗"}</span>'
    return f"<figure>{image(folder / item['file'])}{mark} {html.escape(item['prompt'])}</figure>"


def story_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """The images of a document, its caption, and the texts, each marked by whether it and its image are right."""
    lines = [html.escape(item["caption"])]
    for text, ok in zip(item["texts"], item["marks"], strict=True):
        lines.append(f'<span class="{css(ok)}">{"✓" if ok else "✗"}</span> {html.escape(text) or "no text"}')
    if not item["texts"]:
        lines.append('<span class="no">✗</span> not continued')
    return f"<figure>{image(folder / item['file'])}{'<br>'.join(lines)}</figure>"


def assessment_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """A generated image with its prompt and the model's verdict."""
    truth = "" if item["reply"] == item["truth"] else f"<br><small>{html.escape(item['truth'])}</small>"
    reply = html.escape(item["reply"]) or "no verdict"
    text = f'<b>{html.escape(item["prompt"])}</b><br><span class="{css(item["right"])}">{reply}</span>{truth}'
    return f"<figure>{image(folder / item['file'])}{text}</figure>"


def question_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """An image with a question and the model's answer."""
    ok = item["reply"] == item["truth"]
    truth = "" if ok else f" ({html.escape(item['truth'])})"
    reply = html.escape(item["reply"]) or "no answer"
    text = f'{html.escape(item["question"])}<br><b class="{css(ok)}">{reply}</b>{truth}'
    return f"<figure>{image(folder / item['file'])}{text}</figure>"


def small_object_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """An image with a question and the two answers of the model."""
    lines = [html.escape(item["question"])]
    for view, name in (("slices", "slices"), ("global_view", "whole")):
        ok = item[view] == item["truth"]
        lines.append(f'{name}: <b class="{css(ok)}">{html.escape(item[view]) or "no answer"}</b>')
    return f"<figure>{image(folder / item['file'])}{'<br>'.join(lines)}</figure>"


def caption_figure(folder: pathlib.Path, item: dict[str, Any]) -> str:
    """An image with the model's caption."""
    ok = item["caption"] == item["truth"]
    truth = "" if ok else f"<br><small>{html.escape(item['truth'])}</small>"
    caption = html.escape(item["caption"]) or "no caption"
    return f'<figure>{image(folder / item["file"])}<span class="{css(ok)}">{caption}</span>{truth}</figure>'


def css(ok: bool) -> str:
    """The class of right or wrong text."""
    return "ok" if ok else "no"


# examples of an evaluator: their name, title, a note, the function that draws one, and a class of the style sheet
EXAMPLES = (
    ("edits", "Edits", "The source, the result of each instruction, and the right result.", edit_figure, "strips"),
    ("compositions", "Compositions", "The images of the prompt and, last, the result.", composition_figure, "strips"),
    (
        "small_objects",
        "Questions on small objects",
        "The answer with slices, and the answer from the whole image alone.",
        small_object_figure,
        "",
    ),
    (
        "stories",
        "Stories",
        "Documents that start with a caption and an image. The model wrote the texts and drew the images that follow, "
        "each text before its image.",
        story_figure,
        "strips",
    ),
    (
        "assessments",
        "Assessments",
        "A generated image, its prompt, and what the model says about it; the verdict of the exact judge is below if "
        "it differs.",
        assessment_figure,
        "",
    ),
    (
        "questions",
        "Questions",
        "The model's answer is bold; the right one is in parentheses if it differs.",
        question_figure,
        "",
    ),
    ("captions", "Captions", "The model's caption, and below it the right one if it differs.", caption_figure, ""),
)


# ---- Curves, time, versions ------------------------------------------------------------------------------------------


def curves(run: pathlib.Path) -> list[str]:
    """Loss of every stage on training and held-out data, and the keep rates of the selector."""
    found = []
    for stage in STAGES:
        rows = [r for r in read(run / stage, "evals.jsonl") if "loss" in r]
        found.append(curve(f"{stage}, loss", points(read(run / stage), "loss"), points(rows, "loss")))
    for key in ("keep_rate_sampled", "keep_rate_argmax"):
        name = f"selector, {key.replace('_', ' ')}"
        held_out = points(read(run / "selector", "evals.jsonl"), key)
        found.append(curve(name, points(read(run / "selector"), key), held_out))
    legend = (
        f'<p class="note"><b style="color:{TRAINING_COLOR}">—</b> training (mean since the last logged step) &nbsp; '
        f'<b style="color:{HELD_OUT_COLOR}">●</b> held-out data</p>'
    )
    return ["<h2>Curves</h2>", legend, f'<div class="curves">{"".join(found)}</div>']


Points = list[tuple[float, float]]


def points(rows: list[dict[str, Any]], key: str) -> Points:
    """(step, value) of all rows that have the value."""
    return [(row["step"], row[key]) for row in rows if key in row]


def curve(name: str, training: Points, held_out: Points) -> str:
    """An SVG of a training curve with first and last value, and of held-out values as points; "" without a curve."""
    if len(training) < 2:
        return ""
    width, height, side, top, bottom = 350, 160, 10, 42, 24
    both = training + held_out
    first, last = training[0][0], max(p[0] for p in both)
    low, high = min(p[1] for p in both), max(p[1] for p in both)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = side + (point[0] - first) / max(last - first, 1) * (width - 2 * side)
        return x, top + (high - point[1]) / max(high - low, 1e-9) * (height - top - bottom)

    def text(x: float, y: float, words: str, size: int = 11, color: str = "#5b6675", anchor: str = "start") -> str:
        return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{words}</text>'

    def line(found: Points, color: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, found))
        return f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{path}"/>'

    values = f"{training[0][1]:.3g} → {training[-1][1]:.3g}"
    parts = [text(side, 16, name, 12, "#1c2430"), text(side, 32, values, 11, TRAINING_COLOR)]
    parts += [text(side, height - 7, f"step {first}"), text(width - side, height - 7, str(last), anchor="end")]
    parts.append(line(training, TRAINING_COLOR))
    if held_out:
        parts.append(text(width - side, 32, f"held-out {held_out[-1][1]:.3g}", 11, HELD_OUT_COLOR, "end"))
        parts.append(line(held_out, HELD_OUT_COLOR))
        for x, y in map(place, held_out):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{HELD_OUT_COLOR}"/>')
    return f'<svg width="{width}" height="{height}">{"".join(parts)}</svg>'


def time_table(seconds: dict[str, float], spent: dict[str, dict[str, float]]) -> list[str]:
    """Seconds per stage, with bars. Stages other than training have those of their last start.

    Args:
      spent: training stage → what → seconds other than on steps.
    """
    longest, rows = max(seconds.values()), []
    for stage, value in seconds.items():
        parts = {what: spent[stage].get(what, 0.0) for what in SPENT if what != "steps"} if stage in spent else {}
        parts = {"steps": value - sum(parts.values())} | parts if parts else {}
        bars = [(SPENT[what], part) for what, part in parts.items()] or [("#c3c9d1", value)]
        bar = "".join(
            f'<span class="bar" style="width:{220 * part / longest:.1f}px;background:{color}"></span>'
            for color, part in bars
        )
        cells = "".join(f'<td class="n">{parts[what]:.0f}</td>' if parts else "<td></td>" for what in SPENT)
        rows.append(
            f'<tr><td>{stage}</td><td class="n">{value:.0f}</td>{cells}<td style="white-space:nowrap">{bar}</td></tr>'
        )
    names = "".join(f'<th class="n" style="color:{color}">{what}</th>' for what, color in SPENT.items())
    head = f'<tr><th>stage</th><th class="n">seconds</th>{names}<th></th></tr>'
    rows.append(f'<tr><th>all</th><th class="n">{sum(seconds.values()):.0f}</th></tr>')
    note = (
        '<p class="note">Seconds of each stage, and what training spent them on. "prepare" opens the data and makes or '
        'reads the parameters, "compile" is that of the train step, "input" waits for batches. Training counts '
        "all its starts; the other stages count the last one, so what an interrupted start took is missing.</p>"
    )
    return ["<h2>Time</h2>", f"<table>{head}{''.join(rows)}</table>", note]


def versions() -> str:
    """Versions of Python and of the main packages."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"<h2>Versions</h2><p>{', '.join([f'Python {platform.python_version()}', *found])}</p>"


def commands(run: pathlib.Path) -> str:
    """The commands of the run, as its script noted them."""
    file = run / "commands.txt"
    if not file.exists():  # the stages were run one by one
        return "</html>"
    return f"<h2>Commands</h2><pre>{html.escape(file.read_text())}</pre></html>"
