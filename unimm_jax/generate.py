r"""Generates images from a prompt, answers a question about one or several images, or edits an image turn by turn.

python -m unimm_jax.generate --checkpoint=runs/stage3 --prompt="two red circles" --output=out
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --prompt="how many circles are there?"
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --edit="make the circle red" \
  --edit="remove the square"
"""

from typing import TYPE_CHECKING

from absl import flags

from unimm_jax import process

if TYPE_CHECKING:  # importing JAX here would be before `process.prepare`
    import numpy as np

    from unimm_jax.inference.generator import Generator

FLAGS = flags.FLAGS
DECODERS = ("", "pixel_decoder", "unet_decoder", "unet_decoder_high")


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
    flags.DEFINE_string("prompt", "", "What to generate, or the question about --image (empty: describe it).")
    flags.DEFINE_multi_string("image", [], "An image to answer about; several flags give several images, in order.")
    flags.DEFINE_multi_string("edit", [], "An instruction to edit --image; each of several edits the result before it.")
    flags.DEFINE_string("output", "samples", "Directory for the images.")
    flags.DEFINE_integer("tensor", 1, "Devices over which the language model is split.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Number of images.", lower_bound=1)
    flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance; 1 is off.")
    flags.DEFINE_float("temperature", 1.0, "0 is greedy.")
    flags.DEFINE_integer("top_k", 0, "Number of tokens to choose from; 0 is all.")
    flags.DEFINE_float("top_p", 1.0, "Nucleus to choose from; 1 is all.")
    flags.DEFINE_integer(
        "prompt_length", 1024, "Maximum number of tokens of the prompt, its images included.", lower_bound=1
    )
    flags.DEFINE_integer("max_length", 40, "Answers: maximum number of tokens.", lower_bound=1)
    flags.DEFINE_integer("min_length", 0, "Answers: number of tokens before the end.", lower_bound=0)
    flags.DEFINE_integer("beams", 1, "Answers: number of beams; 1 is greedy.", lower_bound=1)
    flags.DEFINE_float("length_penalty", 1.0, "Answers: exponent of the length in the score of a beam.")
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_enum("decoder", "", DECODERS, "Decoder from codes to pixels; the first one present if empty.")
    flags.DEFINE_integer("height", 0, "Height of the images, with a U-Net decoder; 0 is its own size.")
    flags.DEFINE_integer("width", 0, "Width of the images, with a U-Net decoder; 0 is its own size.")


def command() -> None:
    """Generates as the flags say."""
    import numpy as np

    from unimm_jax import resolve
    from unimm_jax.data import tasks, transforms
    from unimm_jax.errors import UserError
    from unimm_jax.inference.generator import Generator, Prompt
    from unimm_jax.inference.loading import load_model
    from unimm_jax.inference.sampling import Sampling

    f = FLAGS
    if f.edit and (len(f.image) != 1 or f.prompt):
        raise UserError("--edit needs exactly one --image, and no --prompt")
    if not f.image and not f.prompt:
        raise UserError("give --prompt to generate images, or --image to describe an image")
    generator = Generator(load_model(f.checkpoint, f.tensor), max(1, min(f.samples, 32)), f.prompt_length, f.max_length)
    if f.image:
        files = [resolve.local_path(name) for name in f.image]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise UserError(f"there is no image file {' or '.join(missing)}")
        size = generator.config.data.image_size
        pixels = np.stack([transforms.to_pixels(file.read_bytes(), size) for file in files])
        if f.edit:
            edit(generator, pixels[0])
            return
        is_caption = len(files) == 1 and not f.prompt
        asked = tasks.question_prompt(f.prompt, generator.task_settings, len(files))
        how = Sampling(temperature=0, min_length=f.min_length, beams=f.beams, length_penalty=f.length_penalty)
        print(generator.continue_with_text([Prompt(tasks.caption_prompt() if is_caption else asked, pixels)], how)[0])
        return
    sampling = Sampling(f.guidance, f.temperature, f.top_k, f.top_p)
    codes, keep = generator.codes(generator.generate_image_tokens([f.prompt] * f.samples, sampling, f.seed))
    size = (int(f.height), int(f.width)) if f.height and f.width else None
    images = generator.decode(codes, keep, f.decoder, f.seed, size)
    write({f"{i:04d}": image for i, image in enumerate(images)})


def edit(generator: "Generator", source: "np.ndarray") -> None:
    """Edits an image, uint8 [S, S, 3], as often as --samples says, and writes the result of every turn."""
    import numpy as np

    from unimm_jax.inference.sampling import Sampling

    f = FLAGS
    sources, sampling = np.repeat(source[None], f.samples, 0), Sampling(f.guidance, f.temperature, f.top_k, f.top_p)
    results = generator.edit_images(sources, [f.edit] * f.samples, sampling, f.seed, f.decoder)
    write({f"{i:04d}_edit{turn}": image for turn, images in enumerate(results, 1) for i, image in enumerate(images)})


def write(images: "dict[str, np.ndarray]") -> None:
    """Writes images, uint8 [H, W, 3], to --output under their names."""
    from unimm_jax import resolve
    from unimm_jax.data import transforms

    folder = resolve.local_path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(transforms.encode_png(image))
    print(f"{len(images)} images in {folder}")


def cli() -> None:
    """Entry point."""
    process.prepare()
    define_flags()
    process.app(command)


if __name__ == "__main__":
    cli()
