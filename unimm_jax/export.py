"""Writes a checkpoint for PyTorch users.

python -m unimm_jax.export --checkpoint=runs/stage3 --format=hf --output=DIR [--dtype=bfloat16]

`hf` is a directory that `transformers` opens, `lavit` the files, names and dtypes of the published LaVIT.
"""

from absl import flags

from unimm_jax import process


def cli() -> None:
    """Entry point."""
    process.prepare()
    f = flags.FLAGS
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage, or an import.", required=True)
    flags.DEFINE_string("output", None, "Directory to create.", required=True)
    flags.DEFINE_string("format", "hf", "Format: hf or lavit.")
    flags.DEFINE_string("dtype", "", "float32, bfloat16 or float16; the checkpoint's if empty (lavit: bfloat16).")

    def command() -> None:
        from unimm_jax.interop.exporter import export

        export(f.checkpoint, f.output, f.format, f.dtype)

    process.app(command)


if __name__ == "__main__":
    cli()
