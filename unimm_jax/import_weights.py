"""Turns published weights into checkpoints that stages start from (`init_from`).

python -m unimm_jax.import_weights --source=DIR_OR_FILE --output=CHECKPOINT_DIR [--kind=...]

A language model gives `language/...`, a vision encoder `encoder/...`, a U-Net `unet/...`, an autoencoder `vae/...`. The
published LaVIT gives one checkpoint for each of its parts under the output: `tokenizer`, `language`, `detokenizer`, and
`detokenizer_high` where SDXL's decoder is there. Tensors are read one parameter at a time and go straight to their
shards; nothing is written before every name and shape fits.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from ml_collections import ConfigDict

from unimm_jax import main as process
from unimm_jax import sharding, text
from unimm_jax.checkpoint import Checkpoints, Stored
from unimm_jax.interop import diffusion, lavit, llama, vision
from unimm_jax.interop.files import BadFile, Tensors
from unimm_jax.interop.table import Entry, compare, foreign_shapes, to_ours
from unimm_jax.models.conditioner import Conditioner, ConditionerConfig
from unimm_jax.models.denoiser import UNet, UNetConfig
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.tokenizer import TokenizerConfig, VisualTokenizer
from unimm_jax.models.unified import UnifiedConfig, UnifiedModel
from unimm_jax.models.vae import VAE, VAEConfig
from unimm_jax.models.vit import ViT, ViTConfig
from unimm_jax.pretokenize import open_tokenizer
from unimm_jax.vocabulary import Vocabulary

KINDS = ("lavit", "language", *vision.UNUSED, "unet", "vae")


Parted = dict[str, "tuple[Importer, dict[str, Any]]"]


class Parts(nnx.Module):
    """Modules side by side, each under its own name.

    Args (constructor):
      makers: name → what builds the module.
    """

    def __init__(self, *, rngs: nnx.Rngs, **makers: Callable[..., nnx.Module]):
        for name, make in makers.items():
            setattr(self, name, make(rngs=rngs))


class Importer:
    """Shapes first, then tensors: collects what is to be loaded, checks all of it, loads it onto a mesh.

    Args (constructor):
      make: builds the module whose parameters the checkpoint holds.
    """

    def __init__(self, make: Callable[..., nnx.Module]):
        abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=0)))
        mesh = sharding.make_mesh((1, -1, 1))
        self.places = dict(sharding.flatten(sharding.param_shardings(abstract, mesh)))
        state = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
        self.shapes = {path: tuple(leaf.shape) for path, leaf in sharding.flatten(state)}
        self.problems: list[str] = []
        self.jobs: list[tuple[Entry, Callable[[str], np.ndarray]]] = []
        self.made: dict[str, Callable[[], np.ndarray]] = {}

    def add(
        self,
        table: list[Entry],
        source: Tensors,
        unused: Callable[[str], bool] = lambda name: False,
        rename: Callable[[str], str] = lambda name: name,
    ) -> None:
        """Plans to load a table from a source; names and shapes that do not fit are kept for `load`.

        Args:
          unused: names that may be left where they are. rename: a source's own name → the table's.
        """
        names = {rename(name): name for name in source.shapes}
        present = {new: source.shapes[old] for new, old in names.items()}
        try:
            compare(foreign_shapes(table, self.shapes), present, unused)
        except ValueError as error:
            where = ", ".join(f.name for f in source.files[:3])
            self.problems.append(f"{where}: {error}")
        self.jobs += [(entry, lambda name: source[names[name]]) for entry in table]

    def make(self, path: str, value: Callable[[], np.ndarray]) -> None:
        """Plans a parameter that no file holds."""
        self.made[path] = value

    def load(self) -> dict[str, Any]:
        """All parameters as a nested dict, over all devices; see `read`."""
        return sharding.unflatten(dict(self.read(self.places)))

    def read(self, places: dict[str, Any]) -> Iterator[tuple[str, jax.Array]]:
        """Pairs of path and array for the paths given, each on its sharding, dtypes as in the files.

        Raises:
          ValueError: what does not fit, all of it, or parameters that nothing gives.
        """
        given = {entry.ours for entry, _ in self.jobs} | set(self.made)
        missing = [path for path in self.shapes if path not in given]
        if missing:
            self.problems.append("nothing gives " + ", ".join(missing))
        if self.problems:
            raise ValueError("nothing was written:\n" + "\n".join(self.problems))
        total = sum(int(np.prod(self.shapes[p])) for p in places)
        done, began, told = 0, time.perf_counter(), 0.0
        for entry, read in self.jobs:
            if entry.ours not in places:
                continue
            array = to_ours(entry, read, self.shapes[entry.ours])
            yield entry.ours, _place(array, places[entry.ours])
            done += array.size
            if time.perf_counter() - told > 5:
                told = time.perf_counter()
                left = (total - done) / max(done, 1) * (told - began)
                print(f"import  {done / 1e6:.0f} of {total / 1e6:.0f} million parameters  ETA {left:.0f} s", flush=True)
        for path, value in self.made.items():
            if path in places:
                yield path, _place(value(), places[path])


def _place(array: np.ndarray, place: Any) -> jax.Array:
    return jax.block_until_ready(jax.make_array_from_callback(array.shape, place, array.__getitem__))


def like_rows(importer: Importer, part: str, used: int, source: Tensors, name: str) -> None:
    """New visual rows: normal, with the mean and the spread of the text rows, in their dtype."""
    path = f"language/{part}"
    shape = importer.shapes[path]

    def make() -> np.ndarray:
        table = source[name]
        sample = table[:: max(len(table) // 4096, 1)].astype(np.float32)
        rng = np.random.default_rng([0, len(path)])
        rows = rng.normal(sample.mean(), sample.std(), shape).astype(np.float32)
        rows[used:] = 0
        return rows.astype(table.dtype)

    importer.make(path, make)


def import_language(source: pathlib.Path, codes: int, patches: int = 0) -> tuple[Importer, dict[str, Any]]:
    """A Hugging Face language model; rows for [IMG], [/IMG], `codes` and `patches` come on top of its vocabulary."""
    published = _config(source)
    published = published.get("text_config") or published
    shape = llama.language_config(published)
    config = LanguageConfig(**shape)
    tensors = Tensors(source)
    words = published["vocab_size"]
    v = Vocabulary(words, codes, patches)
    importer = Importer(
        functools.partial(Parts, language=functools.partial(LanguageModel, config, words, v.visual_rows))
    )
    tied = lambda name: config.tied and name == "lm_head.weight"
    unused = lambda name: tied(name) or name.endswith("rotary_emb.inv_freq")
    importer.add(llama.language(config, words, 0), tensors, unused)
    used = 2 + codes + patches
    like_rows(importer, "embed_visual", used, tensors, "model.embed_tokens.weight")
    if not config.tied:
        like_rows(importer, "head_visual", used, tensors, "lm_head.weight")
    return importer, {"language": shape}


def import_vision(source: pathlib.Path, layout: str) -> tuple[Importer, dict[str, Any]]:
    """A vision encoder."""
    shape = vision.vit_config(layout, _config(source))
    config, tensors = ViTConfig(**shape), Tensors(source)
    importer = Importer(functools.partial(Parts, encoder=functools.partial(ViT, config)))
    importer.add(
        vision.table(layout, config.depth, config.biases),
        tensors,
        lambda name: vision.unused(layout, name),
        rename=lambda name: vision.full_name(layout, name),
    )
    return importer, {"encoder": shape}


def import_unet(source: pathlib.Path) -> tuple[Importer, dict[str, Any]]:
    """A U-Net of `diffusers`."""
    shape, linear = diffusion.unet_config(_config(source))
    importer = Importer(functools.partial(Parts, unet=functools.partial(UNet, UNetConfig(**shape))))
    importer.add(diffusion.table(importer.shapes, "unet/", linear), Tensors(source))
    return importer, {"unet": shape}


def import_vae(source: pathlib.Path) -> tuple[Importer, dict[str, Any]]:
    """An autoencoder of `diffusers`."""
    shape = diffusion.vae_config(_config(source))
    importer = Importer(functools.partial(Parts, vae=functools.partial(VAE, VAEConfig(**shape))))
    table = diffusion.table(importer.shapes, "vae/", True)
    importer.add(table, Tensors(source), rename=diffusion.modern_name)
    return importer, {"vae": shape}


def import_lavit(source: pathlib.Path) -> dict[str, tuple[Importer, dict[str, Any]]]:
    """The published LaVIT, part by part; parts whose files are not there are left out (the tokenizer must be).

    `tokenizer_encoder.bin`'s merger makes codes and belongs to the tokenizer; `visual_weight.bin`'s was trained with
    the language model and belongs to it.
    """
    visual = source / "visual_tokenizer"
    eva, encoder_file = Tensors(visual / "eva_vitg_psz14.bin"), Tensors(visual / "tokenizer_encoder.bin")
    low = Tensors(visual / "tokenizer_decoder.bin")
    e = lavit.encoder_shape(eva.shapes)
    t = lavit.tokenizer_shape(encoder_file.shapes, low.shapes)
    vit, settings = ViTConfig(**e), TokenizerConfig(**t)
    norms = lambda name: name.startswith(("norm.", "head."))
    found: dict[str, tuple[Importer, dict[str, Any]]] = {}

    def tokenizer_into(importer: Importer, prefix: str, decoder: Tensors, kind: str) -> None:
        add = lambda table: [Entry(prefix + x.ours, x.theirs, x.layout, x.layers, x.part, x.rows) for x in table]
        importer.add(add(lavit.encoder("encoder/", "", vit.depth)), eva, norms)
        importer.add(add(lavit.tokenizer_encoder(settings.merger_depth)), encoder_file)
        table = lavit.feature_decoder(settings.decoder_depth, kind)
        mine = [x for x in table if x.ours.startswith("decoder/")]
        importer.add(add(mine), decoder, lambda name: name.startswith("unet_"))
        count = f"{prefix}quantizer/count"
        importer.make(count, lambda: np.ones(importer.shapes[count], np.float32))

    importer = Importer(functools.partial(VisualTokenizer, vit, settings))
    tokenizer_into(importer, "", low, "low")
    found["tokenizer"] = importer, {"encoder": e, "tokenizer": t}

    folder = source / "language_model"
    if folder.exists():
        published = _config(folder)
        shape = llama.language_config(published)
        language = LanguageConfig(**shape)
        v = Vocabulary(published["vocab_size"] - 2 - settings.codes, settings.codes)
        way_in = UnifiedConfig(way_in="merger", budget=vit.patches)
        weights = Tensors(folder / "visual_weight.bin")
        make = functools.partial(UnifiedModel, vit, settings, language, way_in)
        importer = Importer(functools.partial(make, text_rows=v.text, visual_rows=v.visual_rows))
        importer.add(lavit.encoder("encoder/", "", vit.depth), eva, norms)
        importer.add(lavit.visual_weight(settings.merger_depth), weights)
        shards = Tensors(folder)
        inside = set(weights.shapes)
        unused = lambda name: name.endswith("rotary_emb.inv_freq") or name in inside
        importer.add(llama.language(language, v.text, 2 + settings.codes), shards, unused)
        model = {"encoder": e, "tokenizer": t, "language": shape, "unified": dict(way_in="merger", budget=vit.patches)}
        found["language"] = importer, model
    for name, part, file in (
        ("detokenizer", "pixel_decoding", "tokenizer_decoder.bin"),
        ("detokenizer_high", "highres_pixel_decoding", "highres_tokenizer_decoder.bin"),
    ):
        if not (source / part).exists() or not (visual / file).exists():
            continue
        decoder = Tensors(visual / file)
        kind = "high" if name.endswith("high") else "low"
        unet_shape, linear = diffusion.unet_config(_config(source / part / "unet"))
        vae_shape = diffusion.vae_config(_config(source / part / "vae"))
        c = lavit.conditioner_shape(decoder.shapes, settings.heads)
        empty = source / part / "uncond_embeddings.bin"
        if kind == "low" and empty.exists():
            c["empty"] = Tensors(empty).shapes["<tensor>"][1]
        importer = Importer(
            functools.partial(
                Parts,
                tokenizer=functools.partial(VisualTokenizer, vit, settings),
                conditioner=functools.partial(Conditioner, vit.width, vit.patches, ConditionerConfig(**c)),
                unet=functools.partial(UNet, UNetConfig(**unet_shape)),
                vae=functools.partial(VAE, VAEConfig(**vae_shape)),
            )
        )
        tokenizer_into(importer, "tokenizer/", decoder, kind)
        table = lavit.feature_decoder(settings.decoder_depth, kind)
        mine = [x for x in table if x.ours.startswith("conditioner/")]
        importer.add(mine, decoder, lambda name: not name.startswith("unet_"))
        importer.add(diffusion.table(importer.shapes, "unet/", linear), Tensors(source / part / "unet"))
        importer.add(
            diffusion.table(importer.shapes, "vae/", True),
            Tensors(source / part / "vae"),
            rename=diffusion.modern_name,
        )
        if "empty" in c:
            importer.add([Entry("conditioner/empty", "<tensor>", "batched")], Tensors(empty))
        model = {"encoder": e, "tokenizer": t, "conditioner": c, "unet": unet_shape, "vae": vae_shape}
        found[name] = importer, model
    return found


def lavit_settings(part: str, model: dict[str, Any]) -> dict[str, Any]:
    """What a stage's config says beside the model, so that a part of LaVIT draws, answers and tokenizes as it is."""
    size = model["encoder"]["image_size"]
    found: dict[str, Any] = dict(dtype="float32", data=dict(image_size=size, sources="scenes"))
    if part == "language":
        found |= dict(objective="language_modeling", loss=dict(chunk=1024))
        found["companions"] = dict(tokenizer="../tokenizer", unet="../detokenizer", unet_high="../detokenizer_high")
    elif part.startswith("detokenizer"):
        loss = dict(unshuffle=1, prediction="epsilon", context_dropout=0.1, guidance=1.5, sampling_steps=50)
        found |= dict(objective="denoising", loss=loss)
        shrink = 2 ** (len(VAEConfig(**model["vae"]).block_out_channels) - 1)
        found["data"]["pixel_size"] = shrink * (128 if part.endswith("high") else 64)  # 1024 and 512 as published
    return found


