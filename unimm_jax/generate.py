r"""Generates images from a prompt, which may have images, answers questions about images, or edits an image.

python -m unimm_jax.generate --checkpoint=runs/stage3 --prompt="two red circles" --output=out
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --prompt="how many circles are there?"
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --edit="make the circle red" \
  --edit="remove the square"
python -m unimm_jax.generate --checkpoint=runs/stage3 --draw --image=a.png --prompt="<image> and a red circle"
"""

from typing import Any

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
    from unimm_jax import resolve
    from unimm_jax.data import tasks
    from unimm_jax.errors import UserError
    from unimm_jax.inference.generator import Generator, Prompt, place_images
    from unimm_jax.inference.loading import load_model
    from unimm_jax.inference.sampling import Sampling

    f = FLAGS
    if f.edit and (len(f.image) != 1 or f.prompt):
        raise UserError("--edit needs exactly one --image, and no --prompt")
    if (f.edit or f.draw and f.image) and (f.height or f.width):
        raise UserError("--height and --width are for images without --image")
    if f.min_length >= f.max_length:
        raise UserError(f"--min_length={f.min_length} must be below --max_length={f.max_length}")
    if not f.image and not f.prompt:
        raise UserError("give --prompt to generate images, or --image to describe an image")
    files = [resolve.local_path(name) for name in f.image]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"there is no image file {' or '.join(missing)}")
    order = place_images(f.prompt, len(files))
    sampled = Sampling(f.guidance, f.temperature, f.top_k, f.top_p)
    spoken = Sampling(temperature=0, min_length=f.min_length, beams=f.beams, length_penalty=f.length_penalty)
    answers = bool(files) and not (f.edit or f.draw)
    batch = 1 if answers else min(f.samples, 32)
    generator = Generator(load_model(f.checkpoint, f.tensor), batch, f.prompt_length, f.max_length)
    pixels = [generator.read_image(file.read_bytes()) for file in files]
    parts = [part if isinstance(part, str) else pixels[part] for part in order]
    if f.edit:
        turns = generator.edit_images(pixels * f.samples, [f.edit] * f.samples, sampled, f.seed, f.decoder)
        write({f"{i:04d}_edit{n}": image for n, images in enumerate(turns, 1) for i, image in enumerate(images)})
    elif f.draw and files:
        composed = generator.compose_images([parts] * f.samples, sampled, f.seed, f.decoder)
        write({f"{i:04d}": image for i, image in enumerate(composed)})
    elif answers:
        is_caption = len(pixels) == 1 and not f.prompt
        prompt = Prompt(tasks.caption_prompt(), pixels) if is_caption else generator.prompt_of(parts)
        print(generator.continue_with_text([prompt], spoken)[0])
    else:
        codes, keep = generator.codes(generator.generate_image_tokens([f.prompt] * f.samples, sampled, f.seed))
        shape = (int(f.height), int(f.width)) if f.height and f.width else None
        drawn = generator.decode(codes, keep, f.decoder, f.seed, shape)
        write({f"{i:04d}": image for i, image in enumerate(drawn)})


def write(images: dict[str, Any]) -> None:
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
