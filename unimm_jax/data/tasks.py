"""Tasks: functions that turn the outline of a record into a document.

To add a task, write a file with a `Task` and add its line to `REGISTRY`. Its name is then a setting of
`config.data.tasks`.
"""

import dataclasses
import functools
import importlib
import itertools
import random
from collections.abc import Callable, Sequence

from unimm_jax.data.documents import Document, ImageCodes, ImageIn, ImageOut, ImageStart, Segment, Special, Text
from unimm_jax.data.outlines import Outline, Part, Turn

# name → "module:Task"; imported on first use
REGISTRY = {
    "text": "unimm_jax.data.tasks:TEXT",
    "caption": "unimm_jax.data.tasks:CAPTION",
    "reconstruct": "unimm_jax.data.tasks:RECONSTRUCT",
    "text_to_image": "unimm_jax.data.tasks:TEXT_TO_IMAGE",
    "question": "unimm_jax.data.tasks:QUESTION",
    "conversation": "unimm_jax.data.tasks:CONVERSATION",
    "edit": "unimm_jax.data.tasks:EDIT",
    "interleaved": "unimm_jax.data.tasks:INTERLEAVED",
}
RECONSTRUCT_INSTRUCTION = "reconstruct"  # instruction of an edit example whose own instruction is dropped
IMAGE_PROMPTS = ("features", "features_last", "codes")  # layouts of prompts with images for images


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Settings of the tasks.

    Attributes:
      max_questions: maximum number of questions per `question` example.
      prompt_dropout: share of text-to-image and edit examples without their text, for guidance (0.1 in ILLUME+'s code).
      image_targets: loss weight of the code targets at positions of input images (LaVIT's [image, text]; 0 in ILLUME).
      text_targets: loss weight of the prompt in text-to-image examples.
      code_targets: loss weight of the codes of generated images.
      template: how conversations are laid out, a name of `TEMPLATES`.
      image_prompts: layout of prompts with images for images, one of `IMAGE_PROMPTS`; see `image_prompt`.
    """

    max_questions: int = 3
    prompt_dropout: float = 0.1
    image_targets: float = 1.0
    text_targets: float = 1.0
    code_targets: float = 1.0
    template: str = "plain"
    image_prompts: str = "features"


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to make a document of a record.

    Attributes:
      applies: whether a record with this outline can be an example of the task. It may depend on the kinds of texts
        and images in the outline, not on their number: the planner asks once for all records with the same kinds.
      build: (outline, variant, settings) → document. All random choices come from the integer `variant`.
    """

    applies: Callable[[Outline], bool]
    build: Callable[[Outline, int, TaskSettings], Document]


@functools.cache
def get(name: str) -> Task:
    """A task by its name, a key of `REGISTRY`."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


# ---- Pretraining orders: documents without roles ---------------------------------------------------------------------


def _any_text(outline: Outline) -> tuple[int, ...]:
    return outline.captions + outline.prompts


def _text(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """<s> text </s>."""
    texts = _any_text(outline)
    text = texts[variant % len(texts)] if texts else outline.text
    assert text is not None
    return (Special("bos", 1.0), Text(text, 1.0), Special("eos", 1.0))


def _caption(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """[IMG] features [/IMG] caption </s>. Every caption of an image is used, by `variant`."""
    text = outline.captions[variant % len(outline.captions)]
    return (ImageIn(0, settings.image_targets), Text(text, 1.0), Special("eos", 1.0))


def _reconstruct(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """[IMG] features [/IMG] [IMG] codes [/IMG] of one image."""
    image = variant % outline.images
    return (ImageIn(image, settings.image_targets), ImageOut(image, settings.code_targets))


def _text_to_image(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """<s> text [IMG] codes [/IMG]; without `<s> text` if the prompt is dropped."""
    if is_dropped(variant, settings):
        return (ImageOut(0, settings.code_targets),)
    texts, weight = _any_text(outline), settings.text_targets
    image = ImageOut(0, settings.code_targets, weight)
    return (Special("bos", weight), Text(texts[variant % len(texts)], weight), image)


def _interleaved(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """<s>, then texts and images in order, then </s>.

    Images are read. In half of the examples, the last image that follows a text is generated instead and ends the
    document, so that the model learns to continue a document with an image. [IMG] is predicted at every image, so that
    it learns where images come.
    """
    parts = outline.content
    follows = [i for i in range(1, len(parts)) if parts[i].is_image and not parts[i - 1].is_image]
    last = follows[-1] if follows and variant & 1 else None
    segments: list[Segment] = [Special("bos", 1.0)]
    for part in parts[:last]:
        image = ImageIn(part.number, settings.image_targets, start_weight=1.0)
        segments.append(image if part.is_image else Text(part.number, 1.0))
    if last is None:
        return (*segments, Special("eos", 1.0))
    return (*segments, ImageOut(parts[last].number, settings.code_targets, 1.0))


def is_dropped(variant: int, settings: TaskSettings) -> bool:
    """Whether an example loses its prompt."""
    return (variant >> 8) % 1000 < settings.prompt_dropout * 1000


# ---- Conversations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Template:
    """Texts around the turns of a conversation. Each text is tokenized on its own.

    Attributes:
      bos: whether the conversation starts with the beginning-of-text token.
      system: default system message; empty for none.
      before: role → text before a turn of the role. after: role → text after it; an assistant turn first ends with the
        end-of-text token.
    """

    bos: bool
    system: str
    before: dict[str, str]
    after: dict[str, str]


_CHATML = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
TEMPLATES = {
    "plain": Template(False, "", {}, {}),
    "vicuna_v1": Template(  # LLaVA and Vicuna 1.1
        True,
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        {"user": "USER:", "assistant": "ASSISTANT:"},
        {},
    ),
    "chatml": Template(  # Qwen; the end-of-text token of its chat models is <|im_end|>
        False,
        "You are a helpful assistant.",
        _CHATML,
        {"system": "<|im_end|>\n", "user": "<|im_end|>\n", "assistant": "\n"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A turn ready to be laid out: texts (their index, or the text itself) and images (`Part`) in order."""

    role: str
    parts: Sequence[Part | str]


def converse(
    turns: Sequence[Spoken], settings: TaskSettings, image_targets: float = 0.0, draws: bool = False
) -> Document:
    """Lays a conversation out. What the assistant says is in the loss; what system and user say is read only.

    An image that the assistant generated is read again, as features, at the start of the next turn (as ILLUME does).
    A conversation that ends with a user turn is a prompt: it ends with the text before the assistant's turn. With the
    layout "features_last", a user turn that an image answers has its texts first, then its images.

    Args:
      image_targets: loss weight of the code targets at positions of input images.
      draws: whether an image answers a conversation that ends with a user turn.
    """
    template = TEMPLATES[settings.template]
    segments: list[Segment] = [Special("bos")] if template.bos else []
    if template.system and turns[0].role != "system":
        turns = [Spoken("system", (template.system,)), *turns]
    generated: list[int] = []
    for turn, answer in zip(turns, [*turns[1:], None], strict=True):
        segments += _markup(template.before.get(turn.role))
        again: list[Segment] = [ImageIn(image) for image in generated]
        generated = []
        speaks = turn.role == "assistant"
        is_drawn = draws if answer is None else any(map(_is_image, answer.parts))
        first: Sequence[Part | str] = ()
        parts = turn.parts
        if settings.image_prompts == "features_last" and turn.role == "user" and is_drawn:
            first = [part for part in parts if not _is_image(part)]
            parts = [part for part in parts if _is_image(part)]
        segments += [Text(part if isinstance(part, str) else part.number) for part in first]
        segments += again
        for part in parts:
            if isinstance(part, str) or not part.is_image:
                segments.append(Text(part if isinstance(part, str) else part.number, float(speaks)))
            elif speaks:
                segments.append(ImageOut(part.number, settings.code_targets, 1.0))
                generated.append(part.number)
            else:
                segments.append(ImageIn(part.number, image_targets))
        if speaks:
            segments.append(Special("eos", 1.0))
        segments += _markup(template.after.get(turn.role))
    if turns[-1].role == "user":
        segments += _markup(template.before.get("assistant"))
    return tuple(segments)


def _is_image(part: Part | str) -> bool:
    return not isinstance(part, str) and part.is_image


def _markup(text: str | None) -> list[Segment]:
    return [Text(text, is_markup=True)] if text else []


def _question(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """A conversation of some questions about the image and their answers; the image is in the first turn."""
    turns: list[Spoken] = []
    for i in chosen_questions(outline, variant, settings.max_questions):
        question, answer, _ = outline.questions[i]
        image = () if turns else (Part(True, 0),)
        turns += [Spoken("user", (*image, Part(False, question))), Spoken("assistant", (Part(False, answer),))]
    return converse(turns, settings, settings.image_targets)


def chosen_questions(outline: Outline, variant: int, limit: int) -> list[int]:
    """Indices of the questions that an example asks, in order; of alternatives, at most one."""
    groups = list(itertools.accumulate(not alternative for _, _, alternative in outline.questions))
    rng = random.Random(variant)
    order = sorted(range(len(groups)), key=lambda _: rng.random())
    seen: set[int] = set()
    found = []
    for i in order:
        if groups[i] not in seen:
            seen.add(groups[i])
            found.append(i)
    return found[:limit]


def _conversation(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """The conversation of the record, up to its last assistant turn.

    One user turn that is answered by one image is text-to-image or an edit: a share of these lose their prompt.
    """
    turns = _answered(outline.turns)
    asks_for_image = [turn.role for turn in turns] == ["user", "assistant"] and len(turns[1].parts) == 1
    if asks_for_image and turns[1].parts[0].is_image and is_dropped(variant, settings):
        source = next((part for part in turns[0].parts if part.is_image), None)
        if source is None:
            return (ImageOut(turns[1].parts[0].number, settings.code_targets),)
        return converse([Spoken("user", (source, RECONSTRUCT_INSTRUCTION)), Spoken("assistant", (source,))], settings)
    return converse([Spoken(*turn) for turn in turns], settings)


def _answered(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns up to the last one of the assistant."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    return turns[: last + 1]


def _edit(outline: Outline, variant: int, settings: TaskSettings) -> Document:
    """A turn with the source image and the instruction, and a turn with the target image.

    If the instruction is dropped, the source image is to be reconstructed (as in ILLUME+'s code).
    """
    assert outline.instruction is not None
    dropped = is_dropped(variant, settings)
    instruction = RECONSTRUCT_INSTRUCTION if dropped else Part(False, outline.instruction)
    user = Spoken("user", (Part(True, 0), instruction))
    return converse([user, Spoken("assistant", (Part(True, 0 if dropped else 1),))], settings)


# ---- Prompts: the documents above up to what the model writes --------------------------------------------------------


def text_to_image_prompt(prompt: str) -> Document:
    """<s> text [IMG]."""
    return (Special("bos"), Text(prompt), ImageStart())


def caption_prompt() -> Document:
    """[IMG] features [/IMG] of image 0."""
    return (ImageIn(0),)


def user_prompt(parts: Sequence[int | str], settings: TaskSettings) -> Document:
    """A user turn of texts and images; images are numbered from 0 in the order of their use."""
    return converse([Spoken("user", [part if isinstance(part, str) else Part(True, part) for part in parts])], settings)


def interleaved_prompt(parts: Sequence[int | str]) -> Document:
    """<s>, then texts and images in order, as in `interleaved` examples; images are numbered from 0 in this order."""
    return (Special("bos"), *(Text(part) if isinstance(part, str) else ImageIn(part) for part in parts))


def question_prompt(question: str, settings: TaskSettings, images: int = 1) -> Document:
    """The user turn of a question about images."""
    return user_prompt([*range(images), *([question] if question else [])], settings)


def image_prompt(parts: Sequence[int | str], settings: TaskSettings) -> Document:
    """A prompt of texts and images, in order, for an image; [IMG] follows it.

    The layout is `settings.image_prompts`. "features" is a user turn, as in ILLUME; "features_last" the same with the
    texts before the images. "codes" is LaVIT's multimodal prompt: <s>, then texts and the codes of the images without
    [IMG] and [/IMG], all without roles (§4; its code, `multimodal_synthesis`). Images are numbered from 0 in the order
    of their use.
    """
    if settings.image_prompts != "codes":
        numbered = [part if isinstance(part, str) else Part(True, part) for part in parts]
        return converse([Spoken("user", numbered)], settings, draws=True)
    return (Special("bos"), *(Text(part) if isinstance(part, str) else ImageCodes(part) for part in parts))


def edit_prompt(instructions: Sequence[str], settings: TaskSettings) -> Document:
    """The turns of edits up to the last instruction: image 0 is the source, image i the result of the i-th edit.

    With the layout "codes", the images and their instructions in order, as in `image_prompt`.
    """
    if settings.image_prompts == "codes":
        return image_prompt([part for pair in enumerate(instructions) for part in pair], settings)
    turns = [Spoken("user", (Part(True, 0), instructions[0]))]
    for image, instruction in enumerate(instructions[1:], 1):
        turns += [Spoken("assistant", (Part(True, image),)), Spoken("user", (instruction,))]
    return converse(turns, settings, draws=True)


def unconditional_edit_prompt(settings: TaskSettings) -> Document:
    """The prompt that guidance of an edit is away from; image 0 is the one that is edited.

    With the layout "codes" it is empty, so that [IMG] alone remains, as in LaVIT's code. With others it asks for the
    reconstruction of the image, as in ILLUME+'s code.
    """
    return () if settings.image_prompts == "codes" else edit_prompt([RECONSTRUCT_INSTRUCTION], settings)


TEXT = Task(lambda o: bool(_any_text(o)) or o.text is not None, _text)
CAPTION = Task(lambda o: bool(o.captions), _caption)
RECONSTRUCT = Task(lambda o: o.images > 0, _reconstruct)
TEXT_TO_IMAGE = Task(lambda o: bool(_any_text(o)), _text_to_image)
QUESTION = Task(lambda o: bool(o.questions), _question)
CONVERSATION = Task(lambda o: bool(_answered(o.turns)), _conversation)
EDIT = Task(lambda o: o.instruction is not None, _edit)
INTERLEAVED = Task(lambda o: bool(o.content), _interleaved)
