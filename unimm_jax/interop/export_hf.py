"""Export as a directory that `transformers` opens.

The language model opens without extra code, the whole model by `MODEL_FILES` and its processor by
`processing_unimm.py`, which are written beside it. U-Nets of latents and their autoencoders are written in the layout
of `diffusers`.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.checkpoint import read_params
from unimm_jax.data.documents import Layout
from unimm_jax.data.tasks import TEMPLATES, TaskSettings
from unimm_jax.errors import CheckpointError, WeightMismatchError
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_model
from unimm_jax.interop import chat_template, llama, unimm
from unimm_jax.interop.exporter import HERE, Source, Writer, verify_in_pytorch, write_card, write_diffusers
from unimm_jax.interop.lavit import PIXEL_FOLDERS
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.sharding import flatten
from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

MODEL_FILES = ("modeling_unimm.py", "image_tokenizer_unimm.py", "denoiser_unimm.py")
LANGUAGE_USAGE = [
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    'language_model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
    'text_tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
    "```",
]
MODEL_USAGE = [
    *LANGUAGE_USAGE[:-1],
    "",
    "from transformers import AutoModel",
    'model = AutoModel.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)',
    'images = model.draw(["two red circles"], guidance=1.5)  # uint8 [1, H, W, 3]',
    'answers = model.describe(images, ["how many circles are there?"])',
    'edited = model.edit(images, [["make the circles blue", "add a star"]])  # one tensor per turn',
    'composed = model.compose([[images[0], "and a red star"]])',
    "```",
    "",
    "Chats with text and images:",
    "",
    "```python",
    "from transformers import AutoProcessor",
    'processor = AutoProcessor.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)',
    'content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "how many circles are there?"}]',
    'chat = [{"role": "user", "content": content}]',
    "inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)",
    'ids = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]',
    "answer = processor.batch_decode(ids, skip_special_tokens=True)[0]",
    "```",
]


def export_hf(source: Source, folder: pathlib.Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    """Writes the export into an empty directory; see `exporter.export`.

    Raises:
      CheckpointError: a checkpoint without a language model, or one whose companions are missing.
      UnsupportedConfigError: no class of transformers can hold the language model.
    """
    if "language" not in source.sections:
        raise CheckpointError(
            f"{source.path} holds no language model; give a language stage or an imported language model"
        )
    if "unified" not in source.sections:
        return _language(source, folder, dtype, verify)
    generator = Generator(load_model(source.path), batch=8)
    language: LanguageConfig = source.sections["language"]
    v, text_tokenizer = generator.vocabulary, generator.text_tokenizer
    used = v.first_position + v.num_position_ids - v.text_rows
    params = dict(flatten(generator.params))
    dtype = dtype or np.dtype(params["language/embed_text"].dtype)
    writer = Writer(folder, dtype)
    mine = {path: x for path, x in params.items() if path.startswith("language/")}
    writer.write("model", llama.language(language, v.text_rows, used), mine)
    rest = {path: x for path, x in params.items() if not path.startswith("language/")}
    rest |= {f"image_tokenizer/{path}": x for path, x in flatten(generator.image_tokenizer.params)}
    decoders, decoder_params = _decoders(generator, folder, dtype)
    rest |= decoder_params
    writer.write("unimm", unimm.table({path: tuple(x.shape) for path, x in rest.items()}), rest)
    settings = _settings(generator, source) | decoders
    settings["model"] |= settings.pop("decoder_model")
    (folder / "unimm.json").write_text(json.dumps(settings, indent=1))
    for file in MODEL_FILES:
        shutil.copy(HERE / file, folder)
    published = llama.published_config(language, v.text_rows + used, text_tokenizer, dtype)
    published["auto_map"] = {"AutoModel": "modeling_unimm.UniMM"}
    (folder / "config.json").write_text(json.dumps(published, indent=1))
    write_text_tokenizer(folder, text_tokenizer, v)
    data = generator.config.data
    reading: dict[str, Any] = dict(fit=generator.fit, max_slices=data.max_slices, slice_grids=data.slice_grids)
    reading |= dict(seq_len=data.seq_len, images_per_row=data.images_per_row)
    sides = data.image_size, generator.header["image_size"]
    write_processor(folder, generator.layout, sides, generator.task_settings, **reading)
    write_card(folder, source, MODEL_USAGE, "transformers")
    return verify_in_pytorch(folder, _expected(generator, v.text_rows + used), dtype) if verify else []


def _settings(generator: Generator, source: Source) -> dict[str, Any]:
    """`unimm.json`, which `modeling_unimm.py` reads, without what belongs to the decoders."""
    v, t, header = generator.vocabulary, generator.text_tokenizer, generator.header
    special = {i for i in (t.pad, t.bos) if i is not None and i != t.eos}
    tokenizer = generator.image_tokenizer.config.model
    sections = {name: source.sections[name] for name in ("encoder", "image_tokenizer", "unified")}
    sections |= {"tokenizer": tokenizer["image_tokenizer"], "tokenizer_encoder": tokenizer["encoder"]}
    return {
        "model": {name: dataclasses.asdict(section) for name, section in sections.items()},
        "text_rows": v.text_rows,
        "start": v.start,
        "end": v.end,
        "first_code": v.first_code,
        "codes": v.codes,
        "first_position": v.first_position,
        "num_position_ids": v.num_position_ids,
        "num_patches": header["num_patches"],
        "selection": header["selection"],
        "max_image_tokens": generator.max_codes,
        "view_features": generator.layout.view_features,
        "eos": t.eos,
        "pad": t.pad,
        "banned": sorted(special | {*range(t.vocab_size, t.num_rows)}),
    }


def _decoders(generator: Generator, folder: pathlib.Path, dtype: np.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The decoders beside a model: (settings, parameters by path). Latent U-Nets are written by `diffusers`' names.

    The image tokenizer of a decoder stage is the model's own, except for LaVIT's, which have a feature decoder each.
    """
    settings: dict[str, Any] = {"decoder_model": {}, "latent": {}}
    params: dict[str, Any] = {}
    for name, (objective, found) in generator.decoders.items():
        mine, model = dict(flatten(found)), objective.config.model
        if name == "pixel_decoder":
            settings["decoder_model"][name] = dataclasses.asdict(model[name])
            params |= {path: x for path, x in mine.items() if path.startswith("pixel_decoder/")}
            continue
        c = objective.config.loss
        sampler = dict(unshuffle=c.unshuffle, prediction=c.prediction, guidance=c.guidance, steps=c.sampling_steps)
        if not objective.latent:
            settings["decoder_model"]["unet"], settings["diffusion"] = dataclasses.asdict(model["unet"]), sampler
            params |= {path: x for path, x in mine.items() if path.startswith("unet/")}
            continue
        settings["latent"][name] = sampler | dict(
            folder=PIXEL_FOLDERS[name],
            pixel_size=objective.config.data.pixel_size or objective.config.data.image_size,
            conditioner=dataclasses.asdict(model["conditioner"]),
        )
        prefix = "image_tokenizer/decoder/"
        for path, x in mine.items():
            if path.startswith("conditioner/"):
                params[f"latent/{name}/{path}"] = x
            elif path.startswith(prefix):
                params[f"latent/{name}/decoder/{path.removeprefix(prefix)}"] = x
        write_diffusers(folder / PIXEL_FOLDERS[name], model["unet"], model["vae"], mine, dtype)
    return settings, params


