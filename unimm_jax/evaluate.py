"""Evaluates a trained language stage: writes scores.json, examples and images, and prints a table.

python -m unimm_jax.evaluate --checkpoint=runs/stage3 --output=runs/evaluation [--evals=scenes,captions]
"""

from absl import flags

from unimm_jax import process
from unimm_jax.data.tasks import IMAGE_PROMPTS

OPTIONS = (
    "prompts", "questions", "images", "jitter", "edits", "chains", "compositions", "image_prompts", "stories",
    "small_questions", "scale", "small_jitter", "drawings", "best_of", "guidance", "temperature", "split", "sources",
    "batches", "batch_size",
)  # fmt: skip


def define_flags() -> None:
    """Defines the command's flags. Options that are not given are the evaluators' own."""
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
    flags.DEFINE_string("output", "evaluation", "Directory for scores.json, examples.json and images.")
    flags.DEFINE_list(
        "evals",
        [],
        "Evaluators (scenes, edits, compositions, stories, small_objects, assessments, captions, answers, loss); by "
        "the model's sources if empty.",
    )
    flags.DEFINE_integer("tensor", 1, "Devices over which the language model is split.", lower_bound=1)
    flags.DEFINE_integer("prompts", None, "scenes: prompts per task (50).")
    flags.DEFINE_integer("questions", None, "scenes: questions per kind (200).")
    flags.DEFINE_integer("images", None, "scenes: test scenes (300); captions, answers: images (600).")
    flags.DEFINE_float("jitter", None, "scenes: 1 places objects near cell centers, above 4 anywhere (1).")
    flags.DEFINE_integer("edits", None, "edits: single edits (200).")
    flags.DEFINE_integer("chains", None, "edits: chains of two edits (100).")
    flags.DEFINE_integer("compositions", None, "compositions: prompts (100).")
    flags.DEFINE_enum(
        "image_prompts", None, IMAGE_PROMPTS, "compositions: layout of the prompts; that of the model if not given."
    )
    flags.DEFINE_integer("stories", None, "stories: documents (100).")
    flags.DEFINE_integer("small_questions", None, "small_objects: questions per kind (100).")
    flags.DEFINE_float("scale", None, "small_objects: factor of the objects' radius (0.35).")
    flags.DEFINE_float("small_jitter", None, "small_objects: as jitter (1); 1/3 centers objects in patches of slices.")
    flags.DEFINE_integer("drawings", None, "assessments: images to assess (400).")
    flags.DEFINE_integer("best_of", None, "assessments: prompts of which the best of four images is chosen (100).")
    flags.DEFINE_float(
        "guidance",
        None,
        "Classifier-free guidance. scenes, assessments, captions: 1.5; compositions: 1.25; edits, stories: 1.",
    )
    flags.DEFINE_float("temperature", None, "edits, compositions, stories: temperature (0.7); assessments: (1).")
    flags.DEFINE_string("split", None, "captions, answers: test (held-out) or train; answers: also all (test).")
    flags.DEFINE_string("sources", None, "captions, answers: data sources; those of the model if not given.")
    flags.DEFINE_integer("batches", None, "loss: number of batches (4).")
    flags.DEFINE_integer("batch_size", None, "loss: batch size; that of training if not given.")


def command() -> None:
    """Evaluates as the flags say."""
    from unimm_jax.evals.runner import evaluate
    from unimm_jax.evals.score_table import table

    f = flags.FLAGS
    options = {name: f[name].value for name in OPTIONS if f[name].value is not None}
    names = [name.strip() for name in f.evals if name.strip()]
    print(table(evaluate(f.checkpoint, f.output, names, options, f.tensor)), flush=True)


def cli() -> None:
    """Entry point."""
    process.prepare()
    define_flags()
    process.app(command)


if __name__ == "__main__":
    cli()