def plan(source: pathlib.Path, kind: str, codes: int, patches: int = 0) -> Parted:
    """What a source holds, part by part, nothing read yet; all but LaVIT have one part, ""."""
    if kind == "lavit":
        return import_lavit(source)
    if kind == "language":
        return {"": import_language(source, codes, patches)}
    if kind in ("unet", "vae"):
        return {"": (import_unet if kind == "unet" else import_vae)(source)}
    return {"": import_vision(source, kind)}


def open_source(path: pathlib.Path, entry: dict[str, Any], vocabulary: Vocabulary | None = None) -> Stored | Importer:
    """What an entry of `init_from` names: a checkpoint, or published weights as they were downloaded.

    Args:
      entry: may hold `kind` (one of KINDS; told by config.json if absent) and `part`, which part of LaVIT.
      vocabulary: of the stage; a language model gets rows for all of it.

    Raises:
      ValueError: neither, or weights that do not fit.
    """
    if path.is_dir() and ((path / "checkpoints").exists() or (path / "state").exists()):
        return Stored(path)
    try:
        kind = entry.get("kind") or guess_kind(path)
    except ValueError as error:
        raise ValueError(f"config.init_from: {path} holds neither a checkpoint nor known weights ({error})") from None
    v = vocabulary or Vocabulary(0, 16384)
    parts = plan(path, kind, v.codes, v.patches)
    part = entry.get("part", "")
    if part not in parts:
        raise ValueError(f"config.init_from: {path} has the parts {', '.join(parts)}; put one of them as part=")
    return parts[part][0]


