"""Captions of own images: how many the model gives word for word, with reconstructions and samples to look at."""

import collections
import dataclasses
from typing import Any

import numpy as np

from unimm_jax.config import one_of, ranged
from unimm_jax.data.pipeline import open_images
from unimm_jax.data.sources import DecodedDataset, split_sources
from unimm_jax.data.sources.base import Decoded
from unimm_jax.errors import CheckpointError, DataError
from unimm_jax.evals import evaluator_of, is_scenes
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.generation import BATCH, EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.sampling import Sampling
from unimm_jax.plotting import enlarged, grid, kept_patches

CAPTION_WORDS = 12  # captions are compared up to this many words
SHOWN_IMAGES = 24


@dataclasses.dataclass(frozen=True)
class CaptionsOptions(Options):
    """Options.

    Attributes:
      images: maximum number of images, evenly spaced over the split.
      split: "test" is the held-out split. "train" scores images that the model was trained on.
      sources: data sources; empty for those of the model, without the scenes if there are others.
      guidance: classifier-free guidance of the samples.
    """

    images: int = ranged(600, low=1)
    split: str = one_of("test", "test", "train")
    sources: str = ""
    guidance: float = ranged(1.5, low=0)


@dataclasses.dataclass
class Shown:
    """What the report shows of an image. `keep`: boolean [P]; `codes`: int32 [P]."""

    image: np.ndarray
    codes: np.ndarray
    keep: np.ndarray
    caption: str
    truth: str


class Captions(GeneratingEvaluator):
    """Captions of held-out images of the model's own sources, compared with the first caption of each image.

    Sources without a held-out record are scored on training images; `scores["split"]` says which.
    """

    options = CaptionsOptions
    answer_length = 64

    def __init__(self, options: CaptionsOptions):
        super().__init__(options)
        self._opened: tuple[list[DecodedDataset], str] | None = None

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        if self._opened is None:
            self._opened = self._open(generator, context)
        datasets, split = self._opened
        places = evenly(sum(map(len, datasets)), self.settings.images)
        wanted = {places[i] for i in evenly(len(places), SHOWN_IMAGES)}
        exact: list[bool] = []
        words: list[float] = []
        tokens: list[int] = []
        shown: list[Shown] = []
        for at in range(0, len(places), BATCH):
            loaded = [(place, load(datasets, place)) for place in places[at : at + BATCH]]
            part = [(place, item) for place, item in loaded if item is not None]
            if not part:
                continue
            images = np.stack([item.pixels[0] for _, item in part])
            codes, keep = generator.tokenize(images)
            read = [generator.read_image(item.record.images[0]) for _, item in part]
            captions = [first_words(text) for text in generator.generate_text(read, [""] * len(read))]
            truths = [first_words(item.record.captions[0]) for _, item in part]
            exact += [a == b for a, b in zip(captions, truths, strict=True)]
            words += [word_overlap(a, b) for a, b in zip(captions, truths, strict=True)]
            tokens += keep.sum(-1).tolist()
            for i, (place, _) in enumerate(part):
                if place in wanted:
                    shown.append(Shown(images[i], codes[i], keep[i], captions[i], truths[i]))
        if not exact:
            raise DataError(f"no image of the {split} split can be read")
        result = Result(
            {
                "split": split,
                "caption": {"exact": float(np.mean(exact)), "words": float(np.mean(words))},
                "images": len(exact),
                "tokens_per_image": float(np.mean(tokens)),
            }
        )
        self._show(generator, shown, result)
        return result

    def _open(self, generator: Generator, context: Context) -> tuple[list[DecodedDataset], str]:
        """The data sets and their split."""
        listed = split_sources(self.settings.sources or context.header.get("sources") or "")
        if not listed:
            raise CheckpointError(
                f"{context.workdir} names no data sources (imported weights have none); captions cannot be scored"
            )
        if not self.settings.sources and not all(map(is_scenes, listed)):
            listed = [source for source in listed if evaluator_of(source) == "captions"]
        data = generator.image_tokenizer.config.data

        def opened(source: str, split: str) -> list[DecodedDataset]:
            return open_images(dataclasses.replace(data, sources=source), split, ("images", "captions"))

        found: list[DecodedDataset] = []
        if self.settings.split == "test":
            for source in listed:
                try:
                    found += opened(source, "test")
                except DataError as error:
                    print(f"captions: no held-out images ({error})", flush=True)
            if found:
                return found, "test"
        print("captions: the scores are of training images", flush=True)
        return [dataset for source in listed for dataset in opened(source, "train")], "train"

    def _show(self, generator: Generator, shown: list[Shown], result: Result) -> None:
        """Adds sheets and examples."""
        codes, keep = np.stack([x.codes for x in shown]), np.stack([x.keep for x in shown])
        for name in generator.decoders:
            decoded = generator.decode(codes[:12], keep[:12], name)
            sheet = [*(x.image for x in shown[:12]), *decoded]
            result.images[f"reconstruction_{name}"] = grid(sheet, min(len(shown), 12))
        if generator.header["selection"] != "all":
            result.images["kept"] = grid([kept_patches(x.image, x.keep) for x in shown], min(len(shown), 12))
        result.examples["captions"] = [
            dict(file=f"image_{i:04d}.png", image=enlarged(x.image), caption=x.caption, truth=x.truth)
            for i, x in enumerate(shown)
        ]
        longest = generator.prompt_length - 2  # a prompt has a beginning and [IMG]
        prompts = [x.truth for x in shown if len(generator.text_tokenizer.encode(x.truth)) <= longest]
        rows: list[dict[str, Any]] = []
        if prompts and generator.decoders:
            samples = generator.generate_images(prompts, Sampling(guidance=self.settings.guidance), EVALUATION_SEED)
            for i, (prompt, image) in enumerate(zip(prompts, samples, strict=True)):
                row = dict(task="own captions", prompt=prompt, file=f"sample_{i:04d}.png", image=enlarged(image))
                rows.append(row)
        result.examples["samples"] = rows


def evenly(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spaced, the first and the last included."""
    return np.linspace(0, total - 1, min(total, count)).astype(int).tolist()


def load(datasets: list[DecodedDataset], place: int) -> Decoded | None:
    """A record by its place in all data sets; None if it is unusable."""
    for dataset in datasets:
        if place < len(dataset):
            return dataset.load(place)
        place -= len(dataset)
    raise IndexError(place)


def first_words(text: str) -> str:
    """The first `CAPTION_WORDS` words."""
    return " ".join(text.split()[:CAPTION_WORDS])


def word_overlap(a: str, b: str) -> float:
    """Number of words that both have, as a share of the longer one's."""
    first, second = collections.Counter(a.lower().split()), collections.Counter(b.lower().split())
    return sum((first & second).values()) / max(sum(first.values()), sum(second.values()), 1)
