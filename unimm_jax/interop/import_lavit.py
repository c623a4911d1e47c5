"""Import of the published LaVIT, part by part: image tokenizer, language model, U-Net decoders."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from unimm_jax import resolve
from unimm_jax.interop import diffusion, lavit, llama
from unimm_jax.interop.encoders import eva
from unimm_jax.interop.files import Tensors
from unimm_jax.interop.import_plan import Importer, ImportPlan, Part, Parts
from unimm_jax.interop.published import Settings, read_config
from unimm_jax.interop.table import Entry
from unimm_jax.models.conditioner import Conditioner, ConditionerConfig
from unimm_jax.models.denoiser import UNet, UNetConfig
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.tokenizer import ImageTokenizer, ImageTokenizerConfig
from unimm_jax.models.unified import UnifiedConfig, UnifiedModel
from unimm_jax.models.vae import VAE, VAEConfig
from unimm_jax.models.vit import ViTConfig
from unimm_jax.vocabulary import Vocabulary

# part → (folder of its U-Net, file of its feature decoder, which of the two conditioners)
UNET_DECODERS = {
    "unet_decoder": (lavit.PIXEL_FOLDERS["unet_decoder"], "tokenizer_decoder.bin", "low"),
    "unet_decoder_high": (lavit.PIXEL_FOLDERS["unet_decoder_high"], "highres_tokenizer_decoder.bin", "high"),
}
COMPANIONS = {"image_tokenizer": "../tokenizer"} | {name: f"../{name}" for name in UNET_DECODERS}


def plan(source: pathlib.Path) -> ImportPlan:
    """The parts `tokenizer`, `language`, `unet_decoder` and `unet_decoder_high`; all but the first are optional.

    The merger of `tokenizer_encoder.bin` makes codes and belongs to the tokenizer. That of `visual_weight.bin` was
    trained with the language model and belongs to it.

    Raises:
      WeightsFileError, WeightMismatchError, UnsupportedConfigError: a file is missing or is not LaVIT's.
    """
    files = TokenizerFiles(source / "visual_tokenizer")
    found = {"tokenizer": files.plan()}
    if (source / "language_model").exists():
        found["language"] = _language(source / "language_model", files)
    for name, (folder, file, kind) in UNET_DECODERS.items():
        if (source / folder).exists() and (files.folder / file).exists():
            found[name] = _unet_decoder(source / folder, Tensors(files.folder / file), kind, files)
    return found


class TokenizerFiles:
    """The files of the image tokenizer, which every part reads.

    Args (constructor):
      folder: `visual_tokenizer`.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.eva, self.encoder = Tensors(folder / "eva_vitg_psz14.bin"), Tensors(folder / "tokenizer_encoder.bin")
        self.low = Tensors(folder / "tokenizer_decoder.bin")
        self.vit = ViTConfig(**lavit.encoder_shape(self.eva.shapes))
        self.config = ImageTokenizerConfig(**lavit.tokenizer_shape(self.encoder.shapes, self.low.shapes))

    @property
    def sections(self) -> dict[str, Any]:
        """Model sections of the tokenizer."""
        return {"encoder": self.vit, "image_tokenizer": self.config}

    def plan(self) -> Part:
        """The tokenizer with the low-resolution decoder."""
        importer = Importer(functools.partial(ImageTokenizer, self.vit, self.config))
        self.add(importer, "", self.low, "low")
        return Part(importer, self.sections)

    def add_encoder(self, importer: Importer, prefix: str = "") -> None:
        """Plans the encoder, under `prefix`."""
        table = eva.table(self.vit.depth, self.vit.biases, f"{prefix}encoder/")
        importer.add(table, self.eva, eva.LAYOUT.is_unused)

    def add(self, importer: Importer, prefix: str, decoder: Tensors, kind: str) -> None:
        """Plans the whole tokenizer, under `prefix`, with the feature decoder of a file."""

        def under_prefix(table: list[Entry]) -> list[Entry]:
            return [dataclasses.replace(entry, ours=prefix + entry.ours) for entry in table]

        def conditioner(name: str) -> bool:
            return name.startswith("unet_")

        self.add_encoder(importer, prefix)
        importer.add(under_prefix(lavit.tokenizer_encoder(self.config.merger_depth)), self.encoder)
        table = lavit.feature_decoder(self.config.decoder_depth, kind)
        mine = [entry for entry in table if entry.ours.startswith("decoder/")]
        importer.add(under_prefix(mine), decoder, conditioner)
        count = f"{prefix}quantizer/count"
        importer.make(count, lambda: np.ones(importer.shapes[count], np.float32))


