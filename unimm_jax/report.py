"""The quickstart's page: one self-contained HTML file with scores, curves, pictures, questions and commands.

python -m unimm_jax.report --run=runs/quickstart
"""

import base64
import html
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

from absl import app, flags

from unimm_jax import evaluate
from unimm_jax import main as process
from unimm_jax.metrics import read

STAGES = (
    "encoder", "selector", "tokenizer", "records", "pixel_decoder", "detokenizer", "text", "stage1", "stage2", "stage3",
)  # fmt: skip
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;max-width:1080px;margin:2rem auto;padding:0 1rem;background:#fff}
h1{font-size:1.7rem}h2{font-size:1.15rem;margin-top:2.4rem;border-bottom:1px solid #dde3ea;padding-bottom:.3rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .9rem .2rem 0;text-align:left}
td.n,th.n{text-align:right}figure{display:inline-block;margin:.2rem;vertical-align:top;width:122px;font-size:12px}
figure img{width:120px;border:1px solid #ccd4dd}.wide img{max-width:100%;image-rendering:pixelated}
.ok{color:#0a7d36}.no{color:#b3261e}pre{background:#f4f6f8;padding:.8rem;overflow:auto;font-size:13px}
svg{background:#f9fafb;border:1px solid #dde3ea;margin:.3rem}small{color:#5b6675}
"""


def picture(file: pathlib.Path) -> str:
    """An <img> that holds the file itself."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def curve(name: str, rows: list[dict[str, float]], key: str = "loss") -> str:
    """One stage's curve as SVG, with first and last value."""
    points = [(r["step"], r[key]) for r in rows if key in r]
    if len(points) < 2:
        return ""
    width, height, left, low_edge = 330, 150, 8, 22
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    x = lambda v: left + (v - xs[0]) / max(xs[-1] - xs[0], 1) * (width - 2 * left)
    y = lambda v: 24 + (high - v) / max(high - low, 1e-9) * (height - 24 - low_edge)
    end = f'<text x="{width - left}" y="{height - 6}" font-size="11" fill="#5b6675" text-anchor="end">{xs[-1]}</text>'
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return (
        f'<svg width="{width}" height="{height}"><polyline fill="none" stroke="#2457c5" stroke-width="1.6" '
        f'points="{path}"/><text x="{left}" y="15" font-size="12">{name}: {key} {ys[0]:.3g} → {ys[-1]:.3g}</text>'
        f'<text x="{left}" y="{height - 6}" font-size="11" fill="#5b6675">step {xs[0]}</text>'
        f"{end}</svg>"
    )


def seconds_of(run: pathlib.Path) -> dict[str, float]:
    """Wall seconds of each finished stage."""
    files = {s: run / s / "done.json" for s in STAGES}
    return {s: json.loads(f.read_text())["seconds"] for s, f in files.items() if f.exists()}


def score_rows(scores: dict[str, Any]) -> str:
    """The score table as HTML rows."""
    row = lambda name, *values: f"<tr><td>{name}</td>" + "".join(f'<td class="n">{v}</td>' for v in values) + "</tr>"
    rows = ['<tr><th>text to image</th><th class="n">right</th><th class="n">nothing superfluous</th></tr>']
    for task, value in scores["text_to_image"].items():
        rows.append(row(task.replace("_", " "), f"{value:.3f}", f"{scores['text_to_image_strict'][task]:.3f}"))
    rows.append("<tr><th>questions</th></tr>")
    rows += [row(kind, f"{value:.3f}") for kind, value in scores["questions"].items()]
    rows.append("<tr><th>other</th></tr>")
    rows.append(row("captions, content words right", f"{scores['caption']['content_words']:.3f}"))
    for name, value in scores["reconstruction_by_decoder"].items():
        label = "U-Net, 20 DDIM steps" if name == "unet" else "direct decoder"
        rows.append(row(f"objects reconstructed from codes, {label}", f"{value:.3f}"))
    chance = scores["reconstruction_random_selection"]
    rows.append(row("the same with as many patches kept by chance (direct decoder)", f"{chance:.3f}"))
    rows.append(row("tokens a picture", f"{scores['tokens_per_image']:.2f}"))
    rows.append(row("rank correlation of tokens and objects", f"{scores['tokens_follow_objects']:.2f}"))
    return "\n".join(rows)


def build(run: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` and the run's `scores.json`; returns the page's path.

    Raises:
      ValueError: the run has not been evaluated.
    """
    folder = run / "evaluation"
    if not (folder / "scores.json").exists():
        raise ValueError(f"{folder} holds no scores.json; run python -m unimm_jax.evaluate first")
    scores = json.loads((folder / "scores.json").read_text())
    examples = json.loads((folder / "examples.json").read_text())
    seconds = seconds_of(run)
    free = run / "evaluation_free" / "scores.json"
    scores["seconds"] = seconds | {"evaluation": scores["evaluation_seconds"]}
    if free.exists():
        scores["free_placement"] = json.loads(free.read_text())
    (run / "scores.json").write_text(json.dumps(scores, indent=1))
    parts = [f"<!doctype html><meta charset=utf-8><title>unimm_jax</title><style>{STYLE}</style>"]
    total = sum(scores["seconds"].values())
    parts.append("<h1>unimm_jax: one language model that reads and draws, trained from nothing</h1>")
    parts.append(
        f"<p>Every stage trained in {total / 60:.1f} minutes ({total:.0f} s, installation apart). Pictures below are "
        "chosen by index, failures included.</p>"
    )
    if "text_to_image" in scores:
        parts.append(f"<h2>Scores</h2><table>{score_rows(scores)}</table>")
    else:
        parts.append(
            f"<h2>Scores</h2><p>Captions word for word (cut at 12 words): {scores['caption']['exact']:.3f} of "
            f"{scores['pictures']} training pictures; {scores['tokens_per_image']:.2f} tokens a picture.</p>"
        )
    if "free_placement" in scores:
        f = scores["free_placement"]
        parts.append(
            f"<p><small>Test scenes with free placement (the model has seen objects near cell centres only): questions "
            f"{f['questions']['overall']:.3f}, captions {f['caption']['content_words']:.3f}, reconstruction "
            f"{f['reconstruction']:.3f}.</small></p>"
        )
    parts.append(
        "<h2>Which patches are kept</h2><p>Dropped patches are faded; their content is merged into kept ones.</p>"
    )
    parts.append(f'<div class="wide">{picture(folder / "kept.png")}</div>')
    for file in sorted(folder.glob("reconstruction_*.png")):
        name = "U-Net" if "unet" in file.name else "direct decoder"
        parts.append(f'<h2>From codes back to pixels: {name}</h2><div class="wide">{picture(file)}</div>')
    parts.append("<h2>Prompt → picture</h2>")
    task = None
    for item in examples["samples"]:
        if item["task"] != task:
            task = item["task"]
            parts.append(f"<h3>{(task or '').replace('_', ' ')}</h3>")
        mark = (
            ""
            if item.get("right") is None
            else (
                f'<span class="{"ok" if item["right"] else "no"}">{"✓" if item["right"] else "✗"}'
                f"{'' if item['strict'] or not item['right'] else ' (something more)'}</span> "
            )
        )
        parts.append(f"<figure>{picture(folder / item['file'])}{mark}{html.escape(item['prompt'])}</figure>")
    if examples["questions"]:
        parts.append("<h2>Questions</h2>")
        for item in examples["questions"]:
            ok = item["reply"] == item["truth"]
            parts.append(
                f"<figure>{picture(folder / item['file'])}{html.escape(item['question'])}<br>"
                f'<b class="{"ok" if ok else "no"}">{html.escape(item["reply"])}</b>'
                f"{'' if ok else ' (' + html.escape(item['truth']) + ')'}</figure>"
            )
    parts.append("<h2>Captions</h2>")
    for item in examples["captions"]:
        ok = item["caption"] == item["truth"]
        parts.append(
            f'<figure>{picture(folder / item["file"])}<span class="{"ok" if ok else "no"}">'
            f"{html.escape(item['caption'])}</span>"
            f"{'' if ok else '<br><small>' + html.escape(item['truth']) + '</small>'}</figure>"
        )
    parts.append("<h2>Curves</h2>")
    parts += [curve(stage, read(run / stage)) for stage in STAGES]
    parts.append(curve("selector", read(run / "selector"), "rate_sampled"))
    parts.append(curve("selector", read(run / "selector"), "rate_argmax"))
    parts.append('<h2>Time</h2><table><tr><th>stage</th><th class="n">seconds</th></tr>')
    parts += [f'<tr><td>{s}</td><td class="n">{v:.0f}</td></tr>' for s, v in scores["seconds"].items()]
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = [f"Python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in packages)]
    parts.append(f"</table><h2>Versions</h2><p>{', '.join(versions)}")
    commands = (run / "commands.txt").read_text() if (run / "commands.txt").exists() else "bash launch/quickstart.sh"
    parts.append(f"</p><h2>Commands</h2><pre>{html.escape(commands)}</pre>")
    page = run / "report.html"
    page.write_text("\n".join(parts))
    return page


def main(_: list[str]) -> None:
    """Writes the page and prints the table."""
    process.quiet()
    run = pathlib.Path(flags.FLAGS.run)

    def command() -> None:
        page = build(run)
        scores = json.loads((run / "scores.json").read_text())
        print(evaluate.table(scores))
        print(f"{'seconds, all stages':34s} {sum(scores['seconds'].values()):7.0f}")
        print(f"report: {page}")

    process.run(command)


if __name__ == "__main__":
    flags.DEFINE_string("run", None, "Directory that holds the stages' workdirs.", required=True)
    app.run(main)
