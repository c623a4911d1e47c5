"""The scores of `scores.json` as text."""

from typing import Any

SPLIT_NAMES = {"test": "held-out images", "train": "training images", "all": "all images"}
EDIT_REFERENCES = {
    "copied": "source copied",
    "without_source": "source not read",
    "other_source": "another source",
}
DECODER_NAMES = {
    "pixel_decoder": "pixel decoder",
    "unet_decoder": "U-Net decoder",
    "unet_decoder_high": "high-resolution U-Net decoder",
}


def table(scores: dict[str, Any]) -> str:
    """The scores as lines of text."""
    rows: list[str] = []
    if "questions" in scores:
        rows += _scenes(scores)
    elif "images" in scores:
        rows += _captions(scores)
    for title, column, values in sections(scores):
        rows.append(f"{title:34s} {column:>7s}")
        rows += [f"  {name:32s} {value:7.3f}" for name, value in values]
    if "own_images" in scores:
        rows += ["own images", *(f"  {row}" for row in _captions(scores["own_images"], 32))]
    if found := answers_of(scores):
        rows += [f"{name:34s} {value:7.3f}" for name, value in answer_scores(found)]
    held_out = scores.get("held_out") or (scores if "loss" in scores else {})
    if "loss" in held_out:
        rows.append(f"{'held-out loss':34s} {held_out['loss']:7.3f}")
    return "\n".join(rows)


