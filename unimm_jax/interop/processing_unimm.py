"""The processor of a model exported from unimm_jax. This file needs torch and transformers.

    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(ids, skip_special_tokens=True)

A prompt is a list of segments: ("text", TEXT), ("markup", TEXT), ("image",), ("image_start",), ("bos",) and ("eos",).
Each text is tokenized on its own, as in training. The name of a special token stands for the token in markup only,
which is what the chat template writes around the turns. `chat_template.jinja` writes the segments of a chat, one JSON
list per line.
Prompts for images also have ("image_out",), a generated image, and ("image_codes",), the codes of an image alone; the
model's `compose` and `edit` lay them out.
"""

import functools
import importlib
import io
import json
import math
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

LLAVA_NEXT_GRIDS = ((1, 2), (1, 3), (2, 1), (2, 2), (3, 1))  # (columns, rows)
RECONSTRUCT = "reconstruct"  # the instruction that guidance of an edit is away from
ACCEPTED = "images are uint8 tensors or NumPy arrays [H, W, 3] or [B, H, W, 3], PIL images, or lists of them"


def as_images(images: Any, size: int, fit: str = "stretch", other: int = 0) -> Tensor:
    """Images of any accepted kind → uint8 [B, size, size, 3].

    PIL images are converted to RGB and resized as in training; tensors and arrays must have the right size.

    Args:
      other: a second side that tensors and arrays may have; they are resized.

    Raises:
      TypeError: another kind of object or dtype. ValueError: another shape.
    """
    if isinstance(images, list | tuple):
        return joined([as_images(image, size, fit, other) for image in flat_images(images)])
    if type(images).__module__.split(".")[0] == "PIL":
        images = pil_pixels(images, size, fit)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.tensor(images)
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        dtype = f" of {images.dtype}" if isinstance(images, np.ndarray | Tensor) else ""
        raise TypeError(f"{ACCEPTED}; this is a {type(images).__name__}{dtype}")
    images = images[None] if images.ndim == 3 else images
    if other not in (0, size) and images.shape[1:] == (other, other, 3):
        pil = importlib.import_module("PIL.Image")
        return joined([as_images(pil.fromarray(image.cpu().numpy()), size) for image in images])
    if images.shape[1:] != (size, size, 3):
        sides = " or ".join(f"[B, {side}, {side}, 3]" for side in dict.fromkeys((size, other or size)))
        raise ValueError(f"images are {list(images.shape)}; this model reads {sides}")
    return images


def joined(images: Sequence[Tensor]) -> Tensor:
    """Tensors [N, size, size, 3] as one.

    Raises:
      ValueError: there are none.
    """
    if not images:
        raise ValueError("there are no images in the list")
    return torch.cat(list(images))