def _expected(generator: Generator, rows: int) -> dict[str, np.ndarray]:
    """Random inputs, and what JAX computes from them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, rows, (2, 24))
    model = generator.objective.module(generator.params)
    logits = _logits(model.language, ids, rows)
    size = generator.header["image_size"]
    images = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    codes, keep = generator.tokenize(images)
    side = generator.config.data.image_size
    views = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    with jax.default_matmul_precision("highest"):
        features = model.features(model.encoder.normalize(jnp.asarray(views)), jnp.asarray(keep[:2]))
    ids_of_chats = chat_template.expected_ids(keep, generator.layout, generator.task_settings)
    prompts = [*chat_template.IMAGE_PROMPTS, *(dict(edits=edits) for edits in chat_template.EDITS)]
    ids_of_prompts = chat_template.expected_image_prompts(keep, codes, generator.layout, generator.task_settings)
    chats = [json.dumps(chat_template.to_chat(example)) for example in chat_template.EXAMPLES]
    return {
        "ids": ids,
        "logits": logits,
        "views": views,
        "features": np.asarray(features),
        "images": images,
        "keep": keep,
        "codes": codes,
        "chats": np.array(chats),
        "ids_of_chats": np.array([json.dumps(found) for found in ids_of_chats]),
        "image_prompts": np.array([json.dumps(pair) for pair in zip(prompts, ids_of_prompts, strict=True)]),
    }


def _language(source: Source, folder: pathlib.Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    """A language model as it was imported, without the visual rows."""
    language: LanguageConfig = source.sections["language"]
    params = read_params(source.step)
    flat = dict(flatten(params))
    rows = flat["language/embed_text"].shape[0]
    dtype = dtype or np.dtype(flat["language/embed_text"].dtype)
    Writer(folder, dtype).write("model", llama.language(language, rows, 0), flat)
    payload = json.loads(source.meta["text_tokenizer"])
    text_tokenizer = TextTokenizer(payload) if payload else None
    config = llama.published_config(language, rows, text_tokenizer, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if text_tokenizer is not None:
        write_text_tokenizer(folder, text_tokenizer, None)
    write_card(folder, source, LANGUAGE_USAGE, "transformers")
    if not verify:
        return []
    visual = flat["language/embed_visual"].shape[0]
    abstract = nnx.eval_shape(lambda: LanguageModel(language, rows, visual, rngs=Keys(params=0)))
    ids = np.random.default_rng(0).integers(0, rows, (2, 24))
    model = nnx.merge(nnx.graphdef(abstract), params["language"])
    return verify_in_pytorch(folder, {"ids": ids, "logits": _logits(model, ids, rows)}, dtype)


def _logits(model: Any, ids: np.ndarray, rows: int) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    with jax.default_matmul_precision("highest"):
        hidden = model(model.embed(jnp.asarray(ids)), positions, jnp.ones_like(positions))
        return np.asarray(hidden @ model.head().T)[..., :rows]


def write_text_tokenizer(folder: pathlib.Path, text_tokenizer: TextTokenizer, v: Vocabulary | None) -> None:
    """Writes the text tokenizer, with [IMG], [/IMG], codes and positions as added tokens at the model's ids.

    Raises:
      WeightMismatchError: the tokenizer has more ids than the model has text rows.
    """
    import tokenizers

    fast = text_tokenizer.as_tokenizers()
    size, rows = fast.get_vocab_size(), text_tokenizer.num_rows
    if size > rows:
        raise WeightMismatchError(f"the text tokenizer has {size} ids, the model {rows} text rows")
    if v is not None:
        added = [f"<unused_{i}>" for i in range(size, rows)] + ["[IMG]", "[/IMG]"]
        added += [f"<code_{i}>" for i in range(v.codes)] + [f"<place_{i}>" for i in range(v.num_position_ids)]
        fast.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in added])
    fast.save(str(folder / "tokenizer.json"))

    def token(index: int | None) -> str | None:
        return None if index is None else fast.id_to_token(index)

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token(text_tokenizer.bos),
        "eos_token": token(text_tokenizer.eos),
        "pad_token": token(text_tokenizer.pad),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_processor(
    folder: pathlib.Path, layout: Layout, sides: tuple[int, int], tasks: TaskSettings, **reading: Any
) -> None:
    """Writes the processor and its chat template; the text tokenizer is written already.

    Args:
      sides: of the images that the model and its image tokenizer read, in pixels.
      tasks: how conversations and prompts are laid out.
      reading: `fit`, `max_slices`, `slice_grids`, `seq_len` and `images_per_row` of the processor, if other than its
        defaults.
    """
    v, text_tokenizer = layout.vocabulary, layout.text_tokenizer
    settings = {
        "processor_class": "UniMMProcessor",
        "auto_map": {"AutoProcessor": "processing_unimm.UniMMProcessor"},
        "image_size": sides[0],
        "code_size": sides[1],
        "max_image_tokens": layout.max_codes,
        "view_features": layout.view_features,
        "start": v.start,
        "end": v.end,
        "first_code": v.first_code,
        "first_position": v.first_position,
        "num_position_ids": v.num_position_ids,
        "bos": text_tokenizer.bos,
        "eos": text_tokenizer.eos,
        "text_vocabulary": text_tokenizer.vocab_size,
        "is_literal": text_tokenizer.payload["kind"] == "sentencepiece",
        "image_prompts": tasks.image_prompts,
        **reading,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(chat_template.to_jinja(TEMPLATES[tasks.template]))
    shutil.copy(HERE / "processing_unimm.py", folder)
