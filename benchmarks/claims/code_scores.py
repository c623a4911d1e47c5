"""How well a language model has aligned captions with codes: cross-entropy, conditional gain, caption matching.

Raw cross-entropy cannot be compared between image tokenizers, because their codes have different entropies. Therefore:

- relative cross-entropy: cross-entropy of a code given the caption, divided by the unigram entropy of the codes;
- gain: cross-entropy of the codes of an image after the unconditional prompt, less that after the caption, in nats per
  image: what the model has learned from the caption;
- matching: whether the own caption gives the codes the highest probability of all captions of a group.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

GROUP = 16  # captions per group
ROWS = 256  # sequences at a time


@dataclasses.dataclass(frozen=True)
class CodeScores:
    """Scores of one model. One value per image [N].

    Attributes:
      cross_entropy: of all codes of the image after its caption, in nats. unconditional: after [IMG] alone.
      matched: whether the own caption ranks first in its group.
    """

    cross_entropy: np.ndarray
    unconditional: np.ndarray
    matched: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """Conditional gain of each image, in nats."""
        return self.unconditional - self.cross_entropy


def scores_of(losses: np.ndarray, unconditional: np.ndarray) -> CodeScores:
    """Scores from cross-entropies.

    Args:
      losses: [N, G] of the codes of image i after each caption of its group; image i is number i % G of its group.
      unconditional: [N].
    """
    own = np.arange(len(losses)) % losses.shape[1]
    right = losses[np.arange(len(losses)), own]
    others = losses.copy()
    others[np.arange(len(losses)), own] = np.inf
    return CodeScores(right, unconditional, right < others.min(-1))


def groups(captions: Sequence[str], number: int, size: int = GROUP) -> np.ndarray:
    """Images in `number` groups whose captions differ: int [number, size], in the order of the captions.

    Raises:
      ValueError: too few different captions.
    """
    left, found = list(range(len(captions))), []
    while len(found) < number:
        seen: dict[str, int] = {}
        for i in left:
            if captions[i] not in seen and len(seen) < size:
                seen[captions[i]] = i
        if len(seen) < size:
            raise ValueError(f"{len(captions)} captions do not make {number} groups of {size} different ones")
        found.append(list(seen.values()))
        chosen = set(found[-1])
        left = [i for i in left if i not in chosen]
    return np.array(found)


def unigram(codes: np.ndarray, size: int) -> tuple[float, float]:
    """(entropy of the codes in nats, share of the codebook that occurs).

    Args:
      codes: int, any shape. size: of the codebook.
    """
    counts = np.bincount(np.ravel(codes), minlength=size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()), float((counts > 0).mean())


class CodeScorer:
    """Scores language models on held-out records of one image each.

    Args (constructor):
      model: a language stage (`loading.load_model`); `score` takes the parameters of other steps.
      records: directory that `unimm_jax.pretokenize` wrote. images: held-out images, a multiple of `GROUP`.

    Attributes:
      entropy, used: unigram entropy in nats and share of the codebook in use, of the training records.
    """

    def __init__(self, model: Any, records: pathlib.Path, images: int):
        import jax

        from unimm_jax.data import pipeline
        from unimm_jax.data.records import Records

        self.model = model
        self.layout = pipeline.layout_of(model.header, model.text_tokenizer, model.config)
        held_out, training = Records.open(records, "test"), Records(records)
        outlines = [held_out.outline(i) for i in range(len(held_out))]
        captions = [held_out[i].texts[outline.captions[0]] for i, outline in enumerate(outlines)]
        self.groups = groups(captions, images // GROUP)
        documents = [self._document(held_out[i], captions[j]) for group in self.groups for i in group for j in group]
        free = [self._document(held_out[i], None) for i in self.groups.ravel()]
        length = max(len(tokens.ids) for tokens in documents)
        packing = dataclasses.replace(
            pipeline.packing_config(model.config), seq_len=-(-length // 8) * 8, images_per_row=0
        )
        self.rows, self.free = (self._rows(found, packing) for found in (documents, free))
        sample = range(0, len(training), max(len(training) // 4000, 1))
        codes = np.concatenate([training[i].codes[0][training[i].keep[0]] for i in sample])
        self.entropy, self.used = unigram(codes, int(training.header["codes"]))
        self.codes_per_image = float(np.mean([held_out[i].keep[0].sum() for i in self.groups.ravel()]))
        objective = model.objective
        self._loss = jax.jit(lambda params, batch: (objective.cross_entropy(params, batch) * batch["weights"]).sum(-1))

    def _document(self, record: Any, caption: str | None) -> Any:
        """The tokens of a text-to-image example; only its codes have a weight."""
        from unimm_jax.data.documents import ImageOut, Special, Text, render

        prompt = () if caption is None else (Special("bos"), Text(caption))
        tokens = render((*prompt, ImageOut(0)), (), record.keep, record.codes, self.layout)
        weights = tokens.weights * (tokens.targets != self.layout.vocabulary.end)
        return dataclasses.replace(tokens, weights=weights.astype(np.float32))

    def _rows(self, documents: list[Any], packing: Any) -> dict[str, np.ndarray]:
        from unimm_jax.data.packing import BuiltExample, build_row

        num_patches = self.model.header["num_patches"]
        rows = [build_row([BuiltExample(tokens, [], [])], packing, num_patches) for tokens in documents]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _losses(self, params: Any, rows: dict[str, np.ndarray]) -> np.ndarray:
        """Summed cross-entropy of the codes of every row."""
        import jax

        number = len(rows["tokens"])
        found = []
        for at in range(0, number, ROWS):
            chosen = np.minimum(np.arange(at, at + ROWS), number - 1)
            with jax.set_mesh(self.model.mesh):
                found.append(np.asarray(self._loss(params, {name: x[chosen] for name, x in rows.items()})))
        return np.concatenate(found)[:number]

    def score(self, params: Any) -> CodeScores:
        """The scores of a model with these parameters."""
        return scores_of(self._losses(params, self.rows).reshape(-1, GROUP), self._losses(params, self.free))