def pil_pixels(image: Any, size: int, fit: str) -> np.ndarray:
    """A PIL image → uint8 [size, size, 3], as in training: see `in_rgb`, bicubic.

    Args:
      fit: "stretch", or "crop" for the centered square.
    """
    image = in_rgb(image)
    if fit == "crop" and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size != (size, size):
        image = image.resize((size, size), importlib.import_module("PIL.Image").Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


def in_rgb(image: Any) -> Any:
    """A PIL image → an upright one in RGB: transparency on white, 16 bits scaled."""
    pil = importlib.import_module("PIL.Image")
    image = importlib.import_module("PIL.ImageOps").exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = pil.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def choose_grid(width: int, height: int, side: int, max_slices: int, rule: str) -> tuple[int, int] | None:
    """The grid (columns, rows) by which an image is cut into slices, as in training; None for an image without slices.

    Args:
      width, height: of the image. side: of a slice, in pixels. rule: "illume" for all grids with at most `max_slices`
        cells, "llava_next" for those of `LLAVA_NEXT_GRIDS`.
    """
    if max(width, height) <= side:
        return None
    sides = range(1, max_slices + 1)
    every = LLAVA_NEXT_GRIDS if rule == "llava_next" else [(x, y) for x in sides for y in sides]
    found = [(x, y) for x, y in every if 1 < x * y <= max_slices]

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        across, down = grid[0] * side, grid[1] * side
        scale = min(across / width, down / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - across * down

    return max(found, key=rank, default=None)


def slices(image: Any, side: int, grid: tuple[int, int]) -> np.ndarray:
    """The slices of a PIL image in raster order, uint8 [N, side, side, 3], of the image in the size of the grid."""
    pil = importlib.import_module("PIL.Image")
    (columns, rows), across, down = grid, grid[0] * side, grid[1] * side
    scale = min(across / image.width, down / image.height)
    size = min(math.ceil(image.width * scale), across), min(math.ceil(image.height * scale), down)
    canvas = pil.new("RGB", (across, down))
    fitted = image if image.size == size else image.resize(size, pil.Resampling.BICUBIC)
    canvas.paste(fitted, ((across - size[0]) // 2, (down - size[1]) // 2))
    pixels = np.array(canvas).reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return pixels.reshape(rows * columns, side, side, 3)


def open_image(name: str) -> Any:
    """A PIL image from a path, or from a URL with the scheme http, https or data."""
    pil = importlib.import_module("PIL.Image")
    if name.startswith(("http://", "https://", "data:")):
        with urllib.request.urlopen(name) as response:
            return pil.open(io.BytesIO(response.read()))
    return pil.open(name)


def flat_images(images: Any) -> list[Any]:
    """Images in any nesting of lists and batches → one list; paths and URLs are opened."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [found for item in images for found in flat_images(item)]
    return [open_image(images) if isinstance(images, str) else images]


class UniMMProcessor(ProcessorMixin):
    """Chats, texts and images → token ids and pixels.

    An image is two ids, [IMG] and [/IMG]. How many tokens lie between them is known only when the model has read the
    image: the model calls `place_images`.

    Args (constructor):
      tokenizer: with [IMG], [/IMG], codes and positions as added tokens.
      image_size: side in pixels of the images that the model reads. code_size: side of those that the image tokenizer
        reads.
      max_image_tokens: maximum number of kept patches per image; None for all. view_features: number of features of
        every view that is read; 0 where they are those of the kept patches.
      start, end: ids of [IMG] and [/IMG]. first_code: id of image code 0. first_position: id of patch position 0.
      num_position_ids: 0 for none.
      bos, eos: ids of the beginning and end of a text; None where texts have no beginning token.
      text_vocabulary: number of ids of the text tokenizer of the training, which come first.
      is_literal: whether the names of special tokens are plain text in markup, too (sentencepiece).
      image_prompts: layout of prompts with images for images: "features" for a user turn whose images are read,
        "features_last" for one with its texts first, "codes" for texts and the images' codes in order.
      fit: how a PIL image becomes a square: "stretch", or "crop" for the centered square.
      max_slices: of an image that is larger than `image_size`; 0 if images are read as a whole only.
      slice_grids: the rule for their grid, see `choose_grid`.
      seq_len, images_per_row: maximum number of tokens and of views for slices, those of a row of training; 0 for all.
      chat_template: `chat_template.jinja`.
    """

    flat_images = staticmethod(flat_images)

    def __init__(
        self,
        tokenizer: Any,
        image_size: int,
        code_size: int,
        max_image_tokens: int | None,
        view_features: int,
        start: int,
        end: int,
        first_code: int,
        first_position: int,
        num_position_ids: int,
        bos: int | None,
        eos: int,
        text_vocabulary: int,
        is_literal: bool,
        image_prompts: str = "features",
        fit: str = "stretch",
        max_slices: int = 0,
        slice_grids: str = "illume",
        seq_len: int = 0,
        images_per_row: int = 0,
        chat_template: str | None = None,
    ):
        self.image_size, self.code_size = image_size, code_size
        self.max_image_tokens, self.view_features = max_image_tokens, view_features
        self.start, self.end, self.first_code = start, end, first_code
        self.first_position, self.num_position_ids = first_position, num_position_ids
        self.bos, self.eos = bos, eos
        self.text_vocabulary, self.is_literal = text_vocabulary, is_literal
        self.image_prompts, self.fit = image_prompts, fit
        self.max_slices, self.slice_grids = max_slices, slice_grids
        self.seq_len, self.images_per_row = seq_len, images_per_row
        super().__init__(tokenizer, chat_template=chat_template)

    @functools.cached_property
    def _text_tokenizers(self) -> dict[str, Any]:
        """The text tokenizer of the training for "text" and "markup". It does not know [IMG] and other added tokens."""
        settings = json.loads(self.tokenizer.backend_tokenizer.to_str())
        settings["added_tokens"] = [t for t in settings["added_tokens"] if t["id"] < self.text_vocabulary]
        new = importlib.import_module("tokenizers").Tokenizer.from_str
        found = {name: new(json.dumps(settings)) for name in ("text", "markup")}
        found["text"].encode_special_tokens = True
        found["markup"].encode_special_tokens = self.is_literal
        return found

    def encode(self, segments: Sequence[Sequence[str]]) -> list[int]:
        """Token ids of a prompt; see the head of this file."""
        special = {
            "image": [self.start, self.end],
            "image_start": [self.start],
            "bos": [] if self.bos is None else [self.bos],
            "eos": [self.eos],
        }
        ids: list[int] = []
        for name, *text in segments:
            if name in self._text_tokenizers:
                ids += self._text_tokenizers[name].encode(*text, add_special_tokens=False).ids
            else:
                ids += special[name]
        return ids

    def ask(self, question: str) -> str:
        """The text for `__call__` of a question about one image; an empty question asks for a caption."""
        if not question:
            return '["image"]'
        return self.apply_chat_template([message("user", [None, question])], add_generation_prompt=True)

    def image_prompt(self, parts: Sequence[Any]) -> list[list[str]]:
        """Segments of a prompt for an image; its layout is `image_prompts`.

        Args:
          parts: texts, and anything else for an image, in order.
        """
        if self.image_prompts == "codes":
            placed = [["text", part] if isinstance(part, str) else ["image_codes"] for part in parts]
            return [["bos"], *placed, ["image_start"]]
        return self._image_after([message("user", parts)])

    def edit_prompt(self, instructions: Sequence[str]) -> list[list[str]]:
        """Segments of a prompt for the result of the last instruction. The images are the source, then the results."""
        if self.image_prompts == "codes":
            return self.image_prompt([part for each in instructions for part in (None, each)])
        messages = [message("user", [None, instructions[0]])]
        for instruction in instructions[1:]:
            messages += [message("assistant", [None]), message("user", [instruction])]
        return self._image_after(messages)

    def unconditional_edit_prompt(self) -> list[list[str]]:
        """Segments of the prompt that guidance of an edit is away from, whose image is edited; none for [IMG] alone."""
        return [] if self.image_prompts == "codes" else self.edit_prompt([RECONSTRUCT])

    def _image_after(self, messages: list[dict[str, Any]]) -> list[list[str]]:
        """Segments of a chat that an image follows. Generated images are read again in the next turn."""
        order = "last" if self.image_prompts == "features_last" else "first"
        text = self.apply_chat_template(messages, add_generation_prompt=True, generated_images=order)
        return [*read_segments(text), ["image_start"]]

    def lay_out(
        self,
        segments: Sequence[Sequence[str]],
        keep: Sequence[Tensor] | Tensor,
        codes: Sequence[Tensor] | Tensor,
        views: Sequence[int] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Lays out a prompt whose images have been tokenized.

        The n-th ("image",) reads image n. ("image_out",) and ("image_codes",) stand for the first image that no segment
        before them has.

        Args:
          keep: keep masks of the images, boolean [N, P]. codes: their codes [N, P].
          views: of each image, in how many views it is read: the whole and its slices; one if None.

        Returns:
          see `place_images`.

        Raises:
          ValueError: the number of images differs.
        """
        ids: list[int] = []
        features: list[int] = []
        read = used = 0
        for segment in segments:
            name = segment[0]
            if name == "image":
                if read == len(keep):
                    raise ValueError(f"the prompt has more than {read} images")
                masks = [keep[read]] * (views[read] if views else 1)
                placed, where = self.place_images([self.start, self.end] * len(masks), masks)
                features += [len(ids) + at for at in where]
                ids += placed
                read += 1
                used = max(read, used)
            elif name in ("image_out", "image_codes"):
                if used == len(keep):
                    raise ValueError(f"the prompt has more than {used} images")
                written = self._written(keep[used], codes[used])
                ids += written if name == "image_codes" else [self.start, *written, self.end]
                used += 1
            else:
                ids += self.encode([segment])
        if used != len(keep):
            raise ValueError(f"the prompt has {used} images, and {len(keep)} are given")
        return ids, features

    def _written(self, keep: Tensor, codes: Tensor) -> list[int]:
        """Ids of a generated image without [IMG] and [/IMG]: keep mask and codes [P] → ids."""
        found: list[int] = []
        for patch in keep.nonzero()[:, 0].tolist()[: self.max_image_tokens]:
            found += [self.first_position + patch] if self.num_position_ids else []
            found.append(self.first_code + int(codes[patch]))
        return found

    def apply_chat_template(self, conversation: Any, *arguments: Any, **options: Any) -> Any:
        """Lays chats out; see `ProcessorMixin.apply_chat_template`.

        With `tokenize=True`, it gives `input_ids` [B, T], and with `return_dict=True` also what else `__call__` gives.
        With `tokenize=False`, it gives the segments as JSON lines, which are the text for `__call__`.

        Args:
          conversation: messages with `role` and `content`, or a list of such lists. Content is a text or a list of
            {"type": "text", "text": TEXT} and {"type": "image", "image": IMAGE}. IMAGE is of any kind that `__call__`
            takes; "path" or "url" may stand for "image".
        """
        return super().apply_chat_template(conversation, *arguments, as_segments=True, **options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Token ids and pixels for `model.generate`.

        Args:
          images: all images of the texts in order: PIL images, paths, URLs, uint8 arrays or tensors [H, W, 3], or lists
            of them. Without images, only the ids are given. With texts, PIL images that are larger than `image_size`
            are followed by their slices, if the model reads slices and those of a text fit a row of training.
          text: one or several results of `apply_chat_template(..., tokenize=False)`.
          return_tensors: "pt", "np", or None for ids as lists.

        Returns:
          `input_ids` and `attention_mask` [B, T], padded on the left, and `pixel_values` uint8 [N, S, S, 3].

        Raises:
          ValueError: a text that the chat template did not write, or not as many images as the texts have.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads text and images only")
        texts = [text] if isinstance(text, str) else list(text or ())
        prompts = [read_segments(item) for item in texts]
        data: dict[str, Any] = {}
        pixels = None
        if images is None:
            rows = [self.encode(prompt) for prompt in prompts]
        else:
            given = self.flat_images(images)
            counts = [prompt.count(["image"]) for prompt in prompts]
            if prompts and len(given) != sum(counts):
                raise ValueError(f"the texts have {sum(counts)} images, and {len(given)} are given")
            rest = iter(given)
            own = [[next(rest) for _ in range(count)] for count in counts]
            read = [self._read(*pair) for pair in zip(prompts, own, strict=True)]
            rows = [ids for ids, _ in read]
            pixels = joined([each for _, views in read for each in views] if prompts else [*map(self.whole, given)])
        if rows:
            length, pad = max(map(len, rows)), self.tokenizer.pad_token_id
            pad = self.eos if pad is None else pad
            data["input_ids"] = [[pad] * (length - len(row)) + row for row in rows]
            data["attention_mask"] = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        if pixels is not None:
            data["pixel_values"] = pixels if return_tensors == "pt" else pixels.numpy()
        return BatchFeature(data, tensor_type=return_tensors)

    def _read(self, prompt: Sequence[list[str]], images: Sequence[Any]) -> tuple[list[int], list[Tensor]]:
        """Ids of a prompt, [IMG] [/IMG] for each view, and the views of each image; no slices if they do not fit."""
        for views_of in (self.views, self.whole):
            views = [views_of(image) for image in images]
            counts = iter(map(len, views))
            ids = self.encode([part for s in prompt for part in ([s] * next(counts) if s == ["image"] else [s])])
            number = sum(map(len, views))
            if self.fits_row(len(ids) + number * self.view_features, number):
                break
        return ids, views

    def fits_row(self, tokens: int, views: int) -> bool:
        """Whether a prompt fits a row of training. If one with slices does not, its images are read as a whole."""
        return tokens <= (self.seq_len or tokens) and views <= (self.images_per_row or views)

    def whole(self, image: Any) -> Tensor:
        """An image of any accepted kind as a whole: uint8 [1, S, S, 3]."""
        return as_images(image, self.image_size, self.fit, self.code_size)

    def for_codes(self, images: Any) -> Tensor:
        """Images of any accepted kind in the size of the image tokenizer: uint8 [N, C, C, 3]."""
        return as_images(self.flat_images(images), self.code_size, self.fit, self.image_size)

    def views(self, image: Any) -> Tensor:
        """An image as a whole and, where a large PIL image is read in slices, its slices: uint8 [1 + N, S, S, 3]."""
        if self.max_slices and type(image).__module__.split(".")[0] == "PIL":
            image, side = in_rgb(image), self.image_size
            if grid := choose_grid(image.width, image.height, side, self.max_slices, self.slice_grids):
                # stretched, so that the whole image shows what the slices show
                pixels = [pil_pixels(image, side, "stretch")[None], slices(image, side, grid)]
                return torch.from_numpy(np.concatenate(pixels))
        return self.whole(image)

    def place_images(self, ids: Sequence[int], keep: Sequence[Tensor] | Tensor) -> tuple[list[int], list[int]]:
        """Places the features of images between [IMG] and [/IMG].

        Args:
          ids: of a prompt without padding. keep: keep masks of its images in order, boolean [N, P].

        Returns:
          all ids, and the indices of those that stand for a feature: `view_features` per image, or those of at most
          `max_image_tokens` kept patches in raster order, each after the id of its position if the model has such ids.

        Raises:
          ValueError: the number of images differs.
        """
        found: list[int] = []
        features: list[int] = []
        masks = list(keep)
        for here, following in zip(ids, [*ids[1:], None], strict=True):
            found.append(here)
            if (here, following) != (self.start, self.end):
                continue
            if not masks:
                raise ValueError(f"the prompt has more than {len(keep)} images; give pixel_values for all of them")
            kept = masks.pop(0).nonzero()[:, 0].tolist()[: self.max_image_tokens]
            for patch in range(self.view_features) if self.view_features else kept:
                if self.num_position_ids and not self.view_features:
                    found.append(self.first_position + patch)
                features.append(len(found))
                found.append(self.start)
        if masks:
            raise ValueError(f"the prompt has {len(keep) - len(masks)} images, and {len(keep)} are given")
        return found, features


def read_segments(text: str) -> list[list[str]]:
    """The segments of a rendered chat template: one JSON list per line.

    Raises:
      ValueError: another text.
    """
    try:
        found = [json.loads(line) for line in text.split("\n") if line]
    except ValueError:
        found = [text]
    if not all(isinstance(segment, list) for segment in found):
        raise ValueError(f"{text[:80]!r} is not a chat that apply_chat_template(..., tokenize=False) has laid out")
    return found


def message(role: str, parts: Sequence[Any]) -> dict[str, Any]:
    """A message of a chat from texts, and anything else for an image without pixels."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return {"role": role, "content": content}
