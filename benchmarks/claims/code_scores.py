"""How well a language model has aligned captions with codes: cross-entropy, conditional gain, caption matching.

Raw cross-entropy cannot be compared between image tokenizers, because their codes have different entropies. Therefore:

- relative cross-entropy: cross-entropy of a code given the caption, divided by the unigram entropy of the codes;
- gain: cross-entropy of the codes of an image without its caption, less that after the caption, in nats per image: what
  the model has learned from the caption. Without the caption, the codes are predicted after [IMG] alone, by their
  unigram distribution, or by the mean of the probabilities after the other captions of the group, whichever is best on
  average. Early in training, a model has hardly seen [IMG] alone; its large cross-entropy there is no gain;
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
      cross_entropy: of all codes of the image after its caption, in nats. unconditional: without the caption.
      matched: whether the own caption ranks first in its group.
    """

    cross_entropy: np.ndarray
    unconditional: np.ndarray
    matched: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """Conditional gain of each image, in nats."""
        return self.unconditional - self.cross_entropy


def scores_of(losses: np.ndarray, unconditional: np.ndarray, unigram_losses: np.ndarray) -> CodeScores:
    """Scores from cross-entropies.

    Args:
      losses: [N, G] of the codes of image i after each caption of its group; image i is number i % G of its group.
      unconditional: after [IMG] alone, [N]. unigram_losses: by the frequencies of the codes, [N].
    """
    own = np.arange(len(losses)) % losses.shape[1]
    right = losses[np.arange(len(losses)), own]
    others = losses.copy()
    others[np.arange(len(losses)), own] = np.inf
    mixture = np.log(losses.shape[1] - 1) - np.logaddexp.reduce(-others, axis=-1)
    without = min((unconditional, unigram_losses, mixture), key=np.mean)
    return CodeScores(right, without, right < others.min(-1))


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
        counts = np.bincount(codes, minlength=int(training.header["codes"])) + 1  # a code that is not seen is possible
        log_shares = np.log(counts / counts.sum())
        own = [held_out[i] for i in self.groups.ravel()]
        self.unigram_losses = np.array([-log_shares[item.codes[0][item.keep[0]]].sum() for item in own])
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
        losses = self._losses(params, self.rows).reshape(-1, GROUP)
        return scores_of(losses, self._losses(params, self.free), self.unigram_losses)
