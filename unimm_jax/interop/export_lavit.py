"""Export as the published LaVIT: its files, names and dtypes. Needs PyTorch."""

import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from unimm_jax import resolve, storage
from unimm_jax.checkpoint import read_meta, read_params
from unimm_jax.errors import CheckpointError, UnsupportedConfigError, WeightMismatchError
from unimm_jax.inference.loading import stage_config, workdir_of
from unimm_jax.interop import import_lavit, lavit, llama
from unimm_jax.interop.encoders import eva
from unimm_jax.interop.exporter import DTYPES, Source, run_module, write_card, write_diffusers
from unimm_jax.interop.table import Entry, foreign_shapes, to_theirs
from unimm_jax.sharding import flatten
from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

USAGE = [
    "The layout of the published LaVIT. Its code opens this directory as the model path; this command imports it:",
    "",
    "```bash",
    "python -m unimm_jax.import_weights --source=THIS_DIRECTORY --output=CHECKPOINT_DIR",
    "```",
]
HEAD_ROWS = 1024  # of EVA-CLIP's head


class TorchWriter:
    """Writes tables of parameters to PyTorch files.

    Args (constructor):
      folder: directory of the export. dtype: of all tensors.

    Raises (constructor):
      UnsupportedConfigError: torch is not installed.
    """

    def __init__(self, folder: pathlib.Path, dtype: np.dtype):
        try:
            import torch
        except ImportError:
            raise UnsupportedConfigError(
                "the format lavit consists of PyTorch files; install torch (pip install torch)"
            ) from None
        self.torch, self.folder, self.dtype = torch, folder, dtype

    def tensor(self, array: Any) -> Any:
        """A torch tensor of an array, a copy."""
        array = np.array(array, self.dtype)
        if self.dtype == ml_dtypes.bfloat16:
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def write(
        self,
        name: str,
        table: list[Entry],
        params: Mapping[str, Any],
        more: Iterable[tuple[str, np.ndarray]] = (),
    ) -> None:
        """Writes one file.

        Args:
          more: tensors that no parameter holds.
        """
        shapes = foreign_shapes(table, {path: tuple(x.shape) for path, x in params.items()})
        tensors = {key: self.tensor(array) for key, array in to_theirs(table, params.__getitem__, shapes)}
        tensors |= {key: self.tensor(array) for key, array in more}
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        self.torch.save(tensors, file)
        print(f"export  {name}: {len(tensors)} tensors", flush=True)


