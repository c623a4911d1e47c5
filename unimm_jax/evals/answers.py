"""Answers of own data: how many the model gives as the data has them, on held-out or on training records."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax.config import ImageDataConfig, one_of, ranged
from unimm_jax.data import pipeline
from unimm_jax.data.outlines import Message, Part, Record
from unimm_jax.data.sources import DecodedDataset, split_sources
from unimm_jax.data.sources.base import Decoded
from unimm_jax.data.tasks import Spoken, TaskSettings, converse, question_prompt
from unimm_jax.errors import CheckpointError, DataError, EmptySplitError
from unimm_jax.evals import evaluator_of
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.captions import evenly, load
from unimm_jax.evals.generation import BATCH, GeneratingEvaluator
from unimm_jax.inference.generator import Generator, Prompt
from unimm_jax.plotting import enlarged

SHOWN = 40  # answers in the report


@dataclasses.dataclass(frozen=True)
class AnswersOptions(Options):
    """Options.

    Attributes:
      images: maximum number of records, evenly spaced over the split.
      split: "test" is the held-out split, or training records if it is empty; "train" what the model was trained on;
        "all" every record of the training split of `sources`, nothing held out.
      sources: data sources; empty for those of the model that have conversations, or all if none has.
    """

    images: int = ranged(600, low=1)
    split: str = one_of("test", "test", "train", "all")
    sources: str = ""


@dataclasses.dataclass
class Asked:
    """A question with its history as a prompt, the answer of the data, and the turn that it is, from 1."""

    prompt: Prompt
    question: str
    answer: str
    turn: int


class Answers(GeneratingEvaluator):
    """Answers to the questions and in the conversations of the data, compared with those of the data.

    Every assistant turn that answers a user turn is asked for, after the turns before it as they are in the data. Case
    and a final full stop do not count. Records that generate images are left out.
    """

    options = AnswersOptions

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        items, split = self._items(generator, context)
        settings = pipeline.task_settings(context.config)
        asked = [
            (i, question)
            for i, item in enumerate(items)
            for question in questions_of(item.record, list(map(generator.read_image, item.record.images)), settings)
        ]
        if not asked:
            raise DataError(f"no record of the {split} split has an answer that is a text")
        right: dict[int, list[bool]] = {}
        rows: list[dict[str, Any]] = []
        shown = set(evenly(len(asked), SHOWN))
        for at in range(0, len(asked), BATCH):
            part = asked[at : at + BATCH]
            answers = generator.continue_with_text([question.prompt for _, question in part])
            for number, ((i, question), answer) in enumerate(zip(part, answers, strict=True), at):
                right.setdefault(question.turn, []).append(normalized(answer) == normalized(question.answer))
                if number in shown:
                    image = enlarged(items[i].pixels[0])
                    row = dict(file=f"answer_{number:04d}.png", image=image, question=question.question)
                    rows.append(row | dict(reply=answer, truth=question.answer))
        every = [found for values in right.values() for found in values]
        scores = {"exact": float(np.mean(every)), "number": len(every)}
        scores |= {f"turn_{turn}": float(np.mean(values)) for turn, values in sorted(right.items())}
        return Result({"split": split, "answers": scores}, examples={"questions": rows})

    def _items(self, generator: Generator, context: Context) -> tuple[list[Decoded], str]:
        """The records that are asked about, and their split."""
        options: AnswersOptions = self.settings
        listed = split_sources(options.sources or context.header.get("sources") or "")
        if not listed:
            raise CheckpointError(
                f"{context.workdir} names no data sources (imported weights have none); give --sources"
            )
        if not options.sources:
            listed = [source for source in listed if evaluator_of(source) == "answers"] or listed
        data = generator.image_tokenizer.config.data
        if options.split == "all":
            return self._read(listed, dataclasses.replace(data, held_out=0.0), "train"), "all"
        if options.split == "test":
            items = self._read(listed, data, "test")
            if items:
                return items, "test"
            print("answers: the scores are of training images", flush=True)
        return self._read(listed, data, "train"), "train"

    def _read(self, listed: list[str], data: ImageDataConfig, split: str) -> list[Decoded]:
        """Records of one split, evenly spaced; none if it is empty."""
        datasets: list[DecodedDataset] = []
        for source in listed:
            try:
                datasets += pipeline.open_images(dataclasses.replace(data, sources=source), split, ("images",))
            except EmptySplitError as error:
                print(f"answers: {error}", flush=True)
        places = evenly(sum(map(len, datasets)), self.settings.images) if datasets else []
        return [item for place in places if (item := load(datasets, place)) is not None]


def questions_of(record: Record, images: Sequence[np.ndarray], settings: TaskSettings) -> list[Asked]:
    """The questions of a record with their answers; none if it has neither questions nor a conversation.

    Args:
      images: of the record, as `Generator.read_image` gives them.
    """
    found = []
    for question in record.questions:
        prompt = Prompt(question_prompt(question.question, settings), images[:1])
        found.append(Asked(prompt, question.question, question.answer, 1))
    messages: list[Message] = list(record.messages)
    written = [part for message in messages if message.role == "assistant" for part in message.content]
    if not all(isinstance(part, str) for part in written):
        return found
    turn = 0
    for end, message in enumerate(messages):
        if message.role != "assistant" or not end or messages[end - 1].role != "user":
            continue
        turn += 1
        turns = [
            Spoken(m.role, [part if isinstance(part, str) else Part(True, part) for part in m.content])
            for m in messages[:end]
        ]
        count = sum(not isinstance(part, str) for m in messages[:end] for part in m.content)
        prompt = Prompt(converse(turns, settings), images[:count])
        asked = " ".join(part for part in messages[end - 1].content if isinstance(part, str))
        found.append(Asked(prompt, asked, " ".join(map(str, message.content)), turn))
    return found


def normalized(text: str) -> str:
    """A text without case, surrounding blanks and a final full stop."""
    return text.strip().rstrip(".").lower()
