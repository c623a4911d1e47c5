"""The scenes benchmark: text-to-image tasks, questions, captions and reconstruction on test scenes."""

import dataclasses
from typing import Any

import numpy as np

from unimm_jax.config import ranged
from unimm_jax.data import scenes
from unimm_jax.evals import scene_detector as detector
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.generation import EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.sampling import Sampling
from unimm_jax.plotting import enlarged, grid, kept_patches, labelled

DIFFUSION_IMAGES = 64  # test scenes that a diffusion decoder reconstructs; it takes many passes per image
SHOWN_IMAGES, SHOWN_PROMPTS, SHOWN_QUESTIONS = 12, 8, 40  # in the report; prompts per task


@dataclasses.dataclass(frozen=True)
class ScenesOptions(Options):
    """Options.

    Attributes:
      prompts: prompts per text-to-image task. questions: questions per kind.
      images: test scenes for captions and reconstruction.
      jitter: placement of the objects of test scenes, see `scenes.draw_scene`.
      guidance: classifier-free guidance of text-to-image.
    """

    prompts: int = ranged(50, low=1)
    questions: int = ranged(200, low=1)
    images: int = ranged(300, low=1)
    jitter: float = ranged(1.0, low=0)
    guidance: float = ranged(1.5, low=0)


@dataclasses.dataclass(frozen=True)
class DrawnScenes:
    """Test scenes in order, their images uint8 [N, S, S, 3], and their codes and keep masks [N, P]."""

    scenes: list[scenes.Scene]
    images: np.ndarray
    codes: np.ndarray
    keep: np.ndarray


class Scenes(GeneratingEvaluator):
    """The benchmark on the test split. The scenes, prompts and seeds are the same at every call and for every model.

    Without a decoder beside the model, nothing that needs images from codes is scored.
    """

    options = ScenesOptions

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        s: ScenesOptions = self.settings
        sampling = Sampling(guidance=s.guidance, temperature=1.0)
        test = draw_test_scenes(generator, s.images, s.jitter)
        result = Result({}, settings={"sampling": dataclasses.asdict(sampling), "prompts_per_task": s.prompts})
        result.settings |= {"questions_per_kind": s.questions, "jitter": s.jitter}
        reconstruction = score_reconstruction(generator, test)
        sheets: tuple[list[np.ndarray], list[str]] = ([], [])
        if self.can_draw(generator, context, "text-to-image"):
            drawing, sheets = score_text_to_image(generator, reconstruction.scores["decoder"], s.prompts, sampling)
            result.add(drawing)
        result.add(score_questions(generator, s.questions, s.jitter))
        result.add(score_captions(generator, test))
        result.add(reconstruction)
        result.scores |= {
            "tokens_per_image": float(test.keep.sum(-1).mean()),
            "tokens_follow_objects": rank_correlation(test.keep.sum(-1), [len(x.objects) for x in test.scenes]),
        }
        kept = [kept_patches(image, keep) for image, keep in zip(test.images[:24], test.keep[:24], strict=True)]
        if generator.header["selection"] != "all":
            result.images["kept"] = grid(kept, SHOWN_IMAGES)
        notes = [f"keeps {int(keep.sum())} of {len(keep)} patches" for keep in test.keep[:SHOWN_PROMPTS]]
        result.images["samples"] = labelled([*kept[:SHOWN_PROMPTS], *sheets[0]], [*notes, *sheets[1]], SHOWN_PROMPTS)
        return result


def draw_test_scenes(generator: Generator, count: int, jitter: float) -> DrawnScenes:
    """The first `count` test scenes, tokenized."""
    found = [scenes.draw_scene(EVALUATION_SEED, "test", i, jitter) for i in range(count)]
    images = np.stack([scenes.render(scene, generator.config.data.image_size) for scene in found])
    return DrawnScenes(found, images, *generator.tokenize(images))


def score_reconstruction(generator: Generator, test: DrawnScenes) -> Result:
    """Share of the objects that are found again in images decoded from codes, by decoder.

    The best decoder's score is "reconstruction". "reconstruction_random_selection" keeps as many patches per image,
    chosen at random instead of by the selector, with the same weights.
    """
    result, by_decoder = Result({}), {}
    for name in generator.decoders:
        count = decoded_images(generator, name, len(test.images))
        decoded = generator.decode(test.codes[:count], test.keep[:count], name)
        by_decoder[name] = objects_found(test.scenes, decoded)
        shown = [*test.images[:SHOWN_IMAGES], *decoded[:SHOWN_IMAGES]]
        result.images[f"reconstruction_{name}"] = grid(shown, min(SHOWN_IMAGES, len(test.images)))
    if not by_decoder:
        return result
    best, first = max(by_decoder, key=lambda name: by_decoder[name]), next(iter(by_decoder))
    order = np.random.default_rng(EVALUATION_SEED).random(test.keep.shape).argsort(-1).argsort(-1)
    random_keep = order < test.keep.sum(-1, keepdims=True)
    count = decoded_images(generator, first, len(test.images))
    codes, keep = generator.tokenize(test.images[:count], random_keep[:count])
    result.scores = {
        "reconstruction": by_decoder[best],
        "reconstruction_by_decoder": by_decoder,
        "reconstruction_random_selection": objects_found(test.scenes, generator.decode(codes, keep, first)),
        "decoder": best,
    }
    return result