def export_lavit(source: Source, folder: pathlib.Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    """Writes the export into an empty directory; see `exporter.export`.

    Raises:
      CheckpointError: not a unified model, or its image tokenizer is missing.
      UnsupportedConfigError: lists what the layout cannot represent.
      WeightMismatchError: the export, imported again, differs.
    """
    config = stage_config(source.meta, source.path)
    if config.objective != "language_modeling" or not config.data.images_per_row:
        raise CheckpointError(f"{source.path} is not a language stage that reads images, which this format needs")
    workdir = workdir_of(source.step)
    params = dict(flatten(read_params(source.step)))
    paths = {name: storage.at(workdir, path) for name, path in config.companions.items()}
    if "image_tokenizer" not in paths:
        raise CheckpointError(f"the config of {source.path} names no companion image_tokenizer")
    tokenizer = dict(flatten(read_params(paths["image_tokenizer"])))
    m = config.model
    wrong = _not_lavit(m, params, tokenizer)
    if source.meta["data"].get("fit", "stretch") != "stretch":
        wrong.append("LaVIT's code resizes images without keeping their aspect ratio; this model crops them")
    if wrong:
        raise UnsupportedConfigError(f"{source.path} cannot be written in LaVIT's layout: " + "; ".join(wrong))
    encoder, t, language = m["encoder"], m["image_tokenizer"], m["language"]
    writer = TorchWriter(folder, dtype or DTYPES["bfloat16"])
    # the reference loads the encoder strictly; its last norm and head are in the file but unused
    unused = [
        ("norm.weight", np.ones(encoder.width)), ("norm.bias", np.zeros(encoder.width)),
        ("head.weight", np.zeros((HEAD_ROWS, encoder.width))), ("head.bias", np.zeros(HEAD_ROWS)),
    ]  # fmt: skip
    writer.write("visual_tokenizer/eva_vitg_psz14.bin", eva.table(encoder.depth), tokenizer, unused)
    writer.write("visual_tokenizer/tokenizer_encoder.bin", lavit.tokenizer_encoder(t.merger_depth), tokenizer)
    for name in import_lavit.UNET_DECODERS:
        _write_unet_decoder(writer, name, paths.get(name), t.decoder_depth)
    v = Vocabulary(params["language/embed_text"].shape[0], t.codes)
    writer.write("language_model/visual_weight.bin", lavit.visual_weight(t.merger_depth), params)
    writer.write("language_model/pytorch_model.bin", llama.language(language, v.text_rows, 2 + t.codes), params)
    payload = json.loads(source.meta["text_tokenizer"])
    text_tokenizer = TextTokenizer(payload) if payload else None
    published = llama.published_config(language, v.first_position, text_tokenizer, writer.dtype)
    (folder / "language_model" / "config.json").write_text(json.dumps(published, indent=1))
    write_card(folder, source, USAGE)
    return _verify(folder, source.step) if verify else []


def _not_lavit(m: dict[str, Any], params: dict[str, Any], tokenizer: dict[str, Any]) -> list[str]:
    """What a model has that LaVIT's layout has no place for."""
    encoder, t, language, wrong = m["encoder"], m["image_tokenizer"], m["language"], []
    if (encoder.biases, encoder.output_norm, encoder.activation) != ("qv", "none", "gelu"):
        wrong.append("its encoder is not EVA-CLIP's (biases, norm or activation)")
    if t.architecture != "dynamic" or t.quantizer != "ema":
        wrong.append("its image tokenizer is not LaVIT's (architecture or quantizer)")
    # the reference code samples its masks; "argmax" is our default for its weights
    dynamic = t.selection in ("argmax", "sample")
    if not dynamic or (t.positions, t.eps, t.sink, t.decoder_sink) != ("order", 1e-6, 0.0, 0.0):
        wrong.append("its image tokenizer has settings that LaVIT lacks (selection, positions, eps or sink)")
    if m["unified"].connector != "merger":
        wrong.append("its connector is not the merger")
    if language.biases or language.qk_norm or language.tied:
        wrong.append("its language model is not LLaMA's")
    mine = [path for path in params if path.startswith("encoder/")]
    if any(path not in tokenizer or not np.array_equal(params[path], tokenizer[path]) for path in mine):
        wrong.append("its language model trained its own copy of the encoder, and the layout has one encoder")
    return wrong


def _write_unet_decoder(writer: TorchWriter, name: str, workdir: pathlib.Path | None, depth: int) -> None:
    """Writes a U-Net decoder of latents, if there is one."""
    folder, file, kind = import_lavit.UNET_DECODERS[name]
    present = workdir is not None and (workdir / "checkpoints").exists()
    sections = resolve.sections_from_json(read_meta(workdir)["config"]) if workdir is not None and present else {}
    if workdir is None or not {"vae", "conditioner"} <= set(sections):
        print(f"export: there is no {name} of latents beside the model; {file} and {folder} are left out", flush=True)
        return
    found = dict(flatten(read_params(workdir)))
    params = {path.removeprefix("image_tokenizer/"): x for path, x in found.items()}
    writer.write(f"visual_tokenizer/{file}", lavit.feature_decoder(depth, kind), params)
    write_diffusers(writer.folder / folder, sections["unet"], sections["vae"], found, writer.dtype)
    if "conditioner/empty" in params:
        negative = writer.tensor(np.asarray(params["conditioner/empty"])[None])
        writer.torch.save(negative, writer.folder / folder / "uncond_embeddings.bin")


def _verify(folder: pathlib.Path, step: pathlib.Path) -> list[str]:
    """Imports the export again, in a new process, and compares the weights of the language stage.

    Raises:
      WeightMismatchError: the export cannot be read.
    """
    if not (folder / "visual_tokenizer" / "tokenizer_decoder.bin").exists():
        return ["not read again: the model has no U-Net decoder, without which LaVIT's layout is not complete"]
    done = run_module("unimm_jax.interop.export_lavit", str(folder), str(step))
    if done.returncode:
        raise WeightMismatchError(f"the export cannot be read again:\n{done.stderr[-2000:]}")
    return [f"read again: largest difference of a weight {float(done.stdout.split()[-1]):.1e}"]


def largest_difference(folder: str, checkpoint: str) -> float:
    """Largest difference of a weight between a LaVIT directory and a language stage, without padding rows."""
    importer, _ = import_lavit.plan(pathlib.Path(folder))["language"]
    params, worst = dict(flatten(read_params(checkpoint))), 0.0
    for path, value in importer.read(importer.shardings):
        theirs, mine = np.asarray(value, np.float32), np.asarray(params[path], np.float32)
        used = slice(None)
        if path.endswith("_visual"):
            used = slice(0, int(np.flatnonzero(np.abs(mine).max(1) > 0)[-1]) + 1)
        worst = max(worst, float(np.abs(theirs[used] - mine[used]).max()))
    return worst


if __name__ == "__main__":
    print(largest_difference(*sys.argv[1:3]))
