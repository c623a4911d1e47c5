"""A unified image-and-text language model exported from unimm_jax, in PyTorch. The files need torch and transformers.

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    keep, codes = model.tokenize(images)                    # uint8 [B, H, W, 3], or PIL images
    model.describe(images, ["how many circles are there?"]) # "" asks for a caption
    images = model.draw(["two red circles"], guidance=1.5)  # uint8 [1, H, W, 3]
    model.compose([[images[0], "and a blue square"]])       # prompts of images and texts
    model.edit(images, [["make it blue", "add a cross"]])   # the results of each turn

Chats go through the processor, in `processing_unimm.py`; `model.generate` takes what it gives. The language model alone
opens with AutoModelForCausalLM. Parameters have the names of unimm_jax's tree.
"""

import importlib
import inspect
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor, DynamicCache

from .denoiser_unimm import LatentDecoder, UNet, alphas
from .image_tokenizer_unimm import NEG_INF, ImageTokenizer, Merger, PixelDecoder, ViT, unpatchify

# options of `generate` that `UniMM.write` sets itself, or that change what is returned
OWN_OPTIONS = {
    "eos_token_id", "pad_token_id", "suppress_tokens", "inputs_embeds", "num_return_sequences",
    "return_dict_in_generate", "generation_config",
}  # fmt: skip


class Seen(NamedTuple):
    """An image of a prompt: views uint8 [V, S, S, 3] (the whole, then its slices), keep mask [P] and codes [P].

    `whole` is its only view where slices do not fit, uint8 [1, S, S, 3].
    """

    views: Tensor
    whole: Tensor
    keep: Tensor
    codes: Tensor


