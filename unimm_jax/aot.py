"""Compiles the train step that `main` runs for a TPU topology, without a TPU, and reports its memory.

python -m unimm_jax.aot --config=configs/stage2.py:7b --topology=v5e:8x8 [--slices=2] [--rows=2] [--largest] [--json]
python -m unimm_jax.aot --config=configs/stage2.py:7b --topology=v5e:4x4 --generate [--tensor=8]

The second form compiles the program that generates an image from a prompt, with guidance. The model is split over
`tensor` chips, the images over the rest.

Needs libtpu (`pip install "jax[tpu]"`). Figures are per chip. A step that does not fit exits with status 1 and a change
with which it fits.
"""

import json

from absl import flags

from unimm_jax import command_line, process

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("topology", "v5e:8x8", "A TPU topology, for example v5e:1x1, v5e:4x4, v5p:2x4x4 or v6e:4x4.")
    flags.DEFINE_integer("slices", 1, "Number of slices of that topology.", lower_bound=1)
    flags.DEFINE_integer("rows", 0, "Rows of a micro-batch per device; 0 takes the config's batch.", lower_bound=0)
    flags.DEFINE_bool("largest", False, "Search for the most rows per device that fit, from --rows (or 1) on.")
    flags.DEFINE_string("remat", "", "Rematerialization of the language model; empty keeps the config's.")
    flags.DEFINE_integer("text_rows", 32_000, "Text ids of the vocabulary.", lower_bound=1)
    flags.DEFINE_integer("codes", None, "Image codes of the vocabulary; the config's if not given.", lower_bound=0)
    flags.DEFINE_bool("generate", False, "Compile the generation of images from prompts instead of the train step.")
    flags.DEFINE_integer("tensor", 8, "Chips over which --generate splits the model.", lower_bound=1)
    flags.DEFINE_float(
        "effort",
        0.0,
        "The compiler's effort to make the program fast. With -1 convolutions compile several times faster, but the "
        "program may need more memory.",
        lower_bound=-1.0,
        upper_bound=1.0,
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")


def cli() -> None:
    """Entry point."""
    from unimm_jax.compile import topology

    topology.prepare()
    process.prepare()
    define_flags()
    config = command_line.define_config()

    def command() -> None:
        import jax

        from unimm_jax import resolve
        from unimm_jax.compile import fit
        from unimm_jax.config import Config
        from unimm_jax.errors import OutOfMemoryError

        jax.config.update("jax_exec_time_optimization_effort", FLAGS.effort)
        parsed, where = resolve.parse(config()), topology.Topology(FLAGS.topology, FLAGS.slices)
        parsed = fit.with_remat(parsed, FLAGS.remat) if FLAGS.remat else parsed
        tokenizer = parsed.model.get("image_tokenizer")
        codes = FLAGS.codes if FLAGS.codes is not None else tokenizer.codes if tokenizer else 0

        def compile_rows(c: Config, target: topology.Topology, rows: int) -> fit.Report:
            if FLAGS.generate:
                return fit.compile_generation(c, target, rows or 1, FLAGS.tensor, FLAGS.text_rows, codes)
            return fit.compile_step(c, target, rows, FLAGS.text_rows, codes)

        rows = FLAGS.rows or int(FLAGS.largest)
        try:
            if FLAGS.largest:
                report = fit.largest(lambda n: compile_rows(parsed, where, n), rows)
            else:
                report = compile_rows(parsed, where, rows)
        except OutOfMemoryError as error:
            change = "try fewer --rows or a larger --tensor"
            if not FLAGS.generate:
                change = fit.suggest(parsed, where, rows, compile_rows)
            size = f"{rows} rows per device" if rows else "its batch"
            message = f"{parsed.name} with {size} does not fit on {where}: {error}; {change}"
            if FLAGS.json:
                found = dict(config=parsed.name, topology=str(where), rows=rows, fits=False)
                print(json.dumps(found | dict(reason=str(error), suggestion=change)))
            raise OutOfMemoryError(message) from None
        print(json.dumps(report.as_dict()) if FLAGS.json else "\n".join(report.lines()))

    process.app(command)


if __name__ == "__main__":
    cli()
