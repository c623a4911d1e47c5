"""What the command `generate` is asked for: checked before anything is loaded, answered, and written to files."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from unimm_jax import storage
from unimm_jax.data import tasks, transforms
from unimm_jax.enhancement.verdicts import MAX_TOKENS
from unimm_jax.errors import InvalidRecordError, UserError
from unimm_jax.inference import best_of
from unimm_jax.inference.generator import PLACE, Generator, Prompt, place_images
from unimm_jax.inference.interleaved import Parts, continue_document
from unimm_jax.inference.sampling import Sampling

MAX_BATCH = 32  # samples at a time


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      prompt: text, in which <image> is the place of an image. images: files of the images that are read, in order.
      edits: instructions, each of the result of the one before it.
      draw: whether a prompt with images asks for an image. document: whether the prompt is continued as a document.
      samples: number of images or documents. max_parts: new texts and images per document.
      best_of: images without --image are drawn so often, and the model's own assessment chooses.
      size: (height, width) of images without --image; (0, 0) is the decoder's own.
      sampled: how images, and the texts of documents, are sampled. spoken: how answers are chosen.
      decoder, seed: see `Generator.decode`.
    """

    prompt: str = ""
    images: Sequence[str] = ()
    edits: Sequence[str] = ()
    draw: bool = False
    document: bool = False
    samples: int = 4
    max_parts: int = 8
    best_of: int = 1
    size: tuple[int, int] = (0, 0)
    sampled: Sampling = Sampling()
    spoken: Sampling = Sampling(temperature=0)
    decoder: str = ""
    seed: int = 0

    @property
    def kind(self) -> str:
        """A key of `ANSWERS`: what the answer is."""
        if self.document:
            return "document"
        if self.edits:
            return "edit"
        if not self.images:
            return "draw"
        return "compose" if self.draw else "answer"

    @property
    def batch(self) -> int:
        """How many samples are generated at a time."""
        return 1 if self.kind == "answer" else min(self.samples * self.best_of, MAX_BATCH)

    @property
    def answer_length(self) -> int:
        """The number of tokens that an answer needs at least."""
        return MAX_TOKENS if self.best_of > 1 else 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
      texts: texts to print. images: name → uint8 [H, W, 3].
      document: the documents as Markdown; empty if none is asked for.
    """

    texts: Sequence[str] = ()
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    document: str = ""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A request without contradictions, the contents of its image files, and where in the prompt the images are."""

    request: Request
    files: Sequence[bytes]
    order: Sequence[int | str]

    def pixels(self, generator: Generator) -> list[np.ndarray]:
        """The images as the model reads them, each uint8 [H, W, 3]."""
        return [generator.read_image(data) for data in self.files]

    def parts(self, generator: Generator) -> Parts:
        """The prompt with its images."""
        pixels = self.pixels(generator)
        return [part if isinstance(part, str) else pixels[part] for part in self.order]


def check(request: Request) -> Checked:
    """Checks a request and reads its image files.

    Raises:
      UserError: parts of the request contradict each other or are missing, or an image file is missing or unreadable.
    """
    r = request
    if r.document and (r.edits or r.draw):
        raise UserError("--document continues the prompt with texts and images; it needs no --edit and no --draw")
    if r.kind != "answer" and r.spoken != Request.spoken:
        raise UserError("--beams, --min_length and --length_penalty are for answers, not for images and documents")
    if r.kind == "answer" and (r.sampled != Request.sampled or r.samples != Request.samples or r.decoder):
        raise UserError(
            "--guidance, --temperature, --top_k, --top_p, --samples and --decoder are for images and documents; an "
            "answer is greedy, or the best of --beams. --draw, --edit or --document ask for images"
        )
    if not r.document and r.max_parts != Request.max_parts:
        raise UserError("--max_parts is for --document")
    if r.kind != "draw" and r.best_of > 1:
        raise UserError("--best_of is for images without --image and without --document")
    if r.edits and (len(r.images) != 1 or r.prompt):
        raise UserError("--edit needs exactly one --image, and no --prompt")
    if r.kind != "draw" and any(r.size):
        raise UserError("--height and --width are for images without --image and without --document")
    if any(r.size) and not all(r.size):
        raise UserError("--height and --width are given together or not at all")
    if not r.images and not r.prompt:
        raise UserError("give --prompt to generate images, or --image to describe an image")
    files = [storage.path(name) for name in r.images]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"there is no image file {' or '.join(missing)}")
    order = place_images(r.prompt, len(files))
    contents = [file.read_bytes() for file in files]
    for file, data in zip(files, contents, strict=True):
        try:
            transforms.decode_image(data)
        except InvalidRecordError as error:
            raise UserError(f"{file} is {error}") from None
    return Checked(r, contents, order)