def _language(folder: pathlib.Path, files: TokenizerFiles) -> Part:
    published = read_config(folder)
    language = LanguageConfig(**llama.language_config(published))
    v = Vocabulary(Settings(published).integer("vocab_size") - 2 - files.config.codes, files.config.codes)
    unified = UnifiedConfig(connector="merger", max_image_tokens=files.vit.num_patches)
    make = functools.partial(UnifiedModel, files.vit, files.config, language, unified)
    importer = Importer(functools.partial(make, text_rows=v.text_rows, visual_rows=v.visual_rows))
    files.add_encoder(importer)
    visual = Tensors(folder / "visual_weight.bin")
    importer.add(lavit.visual_weight(files.config.merger_depth), visual)

    def unused(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or name in visual

    importer.add(llama.language(language, v.text_rows, 2 + files.config.codes), Tensors(folder), unused)
    return Part(importer, files.sections | {"language": language, "unified": unified})


def _unet_decoder(folder: pathlib.Path, decoder: Tensors, kind: str, files: TokenizerFiles) -> Part:
    arguments, linear = diffusion.unet_config(read_config(folder / "unet"))
    unet, vae = UNetConfig(**arguments), VAEConfig(**diffusion.vae_config(read_config(folder / "vae")))
    conditioner = ConditionerConfig(**lavit.conditioner_shape(decoder.shapes, files.config.heads))
    empty = folder / "uncond_embeddings.bin"
    negative = Tensors(empty) if kind == "low" and empty.exists() else None
    if negative is not None:
        conditioner = dataclasses.replace(conditioner, empty=negative.shapes["<tensor>"][1])
    importer = Importer(
        functools.partial(
            Parts,
            image_tokenizer=functools.partial(ImageTokenizer, files.vit, files.config),
            conditioner=functools.partial(Conditioner, files.vit.width, files.vit.num_patches, conditioner),
            unet=functools.partial(UNet, unet),
            vae=functools.partial(VAE, vae),
        )
    )
    files.add(importer, "image_tokenizer/", decoder, kind)
    table = lavit.feature_decoder(files.config.decoder_depth, kind)

    def feature_decoder(name: str) -> bool:
        return not name.startswith("unet_")

    importer.add([entry for entry in table if entry.ours.startswith("conditioner/")], decoder, feature_decoder)
    importer.add(diffusion.table(importer.shapes, "unet/", linear), Tensors(folder / "unet"))
    table = diffusion.table(importer.shapes, "vae/", True)
    importer.add(table, Tensors(folder / "vae"), rename=diffusion.modern_name)
    if negative is not None:
        importer.add([Entry("conditioner/empty", "<tensor>", "batched")], negative)
    return Part(importer, files.sections | {"conditioner": conditioner, "unet": unet, "vae": vae})


def stage_config(name: str, model: dict[str, Any]) -> str:
    """The complete config, as JSON, of a stage that has a part as its model, so that it runs as trained stages do."""
    size = model["encoder"].image_size
    given: dict[str, Any] = dict(
        name=f"import:lavit:{name}",
        stage=name,
        size="imported",
        dtype="float32",
        train=dict(steps=1, batch_size=1),
        data=dict(image_size=size),
        model={section: dataclasses.asdict(values) for section, values in model.items()},
    )
    if name == "tokenizer":
        given |= dict(objective="tokenization", loss=dict(phase="codes"))
    elif name == "language":
        given |= dict(objective="language_modeling", loss=dict(chunk=1024), companions=COMPANIONS)
        given["data"] |= dict(image_prompts="codes", tasks=dict(caption=0.5, text_to_image=0.5))
    else:
        given |= dict(objective="denoising", loss=dict(sampling_steps=50))
        shrink = 2 ** (len(model["vae"].block_out_channels) - 1)
        given["data"]["pixel_size"] = shrink * (128 if name.endswith("high") else 64)  # 1024 and 512 as published
    return resolve.parse(given).to_json()
