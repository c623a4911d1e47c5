r"""Self-enhancing alignment: the model draws, a judge assesses, and stage 3 learns from the assessments.

python -m unimm_jax.self_enhance generate --checkpoint=runs/stage3 --records=runs/records --output=runs/drawings
python -m unimm_jax.self_enhance assess --drawings=runs/drawings --judge=scenes
python -m unimm_jax.self_enhance build --drawings=runs/drawings --records=runs/records --output=runs/enhancement

Judges are scenes, file:PATH, and endpoint:URL,model=NAME,... (docs/self_enhancement.md). Each command resumes after an
interruption. `self_enhance generate --help` lists the flags of `generate`.
"""

import os
import sys
import time

from absl import flags

from unimm_jax import process

FLAGS = flags.FLAGS


def generate() -> None:
    """Draws images for a share of the training captions."""
    from unimm_jax import distributed, storage
    from unimm_jax.enhancement.drawings import Drawings, DrawingSettings, draw
    from unimm_jax.enhancement.files import mark_done

    f = FLAGS
    distributed.start()
    settings = DrawingSettings(
        f.share, f.samples, f.guidance, f.temperature, f.top_k, f.top_p, f.seed, f.decoder, f.batch_size, f.source
    )
    began = time.perf_counter()
    draw(f.checkpoint, f.records, f.output, settings, f.tensor)
    found = Drawings(storage.path(f.output))
    if len(found.complete()) == found.header["blocks"]:
        mark_done(found.path, began)


def assess() -> None:
    """Assesses the images by a judge."""
    from unimm_jax import distributed, storage
    from unimm_jax.enhancement.assessing import assess as run
    from unimm_jax.enhancement.assessing import verdict_folder
    from unimm_jax.enhancement.drawings import Drawings
    from unimm_jax.enhancement.files import mark_done
    from unimm_jax.errors import DataError

    distributed.start()
    began = time.perf_counter()
    found = run(FLAGS.drawings, FLAGS.judge, FLAGS.output)
    if left := found["remaining"]:
        kinds = ", ".join(f"{kind} {number}" for kind, number in found["failed"].items())
        raise DataError(f"{left} drawings have no verdict ({kinds}); {found['remedy']}. build works without them, too")
    if missing := found["not_drawn"]:
        raise DataError(f"{missing} images are not drawn yet; run self_enhance generate again, then this command")
    mark_done(verdict_folder(Drawings(storage.path(FLAGS.drawings)), FLAGS.output), began)


def build() -> None:
    """Builds the documents for stage 3."""
    from unimm_jax import storage
    from unimm_jax.enhancement.building import build as run
    from unimm_jax.enhancement.files import mark_done

    began = time.perf_counter()
    run(FLAGS.drawings, FLAGS.records, FLAGS.output, FLAGS.verdicts, FLAGS.max_bad_share)
    mark_done(storage.path(FLAGS.output), began)


COMMANDS = {"generate": generate, "assess": assess, "build": build}


def define_flags(name: str) -> None:
    """Defines the flags of a command, a name of `COMMANDS`."""
    if name == "generate":
        flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
        flags.DEFINE_float("share", 0.1, "Share of the records to draw for.", lower_bound=0, upper_bound=1)
        flags.DEFINE_integer("samples", 1, "Images per chosen record.", lower_bound=1)
        flags.DEFINE_float("guidance", 1.5, "Classifier-free guidance; 1 is off.")
        flags.DEFINE_float("temperature", 1.0, "0 is greedy.")
        flags.DEFINE_integer("top_k", 0, "Number of tokens to choose from; 0 is all.")
        flags.DEFINE_float("top_p", 1.0, "Nucleus to choose from; 1 is all.")
        flags.DEFINE_integer("seed", 0, "Seed of the choice of records and texts, and of the images.", lower_bound=0)
        flags.DEFINE_string("decoder", "", "Decoder from codes to pixels; the first one present if empty.")
        flags.DEFINE_string("source", "", "Only records of this source, or of the only one with this format.")
        flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
        flags.DEFINE_integer("tensor", 1, "Devices over which the language model is split.", lower_bound=1)
    else:
        flags.DEFINE_string("drawings", None, "Directory that `generate` wrote.", required=True)
    if name == "assess":
        flags.DEFINE_string("judge", None, "scenes, file:PATH, or endpoint:URL,model=NAME,...", required=True)
        flags.DEFINE_string("output", "", "Directory for the verdicts; DRAWINGS/verdicts if empty.")
    else:
        flags.DEFINE_string("records", None, "Directory that pretokenize wrote.", required=True)
        flags.DEFINE_string("output", None, "Directory for what is written.", required=True)
    if name == "build":
        flags.DEFINE_string("verdicts", "", "Directory of the verdicts; DRAWINGS/verdicts if empty.")
        flags.DEFINE_float("max_bad_share", 1.0, "Largest share of bad images.", lower_bound=0, upper_bound=1)


def cli() -> None:
    """Entry point."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name != "generate":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leaves the accelerator to others
    process.prepare()
    if name in ("--help", "-h", "--helpshort", "--helpfull"):
        print(__doc__)
    elif name == "--version":
        process.app(lambda: None)
    elif name not in COMMANDS:
        sys.exit(f"error: the first argument is one of {', '.join(COMMANDS)}, not {name!r}; see --help")
    else:
        define_flags(name)
        process.app(COMMANDS[name], argv=[f"{sys.argv[0]} {name}", *sys.argv[2:]])


if __name__ == "__main__":
    cli()
