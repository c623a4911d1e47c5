"""Writes one HTML page of what a stage reads, before it is trained.

python -m unimm_jax.inspect_data --config=configs/stage3.py:laptop --workdir=runs/stage3 [--output=data.html]

A language stage gets shares, lengths, documents and packed rows; a stage that reads images gets images.
"""

from absl import flags

from unimm_jax import command_line, process

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the stage; config.data.records is relative to it.")
    flags.DEFINE_string("output", "", "The file to write; data.html in the workdir if empty.")
    flags.DEFINE_integer("documents", 24, "Number of documents, or of images, to show.", lower_bound=0)
    flags.DEFINE_integer("rows", 6, "Number of packed rows to show.", lower_bound=0)


def cli() -> None:
    """Entry point."""
    process.prepare()
    define_flags()
    config = command_line.define_config()

    def command() -> None:
        import dataclasses

        from unimm_jax import objectives, resolve, storage
        from unimm_jax.data import inspection
        from unimm_jax.errors import ConfigError

        parsed = resolve.parse(config())
        if not FLAGS.workdir:
            raise ConfigError("--workdir is missing; give the directory of the stage, for example runs/stage3")
        workdir = storage.path(FLAGS.workdir)
        if hasattr(parsed.data, "records"):
            records = str(storage.at(workdir, parsed.data.records))
            parsed = dataclasses.replace(parsed, data=dataclasses.replace(parsed.data, records=records))
        data = objectives.get(parsed.objective).open_input(parsed)
        page = inspection.build(parsed, data, FLAGS.documents, FLAGS.rows)
        file = storage.path(FLAGS.output) if FLAGS.output else workdir / "data.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8")
        print(f"{parsed.name}: wrote {file}")

    process.app(command)


if __name__ == "__main__":
    cli()