def decoded_images(generator: Generator, decoder: str, count: int) -> int:
    """How many of `count` test scenes a decoder reconstructs."""
    is_diffusion = bool(generator.decoders[decoder][0].size_unit)
    return min(DIFFUSION_IMAGES, count) if is_diffusion else count


def objects_found(test: list[scenes.Scene], decoded: np.ndarray) -> float:
    """Share of the objects of the decoded scenes that are found again."""
    pairs = list(zip(test, decoded, strict=False))
    right = sum(detector.objects_right(scene, detector.detect(image)) for scene, image in pairs)
    return right / sum(len(scene.objects) for scene, _ in pairs)


def draw_and_judge(
    generator: Generator, decoder: str, prompts: int, sampling: Sampling
) -> tuple[list[scenes.Prompt], np.ndarray, list[tuple[bool, bool]]]:
    """Draws `prompts` prompts of each task: (prompts, images uint8 [N, S, S, 3], verdicts as of `detector.judge`)."""
    items = [scenes.draw_prompt(task, EVALUATION_SEED, i) for task in scenes.TASKS for i in range(prompts)]
    ids = generator.generate_image_tokens([item.text for item in items], sampling, EVALUATION_SEED)
    samples = generator.decode(*generator.codes(ids), decoder)
    verdicts = [detector.judge(item, detector.detect(image)) for item, image in zip(items, samples, strict=True)]
    return items, samples, verdicts


def score_text_to_image(
    generator: Generator, decoder: str, prompts: int, sampling: Sampling
) -> tuple[Result, tuple[list[np.ndarray], list[str]]]:
    """The six text-to-image tasks: (result, (images, prompts) of the first prompts of each task)."""
    items, samples, verdicts = draw_and_judge(generator, decoder, prompts, sampling)

    def by_task(rule: int) -> dict[str, float]:
        right = np.array([verdict[rule] for verdict in verdicts]).reshape(len(scenes.TASKS), prompts).mean(-1)
        return with_overall(dict(zip(scenes.TASKS, right.tolist(), strict=True)))

    shown = [i for i in range(len(items)) if i % prompts < SHOWN_PROMPTS]
    rows = [
        {
            "task": items[i].task,
            "prompt": items[i].text,
            "file": f"sample_{i:04d}.png",
            "image": enlarged(samples[i]),
            "right": bool(verdicts[i][0]),
            "strict": bool(verdicts[i][1]),
        }
        for i in shown
    ]
    scores = {"text_to_image": by_task(0), "text_to_image_strict": by_task(1)}
    return Result(scores, examples={"samples": rows}), ([samples[i] for i in shown], [items[i].text for i in shown])


def ask(
    generator: Generator, per_kind: int, jitter: float
) -> tuple[list[tuple[int, str, str, str]], dict[int, np.ndarray], list[str]]:
    """Asks the question set: (questions as of `detector.question_set`, images by the number of the scene, replies)."""
    asked = detector.question_set(EVALUATION_SEED, per_kind, jitter)
    size = generator.config.data.image_size
    seen = {
        index: scenes.render(scenes.draw_scene(EVALUATION_SEED, "test", index, jitter), size)
        for index in {row[0] for row in asked}
    }
    replies = generator.generate_text(np.stack([seen[row[0]] for row in asked]), [row[1] for row in asked])
    return asked, seen, replies


def score_questions(generator: Generator, per_kind: int, jitter: float) -> Result:
    """Share of exact answers, by kind of question."""
    asked, seen, replies = ask(generator, per_kind, jitter)
    by_kind: dict[str, list[bool]] = {kind: [] for kind in scenes.QUESTION_KINDS}
    rows: list[dict[str, Any]] = []
    for (index, question, truth, kind), reply in zip(asked, replies, strict=True):
        by_kind[kind].append(reply == truth)
        rows.append(dict(scene=index, question=question, truth=truth, kind=kind, reply=reply))
    for row in rows[:SHOWN_QUESTIONS]:
        row |= {"file": f"question_{row['scene']}.png", "image": enlarged(seen[row["scene"]])}
    scores = with_overall({kind: float(np.mean(right)) for kind, right in by_kind.items()})
    return Result({"questions": scores}, examples={"questions": rows[:SHOWN_QUESTIONS]})


def score_captions(generator: Generator, test: DrawnScenes) -> Result:
    """Right content words, and captions that are right word for word."""
    captions = generator.generate_text(test.images, [""] * len(test.images))
    truths = [scenes.captions(scene)[0] for scene in test.scenes]
    words = [detector.caption_score(a, b) for a, b in zip(captions, truths, strict=True)]
    exact = [a == b for a, b in zip(captions, truths, strict=True)]
    rows = [
        dict(file=f"image_{i:02d}.png", image=enlarged(test.images[i]), caption=captions[i], truth=truths[i])
        for i in range(min(SHOWN_IMAGES, len(captions)))
    ]
    scores = {"content_words": float(np.mean(words)), "exact": float(np.mean(exact))}
    return Result({"caption": scores}, examples={"captions": rows})


def with_overall(scores: dict[str, float]) -> dict[str, float]:
    """The scores and their mean as "overall"."""
    return scores | {"overall": float(np.mean(list(scores.values())))}


def rank_correlation(a: np.ndarray, b: list[int]) -> float:
    """Spearman's; 0 where one side is constant."""
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)
