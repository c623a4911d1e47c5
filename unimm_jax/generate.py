r"""Generates images from a prompt, answers questions about images, edits an image, or continues a document.

python -m unimm_jax.generate --checkpoint=runs/stage3 --prompt="two red circles" --output=out
python -m unimm_jax.generate --checkpoint=runs/stage3 --prompt="two red circles" --best_of=4 --output=out
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --prompt="how many circles are there?"
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --edit="make the circle red" \
  --edit="remove the square"
python -m unimm_jax.generate --checkpoint=runs/stage3 --draw --image=a.png --prompt="<image> and a red circle"
python -m unimm_jax.generate --checkpoint=runs/stage3 --document --image=a.png --max_parts=4 --output=out \
  --prompt="a red circle <image> add a blue square"
"""

from absl import flags

from unimm_jax import process

FLAGS = flags.FLAGS
DECODERS = ("", "pixel_decoder", "unet_decoder", "unet_decoder_high")


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
    flags.DEFINE_string("prompt", "", "What to generate, or the question about --image (empty: describe it).")
    flags.DEFINE_multi_string("image", [], "An image that is read, in order. <image> in --prompt is its place.")
    flags.DEFINE_bool("draw", False, "Generates images also with --image; without, the answer is a text.")
    flags.DEFINE_multi_string("edit", [], "An instruction to edit --image; each of several edits the result before it.")
    flags.DEFINE_bool("document", False, "Continues --prompt, with its images, as a document of texts and images.")
    flags.DEFINE_integer("max_parts", 8, "With --document: maximum number of new texts and images.", lower_bound=1)
    flags.DEFINE_string("output", "samples", "Directory for images and document.md.")
    flags.DEFINE_integer("tensor", 1, "Devices over which the language model is split.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Number of images or documents.", lower_bound=1)
    flags.DEFINE_integer(
        "best_of",
        1,
        "Images of --prompt alone: each is the best of so many by the model's own assessment.",
        lower_bound=1,
    )
    flags.DEFINE_float("guidance", 1.0, "Images: classifier-free guidance; 1 is off.")
    flags.DEFINE_float("temperature", 1.0, "Images, documents: 0 is greedy.")
    flags.DEFINE_integer("top_k", 0, "Images, documents: number of tokens to choose from; 0 is all.")
    flags.DEFINE_float("top_p", 1.0, "Images, documents: nucleus to choose from; 1 is all.")
    flags.DEFINE_integer(
        "prompt_length", 0, "Maximum tokens of the prompt; 0 is a row of training, at least 1,024.", lower_bound=0
    )
    flags.DEFINE_integer("max_length", 40, "Answers, texts of documents: maximum number of tokens.", lower_bound=1)
    flags.DEFINE_integer("min_length", 0, "Answers: number of tokens before the end.", lower_bound=0)
    flags.DEFINE_integer("beams", 1, "Answers: number of beams; 1 is greedy.", lower_bound=1)
    flags.DEFINE_float("length_penalty", 1.0, "Answers: exponent of the length in the score of a beam.")
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_enum("decoder", "", DECODERS, "Decoder from codes to pixels; the first one present if empty.")
    flags.DEFINE_integer("height", 0, "Height of the images, with a U-Net decoder; 0 is its own size.")
    flags.DEFINE_integer("width", 0, "Width of the images, with a U-Net decoder; 0 is its own size.")


def command() -> None:
    """Generates as the flags say."""
    from unimm_jax import storage
    from unimm_jax.errors import UserError
    from unimm_jax.inference import requests
    from unimm_jax.inference.generator import Generator
    from unimm_jax.inference.loading import load_model
    from unimm_jax.inference.sampling import Sampling

    f = FLAGS
    if f.min_length >= f.max_length:
        raise UserError(f"--min_length={f.min_length} must be below --max_length={f.max_length}")
    request = requests.Request(
        prompt=f.prompt,
        images=f.image,
        edits=f.edit,
        draw=f.draw,
        document=f.document,
        samples=f.samples,
        max_parts=f.max_parts,
        best_of=f.best_of,
        size=(f.height, f.width),
        sampled=Sampling(f.guidance, f.temperature, f.top_k, f.top_p),
        spoken=Sampling(temperature=0, min_length=f.min_length, beams=f.beams, length_penalty=f.length_penalty),
        decoder=f.decoder,
        seed=f.seed,
    )
    asked, folder = requests.check(request), storage.path(f.output)
    length = max(f.max_length, request.answer_length)
    generator = Generator(load_model(f.checkpoint, f.tensor), request.batch, f.prompt_length, length)
    requests.write(requests.answer(asked, generator), folder)


def cli() -> None:
    """Entry point."""
    process.prepare()
    define_flags()
    process.app(command)


if __name__ == "__main__":
    cli()
