"""Scores a trained model and writes `scores.json` and the pictures of the report.

A model of the embedded scenes gets the scenes benchmark; one of own pictures is asked for their captions.

python -m unimm_jax.evaluate --checkpoint=runs/stage3 --output=runs/evaluation
"""

import json
import pathlib
import time
from typing import Any

import numpy as np
from absl import app, flags

from unimm_jax import main as process
from unimm_jax.checkpoint import read_meta
from unimm_jax.data import scenes
from unimm_jax.data.pipeline import open_pictures
from unimm_jax.evals import scenes as benchmark
from unimm_jax.generate import Generator, Sampling
from unimm_jax.metrics import grid, kept_patches, labelled

# Fixed beforehand, the same for every model: unsharpened sampling, mild guidance.
SAMPLING = Sampling(guidance=1.5, temperature=1.0)
EVALUATION_SEED = 1000
UNET_PICTURES = 64


def evaluate(
    checkpoint: str, output: str, prompts: int = 50, per_kind: int = 200, pictures: int = 300, jitter: float = 1.0
) -> dict[str, Any]:
    """Scores on the test split: six drawing tasks, questions, captions, reconstruction; returns what it writes.

    Args:
      prompts: prompts a task. per_kind: questions a kind. pictures: test scenes for captions and reconstruction.
      jitter: placement difficulty of the test scenes (`scenes.draw_scene`).
    """
    began = time.perf_counter()
    generator = Generator(checkpoint, batch=64)
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    size = generator.config.data.image_size
    seed = EVALUATION_SEED
    test = [scenes.draw_scene(seed, "test", i, jitter) for i in range(pictures)]
    images = np.stack([scenes.render(s, size) for s in test])

    # Reconstruction from codes, by every decoder there is; the better one draws for the rest.
    codes, keep = generator.tokenize(images)
    reconstruction, drawn = {}, {}
    for name in generator.decoders:
        count = UNET_PICTURES if name == "unet" else pictures  # diffusion takes forty passes a picture
        drawn[name] = generator.decode(codes[:count], keep[:count], name)
        reconstruction[name] = _objects_found(test, drawn[name])
    # The same number of tokens a picture, chosen by chance instead of by the selector, through the same weights.
    chance = np.argsort(np.random.default_rng(seed).random(keep.shape), -1).argsort(-1) < keep.sum(-1, keepdims=True)
    by_chance = generator.decode(generator.tokenize(images, chance)[0], chance)
    best = max(reconstruction, key=lambda name: reconstruction[name])
    counts = np.array([len(s.objects) for s in test])
    tokens = keep.sum(-1)

    items = [scenes.draw_prompt(task, seed, i) for task in scenes.TASKS for i in range(prompts)]
    ids = generator.draw_ids([p.text for p in items], SAMPLING, seed)
    samples = generator.decode(*generator.codes(ids), best)
    verdicts = [benchmark.judge(p, benchmark.detect(x)) for p, x in zip(items, samples, strict=True)]
    by_task = lambda k: {
        task: float(np.mean([v[k] for p, v in zip(items, verdicts, strict=True) if p.task == task]))
        for task in scenes.TASKS
    }
    loose, strict = by_task(0), by_task(1)

    asked = benchmark.test_questions(seed, per_kind, jitter)
    seen = {i: scenes.render(scenes.draw_scene(seed, "test", i, jitter), size) for i in {row[0] for row in asked}}
    replies = generator.answer(np.stack([seen[row[0]] for row in asked]), [row[1] for row in asked])
    right = [reply == row[2] for reply, row in zip(replies, asked, strict=True)]
    kinds = {
        kind: float(np.mean([r for r, row in zip(right, asked, strict=True) if row[3] == kind]))
        for kind in scenes.QUESTION_KINDS
    }

    captions = generator.answer(images, [""] * len(images))
    truths = [scenes.captions(s)[0] for s in test]
    caption = [benchmark.caption_score(a, b) for a, b in zip(captions, truths, strict=True)]

    scores: dict[str, Any] = {
        "text_to_image": loose | {"overall": float(np.mean(list(loose.values())))},
        "text_to_image_strict": strict | {"overall": float(np.mean(list(strict.values())))},
        "questions": kinds | {"overall": float(np.mean(list(kinds.values())))},
        "caption": {"content_words": float(np.mean(caption)), "exact": float(np.mean(np.equal(captions, truths)))},
        "reconstruction": reconstruction[best],
        "reconstruction_by_decoder": reconstruction,
        "reconstruction_random_selection": _objects_found(test, by_chance),
        "decoder": best,
        "tokens_per_image": float(tokens.mean()),
        "tokens_follow_objects": rank_correlation(tokens, counts),
        "sampling": vars(SAMPLING),
        "prompts_per_task": prompts,
        "questions_per_kind": per_kind,
        "jitter": jitter,
        "evaluation_seconds": 0.0,
    }
    for name, found in drawn.items():
        write_picture(folder / f"reconstruction_{name}.png", grid([*images[:12], *found[:12]], 12))
    write_picture(
        folder / "kept.png", grid([kept_patches(i, k) for i, k in zip(images[:24], keep[:24], strict=True)], 12)
    )
    shown = [i for task in range(len(scenes.TASKS)) for i in range(task * prompts, task * prompts + min(8, prompts))]
    for i in shown:
        write_picture(folder / f"sample_{i:04d}.png", samples[i].repeat(2, 0).repeat(2, 1))
    sheet = labelled(
        [*(kept_patches(x, k) for x, k in zip(images[:8], keep[:8], strict=True)), *(samples[i] for i in shown)],
        [*(f"keeps {int(k.sum())} of {len(k)} patches" for k in keep[:8]), *(items[i].text for i in shown)],
        columns=8,
        scale=max(128 // size, 1),
    )
    write_picture(folder / "samples.png", sheet)
    for i in range(12):
        write_picture(folder / f"picture_{i:02d}.png", images[i].repeat(2, 0).repeat(2, 1))
    examples = {
        "samples": [
            dict(
                task=items[i].task,
                prompt=items[i].text,
                file=f"sample_{i:04d}.png",
                right=bool(verdicts[i][0]),
                strict=bool(verdicts[i][1]),
            )
            for i in shown
        ],
        "questions": [
            dict(zip(("scene", "question", "truth", "kind"), row, strict=True), reply=reply)
            for row, reply in list(zip(asked, replies, strict=True))[:40]
        ],
        "captions": [dict(file=f"picture_{i:02d}.png", caption=captions[i], truth=truths[i]) for i in range(12)],
    }
    for row in examples["questions"]:
        row["file"] = f"question_{row['scene']}.png"
        write_picture(folder / row["file"], seen[row["scene"]].repeat(2, 0).repeat(2, 1))
    (folder / "examples.json").write_text(json.dumps(examples, indent=1))
    scores["evaluation_seconds"] = round(time.perf_counter() - began, 1)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    (folder / "done.json").write_text("{}")
    return scores


def _objects_found(test: list[scenes.Scene], drawn: np.ndarray) -> float:
    """Share of the objects of the scenes drawn that are found again."""
    pairs = list(zip(test, drawn, strict=False))
    return sum(benchmark.objects_right(s, benchmark.detect(x)) for s, x in pairs) / sum(
        len(s.objects) for s, _ in pairs
    )


def evaluate_pictures(checkpoint: str, output: str) -> dict[str, Any]:
    """Scores a model of own pictures on what it was trained on: captions word for word, cut at 12 words."""
    began = time.perf_counter()
    generator = Generator(checkpoint, batch=64, answer_length=64)
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = generator.tokenizer_config.data
    settings.sources = generator.header["sources"]
    found = [item for p in open_pictures(settings) for i in range(len(p)) if (item := p.load(i)) is not None]
    images = np.stack([item["image"] for item in found])
    cut = lambda text: " ".join(text.split()[:12])
    truths = [cut(item["captions"][0]) for item in found]
    captions = [cut(c) for c in generator.answer(images, [""] * len(images))]
    codes, keep = generator.tokenize(images)
    shown = np.linspace(0, len(found) - 1, 24).astype(int)
    for name in generator.decoders:
        drawn = generator.decode(codes[shown], keep[shown], name)
        write_picture(folder / f"reconstruction_{name}.png", grid([*images[shown][:12], *drawn[:12]], 12))
    samples = generator.draw([truths[i] for i in shown], SAMPLING, EVALUATION_SEED)
    write_picture(folder / "kept.png", grid([kept_patches(images[i], keep[i]) for i in shown], 12))
    for i, sample in zip(shown, samples, strict=True):
        write_picture(folder / f"sample_{i:04d}.png", sample.repeat(2, 0).repeat(2, 1))
        write_picture(folder / f"picture_{i:04d}.png", images[i].repeat(2, 0).repeat(2, 1))
    examples = {
        "samples": [dict(task="own captions", prompt=truths[i], file=f"sample_{i:04d}.png") for i in shown],
        "questions": [],
        "captions": [dict(file=f"picture_{i:04d}.png", caption=captions[i], truth=truths[i]) for i in shown],
    }
    scores: dict[str, Any] = {
        "caption": {"exact": float(np.mean(np.equal(captions, truths)))},
        "pictures": len(found),
        "tokens_per_image": float(keep.sum(-1).mean()),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
    }
    (folder / "examples.json").write_text(json.dumps(examples, indent=1))
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    (folder / "done.json").write_text("{}")
    return scores


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one side is constant."""
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def write_picture(file: pathlib.Path, image: np.ndarray) -> None:
    """Saves uint8 [H, W, 3] as PNG."""
    from unimm_jax.data.transforms import encode_png

    file.write_bytes(encode_png(image))


def table(scores: dict[str, Any]) -> str:
    """The scores as lines of text."""
    if "text_to_image" not in scores:
        return (
            f"{'captions word for word':34s} {scores['caption']['exact']:7.3f} of {scores['pictures']} pictures\n"
            f"{'tokens a picture':34s} {scores['tokens_per_image']:7.2f}"
        )
    rows = [f"{'text to image':34s} {'right':>7s} {'strict':>7s}"]
    for task, value in scores["text_to_image"].items():
        rows.append(f"  {task.replace('_', ' '):32s} {value:7.3f} {scores['text_to_image_strict'][task]:7.3f}")
    rows.append(f"{'questions':34s} {'right':>7s}")
    rows += [f"  {kind:32s} {value:7.3f}" for kind, value in scores["questions"].items()]
    rows.append(f"{'captions, content words right':34s} {scores['caption']['content_words']:7.3f}")
    rows.append(f"{'reconstruction from codes':34s} {scores['reconstruction']:7.3f}")
    for name, value in scores["reconstruction_by_decoder"].items():
        rows.append(f"  {'U-Net' if name == 'unet' else 'direct decoder':32s} {value:7.3f}")
    rows.append(f"{'  patches kept by chance instead':34s} {scores['reconstruction_random_selection']:7.3f}")
    rows.append(f"{'tokens a picture':34s} {scores['tokens_per_image']:7.2f}")
    rows.append(f"{'  rank correlation with objects':34s} {scores['tokens_follow_objects']:7.2f}")
    return "\n".join(rows)


def main(_: list[str]) -> None:
    """Runs the command."""
    process.quiet()
    f = flags.FLAGS

    def command() -> None:
        if read_meta(f.checkpoint)["data"]["sources"].startswith("scenes"):
            scores = evaluate(f.checkpoint, f.output, f.prompts, f.questions, f.pictures, f.jitter)
        else:
            scores = evaluate_pictures(f.checkpoint, f.output)
        print(table(scores), flush=True)

    process.run(command)


if __name__ == "__main__":
    process.prepare_process()
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
    flags.DEFINE_string("output", "evaluation", "Folder for scores.json and pictures.")
    flags.DEFINE_integer("prompts", 50, "Prompts a task.", lower_bound=1)
    flags.DEFINE_integer("questions", 200, "Questions a kind.", lower_bound=1)
    flags.DEFINE_integer("pictures", 300, "Test scenes for captions and reconstruction.", lower_bound=12)
    flags.DEFINE_float("jitter", 1.0, "Placement of the test scenes: 1 near cell centres, above 4 free.")
    app.run(main)