def answer(asked: Checked, generator: Generator) -> Answer:
    """Answers a request.

    Raises:
      UserError: a prompt longer than `generator.prompt_length`, or an image size that the decoder cannot generate.
      CheckpointError: no such decoder.
    """
    return ANSWERS[asked.request.kind](asked, generator)


def _draw(asked: Checked, generator: Generator) -> Answer:
    r = asked.request
    prompts, size = [r.prompt] * r.samples, r.size if all(r.size) else None
    if r.best_of == 1:
        return Answer(images=_numbered(generator.generate_images(prompts, r.sampled, r.seed, r.decoder, size)))
    found = best_of.candidates(generator, prompts, r.best_of, r.sampled, r.seed, r.decoder, size)
    kept = [verdicts[chosen] for verdicts, chosen in zip(found.verdicts, found.chosen, strict=True)]
    images = _numbered(found.best)
    texts = [
        f"{name}: {verdict.to_text() if verdict else 'the model gave no verdict on any of its images'}"
        for name, verdict in zip(images, kept, strict=True)
    ]
    return Answer(texts, images)


def _compose(asked: Checked, generator: Generator) -> Answer:
    r = asked.request
    prompts = [asked.parts(generator)] * r.samples
    return Answer(images=_numbered(generator.compose_images(prompts, r.sampled, r.seed, r.decoder)))


def _edit(asked: Checked, generator: Generator) -> Answer:
    r = asked.request
    turns = generator.edit_images(
        asked.pixels(generator) * r.samples, [r.edits] * r.samples, r.sampled, r.seed, r.decoder
    )
    return Answer(images={f"{i:04d}_edit{n}": x for n, images in enumerate(turns, 1) for i, x in enumerate(images)})


def _speak(asked: Checked, generator: Generator) -> Answer:
    r, pixels = asked.request, asked.pixels(generator)
    is_caption = len(pixels) == 1 and not r.prompt
    prompt = Prompt(tasks.caption_prompt(), pixels) if is_caption else generator.prompt_of(asked.parts(generator))
    return Answer(texts=generator.continue_with_text([prompt], r.spoken))


def _continue(asked: Checked, generator: Generator) -> Answer:
    r, prompt = asked.request, asked.parts(generator)
    prompts = [prompt] * r.samples
    found = continue_document(generator, prompts, r.max_parts, r.max_parts, r.sampled, r.sampled, r.seed, r.decoder)
    texts, pages = [], []
    images: dict[str, np.ndarray] = {}
    for i, added in enumerate(found):
        lines: list[str] = []
        mine: dict[str, np.ndarray] = {}
        for part in (*prompt, *added):
            if isinstance(part, str):
                lines.append(part)
            else:
                mine[f"{i:04d}_image{len(mine)}"] = part
                lines.append(f"![]({list(mine)[-1]}.png)")
        texts.append(" ".join(part if isinstance(part, str) else PLACE for part in (*prompt, *added)))
        pages.append("\n\n".join(lines) + "\n")
        images |= mine
    return Answer(texts, images, "\n---\n\n".join(pages))


ANSWERS: dict[str, Callable[[Checked, Generator], Answer]] = {
    "draw": _draw,
    "compose": _compose,
    "edit": _edit,
    "answer": _speak,
    "document": _continue,
}


def _numbered(images: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{i:04d}": image for i, image in enumerate(images)}


def write(found: Answer, folder: pathlib.Path) -> None:
    """Prints the texts of an answer and writes its images as PNG files, and its documents as `document.md`."""
    for text in found.texts:
        print(text)
    if found.images or found.document:
        folder.mkdir(parents=True, exist_ok=True)
    for name, image in found.images.items():
        (folder / f"{name}.png").write_bytes(transforms.encode_png(image))
    if found.document:
        (folder / "document.md").write_text(found.document)
    if found.images:
        print(f"{len(found.images)} images in {folder}")
