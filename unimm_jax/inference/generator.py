"""Generates images from prompts and text about images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unimm_jax.data import pipeline, tasks
from unimm_jax.data.documents import (
    Document,
    ImageCodes,
    ImageOut,
    ImageStart,
    fits_row,
    input_views,
    length,
    prompt_images,
    render,
    with_slices,
)
from unimm_jax.data.slices import choose_grid, count_slices, views
from unimm_jax.data.transforms import decode_image, to_pixels
from unimm_jax.errors import CheckpointError, UserError
from unimm_jax.inference.loading import LoadedTokenizer, Model, load_companions
from unimm_jax.inference.sampling import GREEDY, SAMPLED, Decoding, Sampling

PROMPT_STEP = 64  # tokens; one compilation per multiple


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A document to continue, whose texts are strings, and its images, each uint8 [H, W, 3].

    Attributes:
      slices: also read images in slices that are larger than the model reads, if it was trained on slices. As in
        training, all images are read as a whole if the prompt with slices does not fit a row.
    """

    document: Document
    images: Sequence[np.ndarray] | np.ndarray = ()
    slices: bool = True


class Generator:
    """A unified model with its image tokenizer and decoders, ready to generate images and text.

    Args (constructor):
      model: from `loading.load_model`, or one in training.
      batch: images or questions at a time; part of the compiled shape.
      prompt_length: maximum tokens per prompt, image features included; 0 is a row of training, at least 1,024.
        Prompts are padded to a multiple of `PROMPT_STEP`, so short ones do not cost what the maximum would.
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
        self.layout = pipeline.layout_of(self.header, self.text_tokenizer, self.config)
        self.vocabulary = self.layout.vocabulary
        self.fit = str(self.header.get("fit", "stretch"))  # how an image becomes a square
        self.task_settings = pipeline.task_settings(self.config)
        self.batch, self.answer_length = batch, answer_length
        self.prompt_length = prompt_length or max(self.config.data.seq_len, 1024)
        self.image_tokenizer, self.decoders = companions or load_companions(model)
        self._encode = jax.jit(self._encode_images)
        self._encode_kept = jax.jit(self._encode_with_mask)
        self.max_codes = min(self.header["num_patches"], self.layout.max_codes or self.header["num_patches"])
        fixed = self.header["selection"] == "all"
        decoding = Decoding(self.objective, self.vocabulary, self.text_tokenizer, self.max_codes, fixed, answer_length)
        self._run = jax.jit(decoding, static_argnames=("drawing", "sampling", "may_draw"))

    def _encode_images(
        self, params: Any, images_and_noise: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        images, noise = images_and_noise
        tokenizer = self.image_tokenizer.module(params)
        return tokenizer.encode(tokenizer.encoder.normalize(images), noise)

    def _encode_with_mask(
        self, params: Any, images_and_keep: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        images, keep = images_and_keep
        tokenizer = self.image_tokenizer.module(params)
        return keep, tokenizer.codes_of(tokenizer.features(tokenizer.encoder.normalize(images)), keep)

    # ---- Images --------------------------------------------------------------------------------------------------

    def generate_image_tokens(self, prompts: Sequence[str], sampling: Sampling = SAMPLED, seed: int = 0) -> np.ndarray:
        """Image token ids for each prompt, int32 [N, steps] ([/IMG] and what follows it are padding).

        The ids depend on the prompt, the seed and the index, not on the other prompts of a batch.

        Raises:
          UserError: a prompt longer than `prompt_length`.
        """
        found = [Prompt(tasks.text_to_image_prompt(prompt)) for prompt in prompts]
        return self.continue_with_image(found, sampling, seed)

    def continue_with_image(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = SAMPLED,
        seed: int = 0,
        free: Sequence[Prompt] | None = None,
        streams: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Ids of the image that follows each prompt; see `generate_image_tokens`.

        Args:
          free: with guidance, the prompts without condition; [IMG] alone if None.
          streams: number of the random stream of each prompt; its index if None.
        """
        free = [Prompt(())] * len(prompts) if free is None else free
        if len(free) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, and {len(free)} without condition")
        asked = [*prompts, *free] if sampling.guidance != 1 else prompts
        return self._continue([with_start(prompt) for prompt in asked], True, sampling, seed, len(prompts), streams)

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
        decoder = self.decoder_name(decoder)
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

    def decoder_name(self, decoder: str) -> str:
        """A decoder, or the first one present if the name is empty.

        Raises:
          CheckpointError: no such decoder.
        """
        decoder = decoder or next(iter(self.decoders), "pixel_decoder")
        if decoder not in self.decoders:
            present = ", ".join(self.decoders) or "none"
            raise CheckpointError(
                f"there is no {decoder} beside {self.model.workdir} (present: {present}); train that stage or choose "
                "another decoder"
            )
        return decoder

    def generate_images(
        self,
        prompts: Sequence[str],
        sampling: Sampling = SAMPLED,
        seed: int = 0,
        decoder: str = "",
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Prompts → images uint8 [N, H, W, 3]; for the decoder and the size see `decode`."""
        return self.decode(*self.codes(self.generate_image_tokens(prompts, sampling, seed)), decoder, seed, size)

    def edit_images(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        instructions: Sequence[Sequence[str]],
        sampling: Sampling = SAMPLED,
        seed: int = 0,
        decoder: str = "",
    ) -> list[np.ndarray]:
        """Edits images turn by turn: for each turn, the results uint8 [N, S, S, 3].

        After each turn, the result is read again as the image tokenizer and the encoder see it. With guidance, the
        unconditional prompt asks to reconstruct the image that a turn edits, as in ILLUME+'s code; with LaVIT's layout
        of prompts (`config.data.image_prompts="codes"`), it is [IMG] alone.

        Args:
          images: each uint8 [H, W, 3]. instructions: of each image, as many for each.

        Raises:
          UserError: a prompt longer than `prompt_length`, or images with other numbers of instructions.
          CheckpointError: no such decoder.
        """
        if len(images) != len(instructions) or len(set(map(len, instructions))) != 1:
            raise UserError("edits need the same number of instructions, at least one, for each image")
        decoder = self.decoder_name(decoder)
        seen, results = [[image] for image in images], []
        for turn in range(len(instructions[0])):
            asked = [tasks.edit_prompt(each[: turn + 1], self.task_settings) for each in instructions]
            free = tasks.unconditional_edit_prompt(self.task_settings)
            ids = self.continue_with_image(
                [Prompt(document, list(history)) for document, history in zip(asked, seen, strict=True)],
                sampling,
                seed + turn,
                # no slices: an image that a training example also generates has none
                [Prompt(free, history[-1:] if free else (), slices=False) for history in seen],
            )
            results.append(self.decode(*self.codes(ids), decoder, seed + turn))
            for history, image in zip(seen, self.input_size(results[-1]), strict=True):
                history.append(image)
        return results

    def compose_images(
        self,
        prompts: Sequence[Sequence[np.ndarray | str]],
        sampling: Sampling = SAMPLED,
        seed: int = 0,
        decoder: str = "",
        image_prompts: str = "",
    ) -> np.ndarray:
        """Prompts of images uint8 [S, S, 3] and texts, in any order → images uint8 [N, S, S, 3].

        Guidance is away from [IMG] alone.

        Args:
          image_prompts: layout of the prompts; see `image_prompt_of`.

        Raises:
          UserError: a prompt longer than `prompt_length`.
          CheckpointError: no such decoder.
        """
        decoder = self.decoder_name(decoder)
        asked = [self.image_prompt_of(parts, image_prompts) for parts in prompts]
        return self.decode(*self.codes(self.continue_with_image(asked, sampling, seed)), decoder, seed)

    def prompt_of(self, parts: Sequence[np.ndarray | str]) -> Prompt:
        """A user turn of images, uint8 [H, W, 3], and texts."""
        document, images = numbered(parts)
        return Prompt(tasks.user_prompt(document, self.task_settings), images)

    def image_prompt_of(self, parts: Sequence[np.ndarray | str], image_prompts: str = "") -> Prompt:
        """A prompt of images, uint8 [S, S, 3], and texts for an image.

        Args:
          image_prompts: layout, one of `tasks.IMAGE_PROMPTS`; `config.data.image_prompts` if empty.
        """
        document, images = numbered(parts)
        chosen = image_prompts or self.task_settings.image_prompts
        settings = dataclasses.replace(self.task_settings, image_prompts=chosen)
        return Prompt(tasks.image_prompt(document, settings), images)

    def read_image(self, image: bytes | np.ndarray) -> np.ndarray:
        """An encoded image, or pixels, for prompts: uint8 [H, W, 3].

        The size is the one that the model reads. The image keeps its own size where the model reads slices, or where
        the image tokenizer reads another size.

        Raises:
          InvalidRecordError: see `transforms.decode_image`.
        """
        data = self.config.data
        if not data.max_slices and data.image_size == self.header["image_size"]:
            return to_pixels(image, data.image_size, self.fit)
        return np.asarray(decode_image(image)) if isinstance(image, bytes) else image

    def input_size(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Generated images for prompts, each uint8 [H, W, 3]: [N, S, S, 3], in the size that the model reads.

        Images in the size of the image tokenizer stay as they are: they are tokenized again, and enlarged where the
        model reads another size.
        """
        tokenized = self.header["image_size"]
        is_tokenized = all(image.shape[:2] == (tokenized, tokenized) for image in images)
        return _resized(images, tokenized if is_tokenized else self.config.data.image_size, self.fit)

    # ---- Text ----------------------------------------------------------------------------------------------------

    def tokenize(
        self, images: Sequence[np.ndarray] | np.ndarray, keep: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images, each uint8 [H, W, 3] → (codes int32 [N, P], keep boolean [N, P]); resized for the image tokenizer.

        Args:
          keep: keep masks to use instead of the selector's.
        """
        images = _resized(images, self.header["image_size"], self.fit)
        x = (images, self.image_tokenizer.noise(images) if keep is None else keep)
        encode = self._encode if keep is None else self._encode_kept
        keeps, codes = [], []
        for at in range(0, len(images), self.batch):
            part = jax.tree.map(lambda array, at=at: _pad(array[at : at + self.batch], self.batch), x)
            k, c = encode(self.image_tokenizer.params, part)
            keeps.append(np.asarray(k))
            codes.append(np.asarray(c))
        return np.concatenate(codes)[: len(images)], np.concatenate(keeps)[: len(images)]

    def generate_text(
        self, images: Sequence[np.ndarray] | np.ndarray, questions: Sequence[str], sampling: Sampling = GREEDY
    ) -> list[str]:
        """Answers one question per image; an empty question asks for a caption. Greedy by default.

        Args:
          images: each uint8 [H, W, 3].

        Raises:
          UserError: a prompt longer than `prompt_length`.
        """
        documents = [
            tasks.question_prompt(question, self.task_settings) if question else tasks.caption_prompt()
            for question in questions
        ]
        prompts = [Prompt(d, [image]) for d, image in zip(documents, images, strict=True)]
        return self.continue_with_text(prompts, sampling)

    def continue_with_text(self, prompts: Sequence[Prompt], sampling: Sampling = GREEDY, seed: int = 0) -> list[str]:
        """The text that follows each prompt, up to </s>. Greedy by default.

        Raises:
          UserError: a prompt longer than `prompt_length`, or a minimum length that is not below the maximum.
        """
        if sampling.min_length >= self.answer_length:
            raise UserError(f"min_length {sampling.min_length} must be below the maximum, {self.answer_length} tokens")
        found = self._continue(prompts, False, sampling, seed, len(prompts))
        return [self.text_tokenizer.decode(_until(row, self.text_tokenizer.eos)) for row in found]

    def continue_until_image(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = GREEDY,
        seed: int = 0,
        streams: Sequence[int] | None = None,
    ) -> list[tuple[str, bool]]:
        """The text that follows each prompt, up to </s> or [IMG], and whether an image follows it.

        The text is empty where an image or the end follows at once. A text of `answer_length` tokens is not followed by
        an image.

        Args:
          streams: see `continue_with_image`.

        Raises:
          UserError: a prompt longer than `prompt_length`, or beam search.
        """
        if sampling.beams > 1:
            raise UserError("beam search is for texts that end with </s>; write texts before images with 1 beam")
        found = self._continue(prompts, False, sampling, seed, len(prompts), streams, may_draw=True)
        texts = []
        for row in found:
            ids = _until(row, self.text_tokenizer.eos)
            written = _until(np.asarray(ids), self.vocabulary.start)
            texts.append((self.text_tokenizer.decode(written), len(written) < len(ids)))
        return texts

    def _continue(
        self,
        prompts: Sequence[Prompt],
        drawing: bool,
        sampling: Sampling,
        seed: int,
        number: int,
        streams: Sequence[int] | None = None,
        may_draw: bool = False,
    ) -> np.ndarray:
        """Continues the first `number` prompts: int32 [number, steps].

        With guidance, `prompts` has `number` prompts, and then as many without condition.

        One compilation per maximum number of images.

        Args:
          streams: see `continue_with_image`. may_draw: see `Decoding`.
        """
        tokens, valid, index, seen, keep = self._rendered(prompts)
        slots = max(map(len, seen))
        numbers = jnp.asarray(list(range(number) if streams is None else streams), jnp.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)
        places = np.arange(len(prompts)).reshape(-1, number)  # with, and perhaps without condition
        done = []
        for at in range(0, number, self.batch):
            part = _pad(places[:, at : at + self.batch].T, self.batch).T
            rows = part.reshape(-1)
            views = self._stacked([seen[row] for row in rows], [keep[row] for row in rows], slots)
            batch = [tokens[rows], valid[rows], index[rows], *views]
            with jax.set_mesh(self.model.mesh):
                how = dict(drawing=drawing, sampling=sampling, may_draw=may_draw)
                found = self._run(self.params, *batch, keys[part[0]], **how)
            done.append(np.asarray(found))
        return np.concatenate(done)[:number]

    def _rendered(
        self, prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[np.ndarray]], list[list[np.ndarray]]]:
        """Prompts for `Decoding`: tokens, which are valid, feature indices [N, T]; views and keep masks of each prompt.

        Images that a prompt holds as codes are rendered with the codes that the image tokenizer gives them. Where all
        patches are read and no prompt has codes, the image tokenizer is not needed.
        """
        wholes = [image for prompt in prompts for image in prompt.images]
        segments = (segment for prompt in prompts for segment in prompt.document)
        has_codes = any(isinstance(segment, ImageOut | ImageCodes) for segment in segments)
        if wholes and (has_codes or not self.layout.view_features):
            codes, masks = self.tokenize(wholes)
        else:
            codes = np.zeros((len(wholes), self.header["num_patches"]), np.int32)
            masks = np.ones(codes.shape, bool)
        cuts = np.cumsum([0, *(len(prompt.images) for prompt in prompts)])
        rows, seen, kept = [], [], []
        for prompt, at, end in zip(prompts, cuts, cuts[1:], strict=False):
            reads = prompt_images(prompt.document)
            if reads != tuple(range(end - at)):
                raise UserError(f"a prompt has {end - at} images and reads {len(reads)}")
            document = self._with_slices(prompt, masks[at:end].sum(-1))
            sliced = {image for image, view in input_views(document) if view}
            found = [self._views(image, i in sliced) for i, image in enumerate(prompt.images)]
            rows.append(row := render(document, (), masks[at:end], codes[at:end], self.layout))
            seen.append([found[image][view] for image, view in row.inputs])
            kept.append([self._mask(masks[at + image]) for image, _ in row.inputs])
            if len(row.ids) > self.prompt_length:
                raise UserError(
                    f"a prompt has {len(row.ids)} tokens, the limit is {self.prompt_length}; shorten the prompt or "
                    "raise --prompt_length"
                )
        longest = -(-max(len(row.ids) for row in rows) // PROMPT_STEP) * PROMPT_STEP
        tokens = np.zeros((len(prompts), longest), np.int32)
        valid = np.zeros(tokens.shape, bool)
        index = np.full(tokens.shape, -1, np.int32)
        for i, row in enumerate(rows):
            n = len(row.ids)
            tokens[i, -n:], valid[i, -n:], index[i, -n:] = row.ids, True, row.feature
        return tokens, valid, index, seen, kept

    def _stacked(
        self, seen: Sequence[list[np.ndarray]], kept: Sequence[list[np.ndarray]], slots: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Views uint8 [N, slots, S, S, 3] and keep masks boolean [N, slots, P] of prompts."""
        size = self.config.data.image_size
        images = np.zeros((len(seen), slots, size, size, 3), np.uint8)
        keep = np.zeros((len(seen), slots, self.layout.view_features or self.header["num_patches"]), bool)
        keep[..., 0] = True  # unused slots
        for i, (pixels, masks) in enumerate(zip(seen, kept, strict=True)):
            if pixels:
                images[i, : len(pixels)], keep[i, : len(pixels)] = pixels, masks
        return images, keep

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt has at most `prompt_length` tokens."""
        kept = [self.max_codes] * len(prompt.images)
        return length(self._with_slices(prompt, kept), (), kept, self.layout) <= self.prompt_length

    def _with_slices(self, prompt: Prompt, kept: Sequence[int] | np.ndarray) -> Document:
        """The document of a prompt with the slices of its images, or without if they do not fit a row of training.

        Args:
          kept: number of kept patches of each image.
        """
        data = self.config.data
        if not (prompt.slices and data.max_slices):
            return prompt.document
        sizes = [(image.shape[1], image.shape[0]) for image in prompt.images]
        document = with_slices(prompt.document, count_slices(sizes, data.image_size, data.max_slices, data.slice_grids))
        fits = fits_row(document, (), kept, self.layout, data.seq_len, data.images_per_row)
        return document if fits else prompt.document

    def _views(self, image: np.ndarray, is_sliced: bool) -> list[np.ndarray]:
        """The views of a prompt's image uint8 [H, W, 3] that the model reads."""
        data = self.config.data
        side = data.image_size
        if image.shape == (side, side, 3):
            return [image]
        limit = data.max_slices if is_sliced else 0
        grid = choose_grid(image.shape[1], image.shape[0], side, limit, data.slice_grids)
        return views(Image.fromarray(image), side, grid, self.fit)

    def _mask(self, keep_P: np.ndarray) -> np.ndarray:
        """The keep mask of a view whose image has the given one."""
        return np.ones(self.layout.view_features, bool) if self.layout.view_features else keep_P


PLACE = "<image>"


def place_images(prompt: str, count: int) -> list[int | str]:
    """The parts of a prompt with `PLACE` where its images are, in order. Without a place, images come first.

    Raises:
      UserError: the prompt has places, but not one for each image.
    """
    texts = prompt.split(PLACE)
    if len(texts) == 1:
        return [*range(count), *([prompt] if prompt else [])]
    if len(texts) - 1 != count:
        raise UserError(f"the prompt has {PLACE} {len(texts) - 1} times, and there are {count} images")
    parts: list[int | str] = []
    for i, text in enumerate(texts):
        parts += [*([i - 1] if i else []), *([text.strip()] if text.strip() else [])]
    return parts


def numbered(parts: Sequence[np.ndarray | str]) -> tuple[list[int | str], list[np.ndarray]]:
    """Parts with numbers for the images, and the images."""
    images = [part for part in parts if not isinstance(part, str)]
    places = iter(range(len(images)))
    return [part if isinstance(part, str) else next(places) for part in parts], images


def with_start(prompt: Prompt) -> Prompt:
    """A prompt that ends with [IMG]."""
    if prompt.document and isinstance(prompt.document[-1], ImageStart):
        return prompt
    return dataclasses.replace(prompt, document=(*prompt.document, ImageStart()))


def _resized(images: Sequence[np.ndarray] | np.ndarray, size: int, fit: str) -> np.ndarray:
    """Images uint8 [H, W, 3] → uint8 [N, size, size, 3]."""
    return np.stack([to_pixels(image, size, fit) for image in images])


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size` rows."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)])


def _until(ids: np.ndarray, stop: int) -> list[int]:
    found = ids.tolist()
    return found[: found.index(stop)] if stop in found else found
