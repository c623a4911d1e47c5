"""Imports published weights: into checkpoints, or directly into a stage through `init_from`.

A language model gives the parameters `language/...`, a vision encoder `encoder/...`, a U-Net `unet/...`, an autoencoder
`vae/...`. The published LaVIT gives the parts of `unimm_jax.interop.import_lavit`. Tensors are read one parameter at a
time, straight onto their shards. Nothing is written before every name and shape fits.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from unimm_jax import legacy, resolve, storage, text_tokenizer
from unimm_jax.checkpoint import Checkpoints, Stored, refuse_s3
from unimm_jax.config import Config
from unimm_jax.errors import (
    ConfigError,
    DataError,
    UnsupportedConfigError,
    UserError,
    WeightMismatchError,
    WeightsFileError,
)
from unimm_jax.inference.loading import load_image_tokenizer
from unimm_jax.interop import diffusion, encoders, import_lavit, llama, settings
from unimm_jax.interop.files import Tensors
from unimm_jax.interop.import_plan import Importer, ImportPlan, Part, Parts, init_rows_from_text
from unimm_jax.interop.published import Settings, read_config
from unimm_jax.models.denoiser import UNet, UNetConfig
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.vae import VAE, VAEConfig
from unimm_jax.models.vit import ViT, ViTConfig
from unimm_jax.vocabulary import Vocabulary

DIFFUSERS = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}  # `_class_name` → kind
KINDS = ("lavit", "language", *encoders.REGISTRY, "unet", "vae")


def import_language(source: pathlib.Path, codes: int, num_position_ids: int = 0) -> Part:
    """A language model in the Hugging Face layout; rows for [IMG], [/IMG], codes and positions follow its vocabulary.

    Raises:
      WeightsFileError, UnsupportedConfigError: the files cannot be read, or the model cannot be represented.
    """
    published = read_config(source)
    published = Settings(published).section("text_config") or published
    config = LanguageConfig(**llama.language_config(published))
    tensors, text_rows = Tensors(source), Settings(published).integer("vocab_size")
    v = Vocabulary(text_rows, codes, num_position_ids)
    make = functools.partial(LanguageModel, config, text_rows, v.visual_rows)
    importer = Importer(functools.partial(Parts, language=make))

    def unused(name: str) -> bool:
        return (config.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")

    importer.add(llama.language(config, text_rows, 0), tensors, unused)
    used = 2 + codes + num_position_ids
    init_rows_from_text(importer, "embed_visual", used, tensors, "model.embed_tokens.weight")
    if not config.tied:
        init_rows_from_text(importer, "head_visual", used, tensors, "lm_head.weight")
    return Part(importer, {"language": config})


def import_encoder(source: pathlib.Path, kind: str) -> Part:
    """A vision encoder; `kind` is a name of `encoders.REGISTRY`. Raises as `import_language`."""
    layout = encoders.get(kind)
    config = ViTConfig(**layout.vit_config(read_config(source), source))
    importer = Importer(functools.partial(Parts, encoder=functools.partial(ViT, config)))
    table = layout.table(config.depth, config.biases, "encoder/")
    importer.add(table, Tensors(source), layout.is_unused, rename=layout.full_name)
    return Part(importer, {"encoder": config})


def import_unet(source: pathlib.Path) -> Part:
    """A U-Net of `diffusers`. Raises as `import_language`."""
    arguments, linear = diffusion.unet_config(read_config(source))
    config = UNetConfig(**arguments)
    importer = Importer(functools.partial(Parts, unet=functools.partial(UNet, config)))
    importer.add(diffusion.table(importer.shapes, "unet/", linear), Tensors(source))
    return Part(importer, {"unet": config})


def import_vae(source: pathlib.Path) -> Part:
    """An autoencoder of `diffusers`. Raises as `import_language`."""
    config = VAEConfig(**diffusion.vae_config(read_config(source)))
    importer = Importer(functools.partial(Parts, vae=functools.partial(VAE, config)))
    table = diffusion.table(importer.shapes, "vae/", True)
    importer.add(table, Tensors(source), rename=diffusion.modern_name)
    return Part(importer, {"vae": config})


def plan(source: pathlib.Path, kind: str, codes: int, num_position_ids: int = 0) -> ImportPlan:
    """What a source holds, by part, before anything is read; all kinds but "lavit" have one part, ""."""
    if kind == "lavit":
        return import_lavit.plan(source)
    if kind == "language":
        return {"": import_language(source, codes, num_position_ids)}
    if kind in ("unet", "vae"):
        return {"": (import_unet if kind == "unet" else import_vae)(source)}
    return {"": import_encoder(source, kind)}


def guess_kind(source: pathlib.Path) -> str:
    """The kind of a source, from its layout or its `config.json`.

    Raises:
      WeightsFileError: no such source, a checkpoint of unimm_jax, or no `config.json` that can be read.
      UnsupportedConfigError: an unknown architecture.
    """
    if _is_checkpoint(source):
        raise WeightsFileError(f"{source} is already a checkpoint of unimm_jax; name it in init_from as it is")
    if (source / "visual_tokenizer").is_dir():
        return "lavit"
    published = read_config(source)
    if layout := encoders.name_of(published):
        return layout
    kind, class_name = published.get("model_type"), published.get("_class_name")
    if kind in llama.KNOWN:
        return "language"
    if isinstance(class_name, str) and class_name in DIFFUSERS:
        return DIFFUSERS[class_name]
    known = (*llama.KNOWN, *encoders.model_types(), *DIFFUSERS)
    raise UnsupportedConfigError(
        f"{source} has a config.json of the architecture {kind or class_name!r}, which is not known; known are "
        f"{', '.join(known)}"
    )


def _is_checkpoint(path: pathlib.Path) -> bool:
    return path.is_dir() and ((path / "checkpoints").exists() or (path / "state").exists())


def open_weights(
    path: pathlib.Path, entry: dict[str, Any], config: Config, vocabulary: Vocabulary | None = None
) -> Stored | Importer:
    """Opens what an entry of `init_from` names: a checkpoint, or published weights as they were downloaded.

    Args:
      entry: besides `rename`, may have `kind` (one of KINDS, if config.json does not tell it), `part` (of LaVIT) and
        `allow` (settings that may differ, as "section.setting").
      config: of the stage, whose model settings are compared with those of the weights.
      vocabulary: of the stage; a language model gets rows for all of it.

    Raises:
      WeightsFileError: neither a checkpoint nor known weights. ConfigError: an unknown kind or part.
      WeightMismatchError: weights with other settings than the stage, all of them listed.
    """
    if _is_checkpoint(path):
        stored = Stored(path)
        sections = resolve.sections_from_json(stored.meta["config"])
        settings.check(str(path), entry, stored.shapes, sections, config.model)
        return stored
    kind = entry.get("kind")
    if kind and kind not in KINDS:
        raise ConfigError(f"config.init_from: kind {kind!r} of {path} is not known; kinds are {', '.join(KINDS)}")
    try:
        v = vocabulary or Vocabulary(0, 16384)
        parts = plan(path, kind or guess_kind(path), v.codes, v.num_position_ids)
    except UserError as error:
        message = f"config.init_from: {path} holds neither a checkpoint nor weights that can be imported: {error}"
        raise WeightsFileError(message) from None
    name = entry.get("part", "")
    if name not in parts:
        names = ", ".join(filter(None, parts)) or "none"
        raise ConfigError(f"config.init_from: {path} has no part {name!r} (parts: {names}); set part= of the entry")
    part = parts[name]
    settings.check(str(path), entry, part.importer.shapes, part.model, config.model)
    part.importer.check()
    return part.importer


def import_weights(source: str, output: str, kind: str = "", codes: int = 16384) -> None:
    """Imports a source into checkpoints under `output`.

    Args:
      kind: one of KINDS; told by the source if empty. codes: image codes that a language model gets rows for.

    Raises:
      WeightsFileError, UnsupportedConfigError: files that cannot be read, or an architecture that is not known.
      WeightMismatchError: tensors that do not fit; all of them are listed.
      ConfigError: unknown kind. DataError: an output that is not empty. CheckpointError: an output on s3://.
    """
    place, target = storage.path(source), storage.path(output)
    refuse_s3(target)
    if kind and kind not in KINDS:
        raise ConfigError(f"--kind={kind} is not known; kinds are {', '.join(KINDS)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{output} is not empty; give another --output")
    kind = kind or guess_kind(place)
    parts = plan(place, kind, codes)
    problems = [problem for part in parts.values() for problem in part.importer.problems]
    if problems:
        raise WeightMismatchError("nothing was written:\n" + "\n".join(dict.fromkeys(problems)))
    tokenizer = find_text_tokenizer(place, kind, parts)
    for name, part in parts.items():
        began = time.perf_counter()
        params = part.importer.load()
        meta = {
            "format": legacy.FORMAT,
            "config": _config(kind, name, part.model),
            "data": _header(place, kind, name, part.model, target),
            "text_tokenizer": json.dumps(tokenizer.payload if tokenizer else None),
            "step": 0,
            "seconds": time.perf_counter() - began,
        }
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        checkpoints = Checkpoints(target / name if name else target, in_flight_gib=1 + largest // 2**30)
        checkpoints.save(0, {"params": params}, meta)
        checkpoints.close()
        count = sum(int(np.prod(shape)) for shape in part.importer.shapes.values())
        print(f"import: {count / 1e6:.1f} million parameters of {name or kind} in {target / name}", flush=True)


def _config(kind: str, name: str, model: dict[str, Any]) -> str:
    """The saved config: of a complete stage for a part of LaVIT, of the model alone otherwise."""
    if kind == "lavit":
        return import_lavit.stage_config(name, model)
    sections = {section: dataclasses.asdict(values) for section, values in model.items()}
    found = {"format": legacy.FORMAT, "name": f"import:{kind}", "stage": kind, "size": "imported", "model": sections}
    return json.dumps(found, indent=1)


def _header(source: pathlib.Path, kind: str, name: str, model: dict[str, Any], target: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint says of its data; LaVIT's language model needs what records would say."""
    found: dict[str, Any] = {"source": source.resolve().name, "kind": kind}
    if kind == "lavit" and name == "language":
        encoder, tokenizer = model["encoder"], model["image_tokenizer"]
        found |= dict(num_patches=encoder.num_patches, image_size=encoder.image_size, codes=tokenizer.codes)
        found |= dict(positions=tokenizer.positions, selection=tokenizer.selection)
        found["fingerprint"] = load_image_tokenizer(target / "tokenizer").fingerprint
    return found


def find_text_tokenizer(source: pathlib.Path, kind: str, parts: ImportPlan) -> text_tokenizer.TextTokenizer | None:
    """The text tokenizer beside a language model, if there is one. LaVIT's texts do not begin with <s>."""
    name = {"language": "", "lavit": "language"}.get(kind)
    if name not in parts:
        return None
    folder = source / "language_model" if kind == "lavit" else source
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    rows = parts[name].importer.shapes["language/embed_text"][0]
    more = {"begin": False} if kind == "lavit" else {}
    return text_tokenizer.load(str(folder), rows=rows, **more)
