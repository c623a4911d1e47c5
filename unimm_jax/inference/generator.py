"""Generates images from prompts and text about images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimm_jax.data import pipeline
from unimm_jax.errors import CheckpointError, UserError
from unimm_jax.inference.loading import LoadedTokenizer, Model, load_companions
from unimm_jax.inference.sampling import GREEDY, SAMPLED, Decoding, Sampling


class Generator:
    """A unified model with its image tokenizer and decoders, ready to generate images and text.

    Args (constructor):
      model: from `loading.load_model`, or one in training.
      batch: images or questions at a time; part of the compiled shape.
      prompt_length: maximum tokens per prompt, image features included; 0 is an image and 32 tokens, at least 64.
      answer_length: maximum tokens per answer.
      companions: from `loading.load_companions`; loaded if None.

    Raises (constructor):
      CheckpointError: a companion is missing or belongs to another tokenizer.
    """

    def __init__(
        self,
        model: Model,
        batch: int = 32,
        prompt_length: int = 0,
        answer_length: int = 40,
        companions: tuple[LoadedTokenizer, dict[str, tuple[Any, Any]]] | None = None,
    ):
        self.model, self.config, self.header = model, model.config, model.header
        self.objective, self.params, self.text_tokenizer = model.objective, model.params, model.text_tokenizer
        self.vocabulary = pipeline.vocabulary_of(self.header, self.text_tokenizer)
        self.max_image_tokens: int = self.config.model["unified"].max_image_tokens
        self.batch = batch
        image_tokens = self.max_image_tokens * (2 if self.vocabulary.num_position_ids else 1)
        self.prompt_length = prompt_length or max(64, image_tokens + 32)
        self.image_tokenizer, self.decoders = companions or load_companions(model)
        self._encode = jax.jit(self._encode_images)
        self._encode_kept = jax.jit(self._encode_with_mask)
        max_codes = min(self.header["num_patches"], self.max_image_tokens)
        fixed = self.header["selection"] == "all"
        decoding = Decoding(self.objective, self.vocabulary, self.text_tokenizer, max_codes, fixed, answer_length)
        self._run = jax.jit(decoding, static_argnames=("drawing", "sampling"))

    def _encode_images(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokenizer = self.image_tokenizer.module(params)
        return tokenizer.encode(tokenizer.encoder.normalize(images))

    def _encode_with_mask(
        self, params: Any, images_and_keep: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        images, keep = images_and_keep
        tokenizer = self.image_tokenizer.module(params)
        return keep, tokenizer.codes_of(tokenizer.encoder(tokenizer.encoder.normalize(images)), keep)

    # ---- Images --------------------------------------------------------------------------------------------------

    def generate_image_tokens(self, prompts: Sequence[str], sampling: Sampling = SAMPLED, seed: int = 0) -> np.ndarray:
        """Image token ids for each prompt, int32 [N, steps] ([/IMG] and what follows it are padding).

        The ids depend on the prompt, the seed and the index, not on the other prompts of a batch.

        Raises:
          UserError: a prompt longer than `prompt_length`.
        """
        bos = [] if self.text_tokenizer.bos is None else [self.text_tokenizer.bos]
        rows = [[*bos, *self.text_tokenizer.encode(p), self.vocabulary.start] for p in prompts]
        return self._batches(rows, None, None, None, True, sampling, seed)

    def codes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image token ids → (codes int32 [N, P], keep boolean [N, P])."""
        found = [self.vocabulary.read_image(row, self.header["num_patches"]) for row in ids]
        return np.stack([c for c, _ in found]), np.stack([k for _, k in found])

    def decode(
        self,
        codes: np.ndarray,
        keep: np.ndarray,
        decoder: str = "",
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Codes → images uint8 [N, H, W, 3].

        Args:
          decoder: one of `loading.DECODERS`; the first one present if empty.
          size: (H, W) of images by diffusion; the configured square if None.

        Raises:
          CheckpointError: no such decoder. UserError: a size that it cannot generate.
        """
        decoder = decoder or next(iter(self.decoders), "pixel_decoder")
        if decoder not in self.decoders:
            present = ", ".join(self.decoders) or "none"
            raise CheckpointError(
                f"there is no {decoder} beside {self.model.workdir} (present: {present}); train that stage or choose "
                "another decoder"
            )
        objective, params = self.decoders[decoder]
        if size is not None:
            unit = objective.size_unit
            if not unit:
                raise UserError("the pixel decoder generates one size; other sizes need --decoder=unet_decoder")
            if size[0] % unit or size[1] % unit or min(size) < unit:
                raise UserError(
                    f"images of {size[1]}x{size[0]} are not possible; both sides must be multiples of {unit}"
                )
        found = []
        for at in range(0, len(codes), self.batch):
            part = [_pad(x[at : at + self.batch], self.batch) for x in (codes, keep)]
            options = {} if size is None else {"size": size}
            found.append(np.asarray(objective.decode(params, *part, jax.random.key(seed + at), **options)))
        return np.concatenate(found)[: len(codes)]

    def generate_images(self, prompts: Sequence[str], sampling: Sampling = SAMPLED, seed: int = 0) -> np.ndarray:
        """Prompts → images uint8 [N, S, S, 3]."""
        return self.decode(*self.codes(self.generate_image_tokens(prompts, sampling, seed)), seed=seed)

    # ---- Text ----------------------------------------------------------------------------------------------------

    def tokenize(self, images: np.ndarray, keep: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, S, S, 3] → (codes int32 [N, P], keep boolean [N, P]).

        Args:
          keep: keep masks to use instead of the selector's.
        """
        x = images if keep is None else (images, keep)
        encode = self._encode if keep is None else self._encode_kept
        keeps, codes = [], []
        for at in range(0, len(images), self.batch):
            part = jax.tree.map(lambda array, at=at: _pad(array[at : at + self.batch], self.batch), x)
            k, c = encode(self.image_tokenizer.params, part)
            keeps.append(np.asarray(k))
            codes.append(np.asarray(c))
        return np.concatenate(codes)[: len(images)], np.concatenate(keeps)[: len(images)]

    def generate_text(self, images: np.ndarray, questions: Sequence[str], sampling: Sampling = GREEDY) -> list[str]:
        """Answers one question per image; an empty question asks for a caption. Greedy by default.

        Args:
          images: uint8 [N, S, S, 3].

        Raises:
          UserError: a prompt longer than `prompt_length`.
        """
        _, keep = self.tokenize(images)
        rows, features = [], []
        for mask, question in zip(keep, questions, strict=True):
            ids, feature_rows = self.vocabulary.place_features(np.flatnonzero(mask)[: self.max_image_tokens])
            words = self.text_tokenizer.encode(question) if question else ()
            rows.append([self.vocabulary.start, *ids, self.vocabulary.end, *words])
            features.append([-1, *feature_rows, *[-1] * (1 + len(words))])
        found = self._batches(rows, features, images, keep, False, sampling, 0)
        return [self.text_tokenizer.decode(_until(row, self.text_tokenizer.eos)) for row in found]

    def _batches(
        self,
        rows: list[list[int]],
        features: list[list[int]] | None,
        images: np.ndarray | None,
        keep: np.ndarray | None,
        drawing: bool,
        sampling: Sampling,
        seed: int,
    ) -> np.ndarray:
        longest = max(map(len, rows))
        if longest > self.prompt_length:
            raise UserError(f"a prompt has {longest} tokens, the limit is {self.prompt_length}; shorten the prompt")
        tokens = np.zeros((len(rows), self.prompt_length), np.int32)
        valid = np.zeros(tokens.shape, bool)
        index = np.full(tokens.shape, -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, -len(row) :], valid[i, -len(row) :] = row, True
            if features is not None:
                index[i, -len(row) :] = features[i]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(rows)))
        images = np.zeros((len(rows), 0), np.uint8) if images is None else images
        keep = np.zeros((len(rows), 0), bool) if keep is None else keep
        found = []
        for at in range(0, len(rows), self.batch):
            cut = slice(at, at + self.batch)
            arrays = [_pad(x[cut], self.batch) for x in (tokens, valid, index, images, keep)]
            part = keys[np.minimum(np.arange(at, at + self.batch), len(rows) - 1)]
            with jax.set_mesh(self.model.mesh):
                found.append(np.asarray(self._run(self.params, *arrays, part, drawing=drawing, sampling=sampling)))
        return np.concatenate(found)[: len(rows)]


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size` rows."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)])


def _until(ids: np.ndarray, stop: int) -> list[int]:
    found = ids.tolist()
    return found[: found.index(stop)] if stop in found else found
