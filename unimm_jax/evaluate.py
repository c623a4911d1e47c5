"""Evaluates a trained language stage: writes scores.json, examples and images, and prints a table.

python -m unimm_jax.evaluate --checkpoint=runs/stage3 --output=runs/evaluation [--evals=scenes,captions]
"""

from absl import flags

from unimm_jax import process

OPTIONS = ("prompts", "questions", "images", "jitter", "guidance", "split", "sources", "batches", "batch_size")


def define_flags() -> None:
    """Defines the command's flags. Options that are not given are the evaluators' own."""
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
    flags.DEFINE_string("output", "evaluation", "Directory for scores.json, examples.json and images.")
    flags.DEFINE_list("evals", [], "Evaluators (scenes, captions, loss); chosen by the model's sources if empty.")
    flags.DEFINE_integer("tensor", 1, "Devices over which the language model is split.", lower_bound=1)
    flags.DEFINE_integer("prompts", None, "scenes: prompts per task (50).")
    flags.DEFINE_integer("questions", None, "scenes: questions per kind (200).")
    flags.DEFINE_integer("images", None, "scenes: test scenes for captions and reconstruction (300); captions: 600.")
    flags.DEFINE_float("jitter", None, "scenes: 1 places objects near cell centers, above 4 anywhere (1).")
    flags.DEFINE_float("guidance", None, "scenes, captions: classifier-free guidance of text-to-image (1.5).")
    flags.DEFINE_string("split", None, "captions: test (held-out images) or train (test).")
    flags.DEFINE_string("sources", None, "captions: data sources; those of the model if not given.")
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