def sections(scores: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """Title, name of the column, and names and values of each evaluator in `SECTIONS` that ran."""
    return [(title, column, rows(scores)) for key, title, column, rows in SECTIONS if key in scores]


def edit_scores(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and values of the scores of the evaluator `edits`."""
    found = [(kind, value) for kind, value in scores["edit_single_by_kind"].items() if kind != "overall"]
    found.append(("one edit", scores["edit_single"]))
    found += _exact(scores, "one edit", "edit_single")
    if "edit_exact_reconstruction" in scores:
        found.append(("target reconstructed, the same", scores["edit_exact_reconstruction"]))
    found += _references(scores, "one edit", "edit_single")
    found += [("first of two edits", scores["edit_first_of_two"]), ("two edits", scores["edit_two_turns"])]
    found += _exact(scores, "two edits", "edit_two_turns")
    return found + _references(scores, "two edits", "edit_two_turns")


def _references(scores: dict[str, Any], name: str, key: str) -> list[tuple[str, float]]:
    found = {f"{name}, {reference}": f"{key}_{suffix}" for suffix, reference in EDIT_REFERENCES.items()}
    return [(label, scores[score]) for label, score in found.items() if score in scores]


def _exact(scores: dict[str, Any], name: str, key: str) -> list[tuple[str, float]]:
    return [(f"{name}, rest unchanged", scores[f"{key}_exact"])] if f"{key}_exact" in scores else []


def composition_scores(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and values of the scores of the evaluator `compositions`."""
    names = {"image_text": "image and text", "image_image": "two images", "overall": "overall"}
    found = [(names[kind], value) for kind, value in scores["composition_by_kind"].items()]
    changes = {"without_first": "without the first part", "without_second": "without the second part"}
    changes |= {"other_first": "another first part", "other_second": "another second part"}
    found += [(name, scores[f"composition_{key}"]) for key, name in changes.items() if f"composition_{key}" in scores]
    if "composition_zero_shot" in scores:
        found.append(("zero-shot, after stage 2", scores["composition_zero_shot"]))
    return found


def small_object_scores(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and values of the scores of the evaluator `small_objects`."""
    found = []
    for key, name in (("small_objects", ""), ("small_objects_across", "across patches, ")):
        if key in scores:
            found.append((f"{name}read with slices", scores[key]["slices"]))
            found.append((f"{name}as a whole only", scores[key]["global_view"]))
            found += _difference(scores[key])
    return found


def story_scores(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and values of the scores of the evaluator `stories`."""
    names = {
        "story_image": "image after an instruction",
        "story_image_start": "[IMG] after an instruction",
        "story_image_without_image": "image, source not read",
        "story_consistent": "documents continued freely",
        "story_instruction": "their first text",
        "story_images": "their new images",
    }
    return [(name, scores[key]) for key, name in names.items()]


def assessment_scores(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and values of the scores of the evaluator `assessments`."""
    numbers, chosen = scores["assessment_drawings"], scores["best_of_4"]
    found = [("agree with the exact judge", scores["assessment_agreement"])]
    sides = scores["assessment_agreement_by_side"].items()
    found += [(f"  of {numbers[side]} {side} images", value) for side, value in sides]
    found += [(f"  {name}", value) for name, value in scores["assessment_agreement_by_category"].items()]
    found += [("not readable", scores["assessment_unparsed"]), ("one sample right", chosen["one_sample"])]
    found += [("best of 4 by the model right", chosen["best_of_4"]), *_difference(chosen)]
    return [*found, ("any of 4 right", chosen["oracle"])]


def _difference(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """The difference of two scores and its interval; nothing in scores of older versions, which lack them."""
    if "difference" not in scores:
        return []
    low, high = scores["interval"]
    return [("  difference", scores["difference"]), ("  95% interval, low", low), ("  95% interval, high", high)]


def answers_of(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores of the evaluator `answers`, alone or beside others; empty if it did not run."""
    found = scores.get("answers", {})
    return found if "split" in found else scores if found else {}


def answer_scores(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and values of the scores of `answers_of`."""
    found, which = scores["answers"], SPLIT_NAMES[scores["split"]]
    turns = [(f"  turn {name[5:]}", value) for name, value in found.items() if name.startswith("turn_")]
    return [(f"{found['number']} answers, {which}", found["exact"]), *(turns if len(turns) > 1 else [])]


def _scenes(scores: dict[str, Any]) -> list[str]:
    rows = []
    if "text_to_image" in scores:
        rows.append(f"{'text to image':34s} {'right':>7s} {'strict':>7s}")
        for task, value in scores["text_to_image"].items():
            rows.append(f"  {task.replace('_', ' '):32s} {value:7.3f} {scores['text_to_image_strict'][task]:7.3f}")
    rows.append(f"{'questions':34s} {'right':>7s}")
    rows += [f"  {kind:32s} {value:7.3f}" for kind, value in scores["questions"].items()]
    rows.append(f"{'captions, content words right':34s} {scores['caption']['content_words']:7.3f}")
    if "reconstruction" in scores:
        rows.append(f"{'reconstruction from codes':34s} {scores['reconstruction']:7.3f}")
        for name, value in scores["reconstruction_by_decoder"].items():
            rows.append(f"  {DECODER_NAMES.get(name, name):32s} {value:7.3f}")
        rows.append(f"{'  patches kept at random instead':34s} {scores['reconstruction_random_selection']:7.3f}")
    rows.append(f"{'tokens per image':34s} {scores['tokens_per_image']:7.2f}")
    rows.append(f"{'  rank correlation with objects':34s} {scores['tokens_follow_objects']:7.2f}")
    return rows


def _captions(scores: dict[str, Any], width: int = 34) -> list[str]:
    which = SPLIT_NAMES[scores.get("split", "train")]  # older versions scored training images
    rows = [
        f"{'captions right word for word':{width}s} {scores['caption']['exact']:7.3f} of {scores['images']} {which}"
    ]
    if "words" in scores["caption"]:
        rows.append(f"{'captions, words right':{width}s} {scores['caption']['words']:7.3f}")
    rows.append(f"{'tokens per image':{width}s} {scores['tokens_per_image']:7.2f}")
    return rows


# a score of an evaluator, its title, the name of the column, and the function that gives the rows
SECTIONS = (
    ("edit_single", "edits", "right", edit_scores),
    ("composition", "compositions", "right", composition_scores),
    ("small_objects", "questions on small objects", "right", small_object_scores),
    ("story_image", "stories", "right", story_scores),
    ("assessment_agreement", "assessments of own images", "share", assessment_scores),
)
