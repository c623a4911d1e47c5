"""Loads trained models from checkpoints: language stages with their companions, image tokenizers, decoders."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from unimm_jax import legacy, objectives, resolve, sharding, storage
from unimm_jax.checkpoint import find, read_meta, read_params
from unimm_jax.config import DECODERS, Config
from unimm_jax.data import pipeline, transforms
from unimm_jax.errors import CheckpointError, ConfigError
from unimm_jax.models.keys import Keys
from unimm_jax.models.tokenizer import ImageTokenizer
from unimm_jax.text_tokenizer import TextTokenizer


@dataclasses.dataclass
class Model:
    """A language stage's model with what belongs to it.

    Attributes:
      config: of the stage. objective: its objective. params: nested dict on `mesh`.
      header: header of the records that it was trained on. text_tokenizer: of the stage.
      workdir: paths of the config's companions are relative to it. step: of the checkpoint.
    """

    config: Config
    objective: Any
    params: Any
    mesh: jax.sharding.Mesh
    header: dict[str, Any]
    text_tokenizer: TextTokenizer
    workdir: pathlib.Path
    step: int = 0


@dataclasses.dataclass
class LoadedTokenizer:
    """An image tokenizer: `config` of its stage, `graph` and `params` of its module, `fingerprint` of its weights and
    preprocessing."""

    config: Config
    graph: Any
    params: Any
    fingerprint: str

    def module(self, params: Any) -> ImageTokenizer:
        """The tokenizer with the given parameters."""
        return nnx.merge(self.graph, params)

    def noise(self, images: np.ndarray) -> np.ndarray | None:
        """The noise that `ImageTokenizer.encode` needs beside images uint8 [N, S, S, 3]: float32 [N, P] or None."""
        m = self.config.model
        return m["image_tokenizer"].noise(images, m["encoder"].num_patches)


def workdir_of(step: pathlib.Path) -> pathlib.Path:
    """The workdir that a step directory belongs to."""
    return step.parent.parent if step.parent.name == "checkpoints" else step.parent


def load_model(checkpoint: str | pathlib.Path, tensor: int = 1) -> Model:
    """Loads a language stage that reads images.

    Args:
      checkpoint: workdir or step directory.
      tensor: local devices over which the language model is split.

    Raises:
      CheckpointError: no such checkpoint, or one of another kind of stage. ConfigError: fewer devices than `tensor`.
    """
    step = find(storage.path(checkpoint))
    meta = read_meta(step)
    config = stage_config(meta, checkpoint)
    if config.objective != "language_modeling" or not config.data.images_per_row:
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of {config.name}, whose language model reads no images; give one of stage "
            "1, 2 or 3"
        )
    if tensor > jax.local_device_count():
        raise ConfigError(f"the model cannot be split over {tensor} devices, here are {jax.local_device_count()}")
    text_tokenizer, header = text_tokenizer_of(meta, checkpoint), legacy.header(meta["data"])
    vocabulary = pipeline.vocabulary_of(header, text_tokenizer)
    data = pipeline.Input(None, text_tokenizer, vocabulary, None, header)
    objective = objectives.get(config.objective)(config, data)
    mesh = sharding.make_mesh((1, 1, tensor), jax.local_devices()[:tensor])
    shardings = sharding.param_shardings(objective.abstract, mesh)
    params = read_params(step, dict(sharding.flatten(shardings)))
    return Model(config, objective, params, mesh, header, text_tokenizer, workdir_of(step), int(meta.get("step", 0)))


def stage_config(meta: dict[str, Any], where: str | pathlib.Path) -> Config:
    """The config of a stage's checkpoint.

    Raises:
      CheckpointError: imported weights, which have no stage, or a config that this version cannot read.
    """
    if json.loads(meta["config"]).get("objective") is None:
        raise CheckpointError(f"{where} holds imported weights, not a trained stage; give the workdir of a stage")
    try:
        return resolve.from_json(meta["config"])
    except ConfigError as error:
        raise CheckpointError(f"the config of {where} cannot be read: {error}") from None


def text_tokenizer_of(meta: dict[str, Any], where: str | pathlib.Path) -> TextTokenizer:
    """The text tokenizer of a checkpoint.

    Raises:
      CheckpointError: it has none.
    """
    payload = json.loads(meta["text_tokenizer"])
    if payload is None:
        raise CheckpointError(
            f"{where} has no text tokenizer; give a tokenizer.json, a sentencepiece .model file or another checkpoint"
        )
    return TextTokenizer(payload)


def load_image_tokenizer(workdir: str | pathlib.Path) -> LoadedTokenizer:
    """Loads the image tokenizer of a tokenizer stage.

    Raises:
      CheckpointError: no such checkpoint, or one of another kind of stage.
    """
    step = find(storage.path(workdir))
    config = stage_config(read_meta(step), workdir)
    if config.objective != "tokenization" or config.loss.phase != "codes":
        raise CheckpointError(f"{workdir} is a checkpoint of {config.name}; give the workdir of the stage tokenizer")
    m = config.model
    model = nnx.eval_shape(lambda: ImageTokenizer(m["encoder"], m["image_tokenizer"], rngs=Keys(params=0)))
    params = read_params(step)
    digest = hashlib.sha256(transforms.PREPROCESSING[config.data.fit].encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return LoadedTokenizer(config, nnx.graphdef(model), params, digest.hexdigest()[:16])


def load_companions(model: Model) -> tuple[LoadedTokenizer, dict[str, tuple[Any, Any]]]:
    """The image tokenizer and the decoders of a model: (tokenizer, decoder name → (objective, params)).

    Raises:
      CheckpointError: the tokenizer is missing, or not the one that the model was trained with.
    """
    paths = {name: storage.at(model.workdir, path) for name, path in model.config.companions.items()}
    if "image_tokenizer" not in paths:
        raise CheckpointError(f"the config of {model.config.name} names no companion image_tokenizer")
    tokenizer = load_image_tokenizer(paths["image_tokenizer"])
    if tokenizer.fingerprint != model.header["fingerprint"]:
        raise CheckpointError(
            f"the image tokenizer in {paths['image_tokenizer']} is not the one that {model.workdir} was trained with "
            f"(fingerprints {tokenizer.fingerprint} and {model.header['fingerprint']})"
        )
    decoders = {}
    for name in DECODERS:
        if name in paths and (paths[name] / "checkpoints").exists():
            config = stage_config(read_meta(paths[name]), paths[name])
            objective = objectives.get(config.objective)
            decoders[name] = objective(config, objective.abstract_input(config)), read_params(paths[name])
    return tokenizer, decoders