def import_weights(source: str, output: str, kind: str = "", codes: int = 16384) -> None:
    """Imports a source into checkpoints under `output`; see the module.

    Raises:
      ValueError: unknown kind or architecture, tensors that do not fit (all listed), a bad file, an output that exists.
    """
    place, target = pathlib.Path(source), pathlib.Path(output)
    if kind and kind not in KINDS:
        raise ValueError(f"--kind={kind} is not known; kinds are {', '.join(KINDS)}")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{output} is not empty; give another --output")
    kind = kind or guess_kind(place)
    parts = plan(place, kind, codes)
    problems = [problem for importer, _ in parts.values() for problem in importer.problems]
    if problems:
        raise ValueError("nothing was written:\n" + "\n".join(dict.fromkeys(problems)))
    words = find_text_tokenizer(place, kind, parts) if kind in ("language", "lavit") else None
    for name, (importer, model) in parts.items():
        began = time.perf_counter()
        params = importer.load()
        config = ConfigDict({"name": f"import:{kind}", "stage": name or kind, "size": "imported", "model": model})
        data: dict[str, Any] = {"source": place.name, "kind": kind}
        if kind == "lavit":
            config.update(lavit_settings(name, model))
        if kind == "lavit" and name == "language":
            e, t = ViTConfig(**model["encoder"]), TokenizerConfig(**model["tokenizer"])
            data |= dict(patches=e.patches, codes=t.codes, positions=t.positions, selection=t.selection)
            data |= dict(image_size=e.image_size, fingerprint=open_tokenizer(target / "tokenizer")[3])
        meta = {
            "config": config.to_json_best_effort(),
            "data": data,
            "tokenizer": json.dumps(words.payload if words else None),
            "step": 0,
            "seconds": time.perf_counter() - began,
        }
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        checkpoints = Checkpoints(target / name if name else target, in_flight_gib=1 + largest // 2**30)
        checkpoints.save(0, {"params": params}, meta)
        checkpoints.close()
        count = sum(int(np.prod(s)) for s in importer.shapes.values())
        print(f"import: {count / 1e6:.1f} million parameters of {name or kind} in {target / name}", flush=True)


def guess_kind(source: pathlib.Path) -> str:
    """The kind of a source from its layout or its `config.json`.

    Raises:
      ValueError: nothing there tells.
    """
    if (source / "visual_tokenizer").is_dir():
        return "lavit"
    published = _config(source)
    layout, kind = vision.layout_of(published), published.get("model_type")
    if layout:
        return layout
    if kind in llama.KNOWN:
        return "language"
    names = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
    if published.get("_class_name") in names:
        return names[published["_class_name"]]
    known = (*llama.KNOWN, *vision.MODEL_TYPES, *names)
    raise ValueError(
        f"{source / 'config.json'} is of the architecture {kind or published.get('_class_name')!r}, which is not "
        f"known; known are {', '.join(known)}"
    )


def find_text_tokenizer(source: pathlib.Path, kind: str, parts: Parted) -> text.TextTokenizer | None:
    """The text tokenizer beside a language model, if there is one; no text of LaVIT's begins with <s>."""
    folder = source / "language_model" if kind == "lavit" else source
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    importer = parts["language" if kind == "lavit" else ""][0]
    rows = importer.shapes["language/embed_text"][0]
    return text.load(str(folder), rows=rows, **({"begin": False} if kind == "lavit" else {}))


def _config(source: pathlib.Path) -> dict[str, Any]:
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.exists():
        raise BadFile(f"there is no {file}; the architecture is read from it")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise BadFile(f"{file} is not JSON: {error}") from None


def main(_: list[str]) -> None:
    """Runs the command."""
    process.quiet()
    f = flags.FLAGS
    process.run(lambda: import_weights(f.source, f.output, f.kind, f.codes))


if __name__ == "__main__":
    process.prepare_process()
    flags.DEFINE_string("source", None, "Directory or file of the published weights.", required=True)
    flags.DEFINE_string("output", None, "Directory that gets the checkpoint.", required=True)
    flags.DEFINE_string("kind", "", f"One of {', '.join(KINDS)}; told by config.json if empty.")
    flags.DEFINE_integer("codes", 16384, "Visual codes that a language model gets rows for.", lower_bound=1)
    app.run(main)
