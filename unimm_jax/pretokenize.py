"""Writes records: keep masks and codes of every image, so that the language stages can pack rows exactly.

python -m unimm_jax.pretokenize --image_tokenizer=runs/tokenizer --output=runs/records [--sources=...]
"""

from absl import flags

from unimm_jax import process


def cli() -> None:
    """Entry point."""
    process.prepare()
    f = flags.FLAGS
    flags.DEFINE_string("image_tokenizer", None, "Workdir of the tokenizer stage.", required=True)
    flags.DEFINE_string("output", None, "Directory for the records.", required=True)
    flags.DEFINE_string("sources", "", "Data sources; those that the image tokenizer was trained on if empty.")
    flags.DEFINE_string(
        "text_tokenizer", "", "tokenizer.json, .model, a directory or checkpoint with one; trained if empty."
    )
    flags.DEFINE_integer("text_vocab_size", 512, "Number of ids of a trained text tokenizer.", lower_bound=300)
    flags.DEFINE_string(
        "reuse", "", "Finished records whose sources come first in --sources: they are copied from there."
    )
    flags.DEFINE_integer("batch_size", 256, "Images at a time.", lower_bound=1)

    def command() -> None:
        from unimm_jax import distributed
        from unimm_jax.inference.pretokenization import pretokenize

        distributed.start()
        words = (f.text_tokenizer, f.text_vocab_size)
        pretokenize(f.image_tokenizer, f.output, f.sources, *words, f.batch_size, f.reuse)

    process.app(command)


if __name__ == "__main__":
    cli()