class UniMM(nn.Module):
    """One decoder-only language model that reads images and generates them.

    Args (constructor):
      settings: `unimm.json`. language: the language model. processor: of the same directory.
    """

    def __init__(self, settings: dict[str, Any], language: nn.Module, processor: Any):
        super().__init__()
        self.settings, self.language, self.processor = settings, language, processor
        m, width = settings["model"], settings["model"]["encoder"]["width"]
        self.image_size: int = m["encoder"]["image_size"]
        self.image_tokenizer = ImageTokenizer(m["tokenizer_encoder"], m["tokenizer"])
        self.encoder = ViT(m["encoder"])
        config: Any = language.config
        d: int = config.hidden_size
        # older versions of transformers have the second name
        self.cache_argument = (
            "cache" if "cache" in inspect.signature(language.forward).parameters else "past_key_values"
        )
        self.has_merger = m["unified"]["connector"] == "merger"
        if self.has_merger:
            self.merger = Merger(width, m["image_tokenizer"])
            self.adapter = nn.Linear(width, d)
        else:
            inner = width * m["unified"]["patch_merge"] ** 2
            self.adapter_inner, self.adapter = nn.Linear(inner, d), nn.Linear(d, d)
        if "pixel_decoder" in m:
            self.pixel_decoder = PixelDecoder(m["pixel_decoder"], m["tokenizer_encoder"])
        if "unet" in m:
            self.unet = UNet(m["unet"])
        latent = {
            name: LatentDecoder(m["tokenizer_encoder"], m["tokenizer"], part["conditioner"])
            for name, part in settings["latent"].items()
        }
        self.latent = nn.ModuleDict(latent)
        self.decoders = [name for name in ("pixel_decoder",) if name in m]
        self.decoders += (["unet_decoder"] if "unet" in m else []) + list(latent)
        self.folder = pathlib.Path()
        self.opened: dict[str, tuple[Any, Any]] = {}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """AutoModel calls this for classes of remote code; it does nothing."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> "UniMM":
        """Opens an exported directory, or one that was uploaded to the Hugging Face Hub, by its repository.

        Raises:
          ValueError: options that spread or quantize the parameters, or files that do not fit the code.
        """
        del args
        from safetensors.torch import load_file

        for name in ("device_map", "quantization_config"):
            if kwargs.get(name) is not None:
                raise ValueError(f"this model is loaded without {name}; give dtype, and use .to(device)")
        folder = pathlib.Path(path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            chosen = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if kwargs.get(name)}
            folder = pathlib.Path(
                snapshot_download(str(path), local_files_only=bool(kwargs.get("local_files_only")), **chosen)
            )
        settings = json.loads((folder / "unimm.json").read_text())
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        language = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        model = cls(settings, language, AutoProcessor.from_pretrained(folder, trust_remote_code=True))
        weights = load_file(folder / "unimm.safetensors")
        own = {k for k in model.state_dict() if not k.startswith("language.")}
        model.folder = folder
        if own != set(weights):
            raise ValueError(f"{folder} does not fit: {sorted(own ^ set(weights))[:10]}")
        model.load_state_dict(weights, strict=False)
        return (model.to(dtype) if dtype else model).eval()

    # Reading

    @torch.no_grad()
    def tokenize(self, images: Any) -> tuple[Tensor, Tensor]:
        """Images of any kind that the processor takes → (keep boolean [B, P], codes [B, P])."""
        return self.image_tokenizer.encode(self.processor.for_codes(images))

    def features(self, image: Tensor, keep: Tensor) -> Tensor:
        """What the language model reads of one image, uint8 [H, W, 3]: [S, D]."""
        x = self.encoder(self.encoder.normalize(image[None]))
        if self.has_merger:
            rows = min(int(keep.sum()), self.settings["max_image_tokens"])
            return self.adapter(self.merger.kept(x, keep[None]))[0, :rows]
        x = merge_patches(x, self.settings["model"]["unified"]["patch_merge"])
        return self.adapter(F.gelu(self.adapter_inner(x)))[0]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token ids → [1, T, D]."""
        table = self.language.get_input_embeddings()  # type: ignore[operator]
        return table(torch.tensor([list(ids)], device=table.weight.device))

    def embed_prompt(self, ids: Sequence[int], images: Tensor, keep: Tensor) -> Tensor:
        """Ids of a prompt without padding, its images uint8 [N, S, S, 3] and their keep masks → [1, T, D]."""
        placed, where = self.processor.place_images(ids, keep)
        return self.embed_placed(placed, where, images, keep)

    def embed_parts(self, segments: Sequence[Sequence[str]], images: Sequence[Seen]) -> Tensor:
        """Segments of a prompt and its images → [1, T, D]. All are read as a whole if slices do not fit a row."""
        keep, codes = ([getattr(image, name) for image in images] for name in ("keep", "codes"))
        count = sum(segment[0] == "image" for segment in segments)  # the others need no features
        for views in ([image.views for image in images], [image.whole for image in images]):
            ids, where = self.processor.lay_out(segments, keep, codes, [*map(len, views)])
            pixels = [view for each in views[:count] for view in each]
            masks = [mask for mask, each in zip(keep, views[:count], strict=False) for _ in each]
            if self.processor.fits_row(len(ids), len(pixels)):
                break
        return self.embed_placed(ids, where, pixels, masks)

    def embed_placed(
        self,
        ids: Sequence[int],
        where: Sequence[int],
        images: Sequence[Tensor] | Tensor,
        keep: Sequence[Tensor] | Tensor,
    ) -> Tensor:
        """Ids of a prompt, [1, T, D], with the features of its images at the positions `where`.

        Args:
          images: views that the prompt reads in order, uint8 [N, S, S, 3]. keep: their keep masks [N, P].
        """
        x = self.embed(ids)
        rows = [self.features(image, mask) for image, mask in zip(images, keep, strict=True)]
        if rows:
            x[0, where] = torch.cat(rows).to(x.dtype)
        return x

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 40,
        **options: Any,
    ) -> Tensor:
        """Text after each prompt: ids [B, T + new], padded on the right; what is new ends with `eos`.

        Args:
          input_ids, attention_mask, pixel_values: from the processor; the images of all prompts in order.
          options: of the language model's `generate`, such as num_beams and length_penalty; greedy without.

        Raises:
          ValueError: an option that is set here, or that changes what is returned.
        """
        if taken := OWN_OPTIONS & options.keys():
            raise ValueError(f"{', '.join(sorted(taken))} cannot be set")
        pad, start, end = (self.settings[name] for name in ("pad", "start", "end"))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[own.bool()].tolist() for row, own in zip(input_ids, mask, strict=True)]
        counts = [sum(pair == (start, end) for pair in zip(ids, ids[1:], strict=False)) for ids in prompts]
        images = torch.zeros(0, self.image_size, self.image_size, 3)
        if pixel_values is not None and len(pixel_values):
            images = self.processor(pixel_values)["pixel_values"]
        keep = torch.ones(len(images), self.settings["num_patches"], dtype=torch.bool)
        if len(images) and not self.settings["view_features"]:
            keep = self.tokenize(images)[0]
        if len(images) != sum(counts):
            raise ValueError(f"the prompts have {sum(counts)} images, and pixel_values has {len(images)}")
        parts = zip(prompts, images.split(counts), keep.split(counts), strict=True)
        found = [self.write(self.embed_prompt(*part), max_new_tokens, **options) for part in parts]
        length = max(map(len, found))
        new = torch.tensor([ids + [pad] * (length - len(ids)) for ids in found], dtype=torch.long)
        return torch.cat([input_ids, new.to(input_ids.device)], 1)

    def write(self, x: Tensor, length: int, **options: Any) -> list[int]:
        """At most `length` ids of text after a prompt [1, T, D], with the end-of-text id if it ends."""
        s = self.settings
        rows = self.language.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        found = self.language.generate(  # type: ignore[operator]
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
            max_new_tokens=length,
            suppress_tokens=[*s["banned"], *range(s["text_rows"], rows)],
            eos_token_id=s["eos"],
            pad_token_id=s["pad"],
            **{"do_sample": False, **options},
        )[0].tolist()
        return found[: found.index(s["eos"]) + 1] if s["eos"] in found else found

    @torch.no_grad()
    def describe(
        self, images: Any, questions: str | Sequence[str] | None = None, length: int = 40, **options: Any
    ) -> list[str]:
        """Answers, one per image; an empty question asks for a caption.

        Args:
          images: of any kind that the processor takes. questions: one per image, or one for all. length: maximum tokens
            per answer. options: see `generate`; greedy without.
        """
        images = self.processor.flat_images(images)
        if questions is None or isinstance(questions, str):
            questions = [questions or ""] * len(images)
        texts = [self.processor.ask(question) for question in questions]
        inputs = self.processor(images, texts)
        found = self.generate(**inputs, max_new_tokens=length, **options)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(found, skip_special_tokens=True)]

    # Generating images

    @torch.no_grad()
    def generate_image_tokens(
        self,
        prompts: Sequence[str],
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Image token ids for each prompt; temperature 0 is greedy, top_k 0 chooses from all tokens."""
        asked = [self.processor.encode([("bos",), ("text", prompt), ("image_start",)]) for prompt in prompts]
        return [self.write_image(self.embed(ids), None, guidance, temperature, top_k, generator) for ids in asked]

    @torch.no_grad()
    def compose_image_tokens(self, prompts: Sequence[Sequence[Any]], **sampling: Any) -> list[list[int]]:
        """Image token ids for prompts with images; arguments as for `compose`."""
        found = []
        for parts in prompts:
            images = [part for part in parts if not isinstance(part, str)]
            prompt = self.embed_parts(self.processor.image_prompt(parts), self.seen(images) if images else [])
            found.append(self.write_image(prompt, **sampling))
        return found

    def seen(self, images: Any) -> list[Seen]:
        """Images of any kind that the processor takes, as prompts have them."""
        images = self.processor.flat_images(images)
        views, wholes = ([*map(read, images)] for read in (self.processor.views, self.processor.whole))
        return [Seen(*image) for image in zip(views, wholes, *self.tokenize(images), strict=True)]

    def write_image(
        self,
        prompt: Tensor,
        free: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Ids of the image after a prompt [1, T, D] that ends with [IMG], without [/IMG].

        Args:
          free: with guidance, the prompt without condition; [IMG] alone if None.
          guidance: s in log p = lu + s (lc - lu); 1 is off. temperature: 0 is greedy. top_k: 0 chooses from all tokens.
        """
        s = self.settings
        streams = [prompt]
        if guidance != 1:
            streams.append(self.embed([s["start"]]) if free is None else free)
        config: Any = self.language.config
        caches = [DynamicCache(config=config) for _ in streams]
        ids: list[int] = []
        position = -1
        for _ in range(s["max_image_tokens"] * (2 if s["num_position_ids"] else 1) + 1):
            logp = []
            for i, stream in enumerate(streams):
                x = self.embed(ids[-1:]) if ids else stream
                out = self.language(inputs_embeds=x, use_cache=True, **{self.cache_argument: caches[i]})
                logp.append(out.logits[0, -1].float().log_softmax(-1))
            score = logp[0] if guidance == 1 else logp[1] + guidance * (logp[0] - logp[1])
            score = torch.where(self.legal(ids, position).to(score.device), score, NEG_INF)
            if temperature == 0:
                token = int(score.argmax())
            else:
                score = score / temperature
                if top_k:
                    score[score < score.topk(min(top_k, len(score))).values[-1]] = NEG_INF
                token = int(torch.multinomial(score.softmax(-1), 1, generator=generator))
            if token == s["end"]:
                break
            ids.append(token)
            position = token - s["first_position"] if token >= s["first_position"] else position
        return ids

    def legal(self, ids: list[int], position: int) -> Tensor:
        """Which ids may follow inside an image, boolean [V]; `position` is the last one, -1 before the first."""
        s = self.settings
        mask = torch.zeros(self.language.config.vocab_size, dtype=torch.bool)  # type: ignore
        count = sum(s["first_code"] <= i < s["first_code"] + s["codes"] for i in ids)
        if s["num_position_ids"]:
            if ids and ids[-1] >= s["first_position"]:
                mask[s["first_code"] : s["first_code"] + s["codes"]] = True
                return mask
            mask[s["first_position"] + position + 1 : s["first_position"] + s["num_position_ids"]] = True
            mask[s["end"]] = count > 0
            return mask
        full = count >= s["max_image_tokens"]
        mask[s["first_code"] : s["first_code"] + s["codes"]] = not full
        mask[s["end"]] = full or (count > 0 and s["selection"] != "all")
        return mask

    def codes(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Image token ids → (codes [N, P], keep [N, P])."""
        s = self.settings
        codes = torch.zeros(len(ids), s["num_patches"], dtype=torch.long)
        keep = torch.zeros_like(codes, dtype=torch.bool)
        for row, sequence in enumerate(ids):
            position = -1
            for token in sequence:
                if s["num_position_ids"] and token >= s["first_position"]:
                    position = token - s["first_position"]
                elif s["first_code"] <= token < s["first_code"] + s["codes"]:
                    position += 0 if s["num_position_ids"] else 1
                    if 0 <= position < s["num_patches"]:
                        codes[row, position], keep[row, position] = token - s["first_code"], True
        return codes, keep

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        keep: Tensor,
        decoder: str = "",
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Codes → uint8 [N, H, W, 3].

        Args:
          decoder: one of `decoders`; the first one if empty. U-Nets of latents need diffusers.
          noise: [N, h, w, C] that a U-Net starts from. size: (H, W), for U-Nets of latents.
        """
        decoder = decoder or (self.decoders[0] if self.decoders else "pixel_decoder")
        if decoder not in self.decoders:
            raise ValueError(f"this model has no {decoder}; its decoders are {', '.join(self.decoders) or 'none'}")
        if decoder == "pixel_decoder":
            pixels = self.pixel_decoder(self.image_tokenizer.decode(codes, keep))
        elif decoder in self.latent:
            pixels = (self.decode_latent(decoder, codes, keep, noise, generator, size) + 1) / 2
        else:
            pixels = (self.decode_pixels(self.image_tokenizer.decode(codes, keep), noise, generator) + 1) / 2
        return (pixels.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)

    def decode_pixels(self, context: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Samples a U-Net of unshuffled pixels: [N, H, W, 3] in [-1, 1]."""
        d = self.settings["diffusion"]
        side = self.settings["model"]["tokenizer_encoder"]["image_size"] // d["unshuffle"]
        if noise is None:
            noise = torch.randn(len(context), side, side, 3 * d["unshuffle"] ** 2, generator=generator)
        both = torch.cat([context, torch.zeros_like(context)])

        def predict(x: Tensor, steps: Tensor) -> Tensor:
            return self.unet(x.to(context.dtype), steps, both)

        x = self.diffuse(predict, noise.permute(0, 3, 1, 2).to(context.device), d, clip=True)
        return unpatchify(x.permute(0, 2, 3, 1).flatten(1, 2), d["unshuffle"])

    def open_latent(self, name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
        """The U-Net and the autoencoder of a decoder, opened by diffusers once."""
        if name not in self.opened:
            diffusers = importlib.import_module("diffusers")
            folder = self.folder / self.settings["latent"][name]["folder"]
            unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
            vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
            self.opened[name] = unet.to(device), vae.to(device)
        return self.opened[name]

    def decode_latent(
        self,
        name: str,
        codes: Tensor,
        keep: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
        size: tuple[int, int] | None,
    ) -> Tensor:
        """Samples a U-Net of an autoencoder's latents: [N, H, W, 3] in about [-1, 1]."""
        d, part = self.settings["latent"][name], self.latent[name]
        x = self.image_tokenizer.decode(codes, keep, part.decoder)  # type: ignore[arg-type]
        unet, vae = self.open_latent(name, x.dtype, x.device)
        height, width = size or (d["pixel_size"],) * 2
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (len(codes), height // shrink, width // shrink, vae.config.latent_channels)
        noise = torch.randn(shape, generator=generator) if noise is None else noise
        context, pooled, mask = part.conditioner(x)  # type: ignore[operator]
        more = {}
        if pooled is not None:
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return unet(z.to(x.dtype), t, context, encoder_attention_mask=mask, **more).sample

        z = self.diffuse(predict, noise.permute(0, 3, 1, 2).to(x.device), d, clip=False)
        return vae.decode(z.to(x.dtype) / vae.config.scaling_factor).sample.permute(0, 2, 3, 1)

    def diffuse(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, d: dict[str, Any], clip: bool) -> Tensor:
        """DDIM with guidance from noise [N, C, h, w]; `predict` takes and gives both halves, conditional first."""
        table, stride = alphas(x.device), 1000 // d["steps"]
        for t in range((d["steps"] - 1) * stride + 1, 0, -stride):
            t = min(t, 999)
            a, b = table[t], table[t - stride] if t >= stride else table[0]
            steps = torch.full((2 * len(x),), t, device=x.device)
            found, free = predict(torch.cat([x, x]), steps).float().chunk(2)
            guided = free + d["guidance"] * (found - free)
            clean = guided if d["prediction"] == "sample" else (x - (1 - a).sqrt() * guided) / a.sqrt()
            clean = clean.clamp(-1, 1) if clip else clean
            eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
            x = b.sqrt() * clean + (1 - b).sqrt() * eps
        return x

    def draw(
        self, prompts: Sequence[str], decoder: str = "", size: tuple[int, int] | None = None, **sampling: Any
    ) -> Tensor:
        """Prompts → uint8 [N, H, W, 3]; `sampling` as for `generate_image_tokens`."""
        return self.decode(*self.codes(self.generate_image_tokens(prompts, **sampling)), decoder, size=size)

    def compose(self, prompts: Sequence[Sequence[Any]], decoder: str = "", **sampling: Any) -> Tensor:
        """Prompts of images and texts, in any order → uint8 [N, H, W, 3].

        The layout of the prompts is the processor's `image_prompts`. Guidance is away from [IMG] alone.

        Args:
          prompts: lists of texts and of images of any kind that the processor takes, except for paths and URLs.
          decoder: see `decode`. sampling: guidance, temperature, top_k and generator, see `write_image`.
        """
        return self.decode(*self.codes(self.compose_image_tokens(prompts, **sampling)), decoder)

    @torch.no_grad()
    def edit(
        self,
        images: Any,
        instructions: Sequence[str | Sequence[str]],
        decoder: str = "",
        guidance: float = 1.0,
        **sampling: Any,
    ) -> list[Tensor]:
        """Edits images turn by turn: for each turn, the results uint8 [N, H, W, 3].

        After each turn, the result is read again as the image tokenizer and the encoder see it. Guidance is away from
        the reconstruction of the image that a turn edits; with the layout "codes" of prompts, from [IMG] alone.

        Args:
          images: of any kind that the processor takes. instructions: of each image, one or several, as many for each.
          decoder: see `decode`. guidance, sampling: temperature, top_k and generator, see `write_image`.

        Raises:
          ValueError: images with other numbers of instructions.
        """
        images = self.processor.flat_images(images)
        asked = [[each] if isinstance(each, str) else list(each) for each in instructions]
        if len(images) != len(asked) or len(set(map(len, asked))) != 1 or not asked[0]:
            raise ValueError("edits need the same number of instructions, at least one, for each image")
        seen: list[list[Seen]] = []  # of each turn
        results: list[Tensor] = []
        for turn in range(len(asked[0])):
            last = images if turn == 0 else self.input_size(results[-1])
            seen.append(self.seen(last))
            found = []
            for each, *history in zip(asked, *seen, strict=True):
                prompt = self.embed_parts(self.processor.edit_prompt(each[: turn + 1]), history)
                source = history[-1]._replace(views=history[-1].whole)  # without slices
                free = None if guidance == 1 else self.unconditional_edit(source)
                found.append(self.write_image(prompt, free, guidance, **sampling))
            results.append(self.decode(*self.codes(found), decoder))
        return results

    def unconditional_edit(self, image: Seen) -> Tensor | None:
        """The prompt [1, T, D] that guidance of an edit of an image is away from; None for [IMG] alone.

        Args:
          image: without slices; a training example has none of an image that it also generates.
        """
        segments = self.processor.unconditional_edit_prompt()
        return self.embed_parts(segments, [image]) if segments else None

    def input_size(self, images: Tensor) -> Tensor:
        """Generated images, uint8 [N, H, W, 3], in the size that the model or the image tokenizer reads."""
        if images.shape[1] == images.shape[2] and images.shape[1] in (self.image_size, self.processor.code_size):
            return images
        pil = importlib.import_module("PIL.Image")
        return self.processor([pil.fromarray(image.numpy()) for image in images.cpu()])["pixel_values"]


def merge_patches(x: Tensor, side: int) -> Tensor:
    """Concatenates the features of squares of `side` × `side` patches: [B, P, D] → [B, P / side², side² · D]."""
    b, p, d = x.shape
    n = round(p**0.5) // side
    return x.view(b, n, side, n, side, d).transpose(2, 3).reshape(b, n * n, side * side * d)
