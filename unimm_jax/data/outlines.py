"""Records and their outlines.

A record is what a source yields. Its outline says which texts and images it has, without their contents; tasks build
documents from it, and the planner counts their tokens. A stored outline is a few bytes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unimm_jax.errors import InvalidRecordError

ROLES = ("system", "user", "assistant")


class Question(NamedTuple):
    """A question about the image of a record.

    Attributes:
      kind: for scores by kind. alternative: whether an example asks either this or the question before it, not both
        (for example the "yes" form and the "no" form of one question).
    """

    question: str
    answer: str
    kind: str = ""
    alternative: bool = False


class Message(NamedTuple):
    """A turn of a conversation. `content` has texts (str) and images (int, index into the record's images)."""

    role: str
    content: Sequence[str | int]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a source yields: images and one of `captions`, `messages`, `content`, `instruction` and `text`.

    Attributes:
      key: unique name in the source.
      images: encoded bytes, or pixels uint8 [H, W, 3].
      captions: texts that describe image 0. prompts: more texts for text-to-image, which may say less.
      questions: questions about image 0; only beside captions.
      messages: a conversation. content: an interleaved document of texts (str) and images (int).
      instruction: how to edit image 0 into image 1. text: a text without images.
    """

    key: str
    images: Sequence[bytes | np.ndarray] = ()
    captions: Sequence[str] = ()
    prompts: Sequence[str] = ()
    questions: Sequence[Question] = ()
    messages: Sequence[Message] = ()
    content: Sequence[str | int] = ()
    instruction: str = ""
    text: str = ""


class Part(NamedTuple):
    """A part of a message or of an interleaved document: a text or an image, by its index in the record."""

    is_image: bool
    number: int


class Turn(NamedTuple):
    """A turn of a conversation; see `Message`."""

    role: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a record has. Integers are indices into its texts; see `Record`. `images` is the number of images."""

    images: int
    captions: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    questions: tuple[tuple[int, int, bool], ...] = ()  # question, answer, alternative
    turns: tuple[Turn, ...] = ()
    content: tuple[Part, ...] = ()
    instruction: int | None = None
    text: int | None = None


# codes of a stored outline; those up to ALTERNATIVE and from INSTRUCTION on stand for one text, questions for two
CAPTION, PROMPT, QUESTION, ALTERNATIVE, INSTRUCTION, TEXT, PART, IMAGE, SYSTEM, USER, ASSISTANT = range(11)
_ROLE_CODES = dict(zip(ROLES, (SYSTEM, USER, ASSISTANT), strict=True))


def flatten(record: Record) -> tuple[list[str], bytes]:
    """The texts of a record in order, and its outline as bytes (see `outline`).

    Raises:
      InvalidRecordError: the record is not of exactly one kind, or its images are missing or not used in order.
    """
    kinds = dict(
        captions=record.captions,
        messages=record.messages,
        content=record.content,
        instruction=record.instruction,
        text=record.text,
    )
    present = [name for name, value in kinds.items() if value]
    if len(present) != 1:
        raise InvalidRecordError(
            f"it has {' and '.join(present)}"
            if present
            else "it has no caption, messages, content, instruction or text"
        )
    texts: list[str] = []
    codes: list[int] = []

    def put(code: int, *items: str) -> None:
        codes.append(code)
        texts.extend(items)

    def put_parts(parts: Sequence[str | int]) -> int:
        """Puts parts whose images are the next ones of the record."""
        for part in parts:
            if isinstance(part, str):
                put(PART, part)
            else:
                if part != codes.count(IMAGE):
                    raise InvalidRecordError(f"image {part} is not used in order")
                codes.append(IMAGE)
        return codes.count(IMAGE)

    used = 0
    for caption in record.captions:
        put(CAPTION, caption)
    for prompt in record.prompts:
        put(PROMPT, prompt)
    for question in record.questions:
        put(ALTERNATIVE if question.alternative else QUESTION, question.question, question.answer)
    for message in record.messages:
        if message.role not in ROLES:
            raise InvalidRecordError(f"a message has the role {message.role!r}; roles are {', '.join(ROLES)}")
        put(_ROLE_CODES[message.role])
        used = put_parts(message.content)
    if record.content:
        used = put_parts(record.content)
    if record.captions:
        used = 1
    if record.instruction:
        put(INSTRUCTION, record.instruction)
        used = 2
    if record.text:
        put(TEXT, record.text)
    if used != len(record.images):
        raise InvalidRecordError(f"it has {len(record.images)} images and uses {used}")
    return texts, bytes(codes)


@functools.lru_cache(maxsize=100_000)
def outline(codes: bytes, images: int) -> Outline:
    """The outline with the given codes and number of images; the inverse of `flatten`."""
    lists: dict[int, list[int]] = {CAPTION: [], PROMPT: []}
    single: dict[int, int] = {}
    questions: list[tuple[int, int, bool]] = []
    turns: list[tuple[str, list[Part]]] = []
    content: list[Part] = []
    text = image = 0
    for code in codes:
        if code in lists:
            lists[code].append(text)
        elif code in (QUESTION, ALTERNATIVE):
            questions.append((text, text + 1, code == ALTERNATIVE))
            text += 1
        elif code in (INSTRUCTION, TEXT):
            single[code] = text
        elif code in (PART, IMAGE):
            part = Part(code == IMAGE, image if code == IMAGE else text)
            (turns[-1][1] if turns else content).append(part)
            image += code == IMAGE
        else:
            turns.append((ROLES[code - SYSTEM], []))
        text += code < IMAGE
    return Outline(
        images=images,
        captions=tuple(lists[CAPTION]),
        prompts=tuple(lists[PROMPT]),
        questions=tuple(questions),
        turns=tuple(Turn(role, tuple(parts)) for role, parts in turns),
        content=tuple(content),
        instruction=single.get(INSTRUCTION),
        text=single.get(TEXT),
    )
