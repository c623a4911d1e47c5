"""Turns published weights into checkpoints that stages start from (`init_from`).

python -m unimm_jax.import_weights --source=DIR_OR_FILE --output=CHECKPOINT_DIR [--kind=KIND] [--codes=16384]
"""

from absl import flags

from unimm_jax import process


def cli() -> None:
    """Entry point."""
    process.prepare()
    f = flags.FLAGS
    flags.DEFINE_string("source", None, "Directory or file of the published weights.", required=True)
    flags.DEFINE_string("output", None, "Directory for the checkpoint.", required=True)
    flags.DEFINE_string("kind", "", "Kind of model; read from the source if empty (see docs/interop.md).")
    flags.DEFINE_integer("codes", 16384, "Image codes that a language model gets rows for.", lower_bound=1)

    def command() -> None:
        from unimm_jax.interop.importer import import_weights

        import_weights(f.source, f.output, f.kind, f.codes)

    process.app(command)


if __name__ == "__main__":
    cli()
