"""Writes a checkpoint for PyTorch users.

python -m unimm_jax.export --checkpoint=runs/stage3 --format=hf --output=DIR [--dtype=bfloat16]

`hf`: a directory that plain `transformers` opens; the language model without code of ours, the whole model by the
`modeling_unimm.py` that is written beside it. `lavit`: the files, names and dtypes of the published LaVIT. The
directory appears under its name only when it is complete; at the end it is opened in a fresh process and compared.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from unimm_jax import main as process
from unimm_jax.checkpoint import find, read_meta, read_params
from unimm_jax.generate import Generator
from unimm_jax.interop import diffusion, lavit, llama, unimm
from unimm_jax.interop.files import write_safetensors
from unimm_jax.interop.table import Entry, foreign_shapes, to_theirs
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.tokenizer import TokenizerConfig
from unimm_jax.models.vit import ViTConfig
from unimm_jax.objectives.base import models
from unimm_jax.sharding import flatten
from unimm_jax.text import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

FORMATS = ("hf", "lavit")
PIXEL_FOLDERS = {"unet": "pixel_decoding", "unet_high": "highres_pixel_decoding"}  # LaVIT's names
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
HERE = pathlib.Path(__file__).parent


class Writer:
    """Writes tables of parameters to safetensors, with progress."""

    def __init__(self, folder: pathlib.Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.began = self.told = time.perf_counter()

    def write(self, stem: str, table: list[Entry], params: Mapping[str, Any]) -> None:
        """One file, or several with an index; one tensor in memory at a time."""
        shapes = foreign_shapes(table, {path: tuple(leaf.shape) for path, leaf in params.items()})
        tensors = to_theirs(table, params.__getitem__, shapes)
        for count, _ in enumerate(write_safetensors(self.folder, stem, shapes, self.dtype, tensors), 1):
            if time.perf_counter() - self.told > 5:
                self.told = time.perf_counter()
                left = (len(shapes) - count) / count * (self.told - self.began)
                print(f"export  {stem}: {count} of {len(shapes)} tensors  ETA {left:.0f} s", flush=True)


def export(checkpoint: str, output: str, form: str = "hf", dtype: str = "", verify: bool = True) -> list[str]:
    """Exports; returns the lines that the verification printed.

    Raises:
      ValueError: unknown format or dtype, an output that exists, a model that the format cannot hold, or an export that
        does not compute what the checkpoint computes.
    """
    if form not in FORMATS:
        raise ValueError(f"--format={form} is not known; formats are {', '.join(FORMATS)}")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype} is not known; dtypes are {', '.join(DTYPES)}")
    target = pathlib.Path(output).absolute()
    if target.exists():
        raise ValueError(f"{output} exists; give another --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.partial.", dir=target.parent))
    try:
        lines = (_hf if form == "hf" else _lavit)(checkpoint, partial, DTYPES[dtype] if dtype else None, verify)
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for line in lines:
        print(f"verified: {line}", flush=True)
    print(f"export: {target}", flush=True)
    return lines


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def published_config(c: LanguageConfig, words: int, text: TextTokenizer | None, dtype: np.dtype) -> dict[str, Any]:
    """The `config.json` of a decoder: LLaMA's, Qwen2's or Qwen3's class, whichever has these parts.

    Raises:
      ValueError: no published class has this combination of parts.
    """
    if c.qk_norm and c.biases in ("", "qkvo") and not c.mlp_bias:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif c.biases == "qkv" and not c.qk_norm and not c.mlp_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif c.biases in ("", "qkvo") and not c.qk_norm:
        kind, name = "llama", "LlamaForCausalLM"
    else:
        raise ValueError(f"no class of transformers has biases on {c.biases!r} with qk_norm {c.qk_norm}")
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        rope |= dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
        rope["original_max_position_embeddings"] = int(original)
    config = dict(
        model_type=kind,
        architectures=[name],
        vocab_size=words,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        rms_norm_eps=c.eps,
        hidden_act="silu",
        max_position_embeddings=2048,
        tie_word_embeddings=c.tied,
        rope_parameters=rope,
        rope_theta=c.rope_theta,
        dtype=dtype.name,
        bos_token_id=text.bos if text else None,
        eos_token_id=text.eos if text else None,
        pad_token_id=text.pad if text else None,
    )
    if kind != "qwen2":
        config["attention_bias"] = c.biases == "qkvo"
    if kind == "llama":
        config["mlp_bias"] = c.mlp_bias
    return config


def write_tokenizer(folder: pathlib.Path, text: TextTokenizer, v: Vocabulary | None) -> None:
    """The text tokenizer, with [IMG], [/IMG], codes and places as added tokens at the model's ids."""
    added = []
    if v is not None:
        added = [
            "[IMG]",
            "[/IMG]",
            *(f"<code_{i}>" for i in range(v.codes)),
            *(f"<place_{i}>" for i in range(v.patches)),
        ]
    fast = text.as_tokenizers()
    if fast.get_vocab_size() > text.size:
        raise ValueError(f"the text tokenizer has {fast.get_vocab_size()} ids, the model {text.size} text rows")
    if added:
        added = [*(f"<unused_{i}>" for i in range(fast.get_vocab_size(), text.size)), *added]
        import tokenizers

        fast.add_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in added])
    fast.save(str(folder / "tokenizer.json"))
    token = lambda i: None if i is None else fast.id_to_token(i)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token(text.bos),
        "eos_token": token(text.eos),
        "pad_token": token(text.pad),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _hf(checkpoint: str, folder: pathlib.Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    meta = read_meta(find(checkpoint))
    config = ConfigDict(json.loads(meta["config"]))
    if "language" not in config.model:
        raise ValueError(f"{checkpoint} holds no language model; give a language stage or an imported language model")
    if "unified" not in config.model:
        return _hf_language(checkpoint, meta, config, folder, dtype, verify)
    generator = Generator(checkpoint, batch=8)
    m, v, text = models(config), generator.vocabulary, generator.text
    language: LanguageConfig = m["language"]
    used = v.first_position + v.patches - v.text
    params = dict(flatten(generator.params))
    chosen = dtype or np.dtype(params["language/embed_text"].dtype)
    out = Writer(folder, chosen)
    mine = {p: x for p, x in params.items() if p.startswith("language/")}
    out.write("model", llama.language(language, v.text, used), mine)
    rest = {p: x for p, x in params.items() if not p.startswith("language/")}
    rest |= {f"tokenizer/{p}": x for p, x in flatten(generator.tokenizer_params)}
    settings: dict[str, Any] = {
        "model": {k: dataclasses.asdict(m[k]) for k in ("encoder", "tokenizer", "unified")},
        "text": v.text,
        "start": v.start,
        "end": v.end,
        "first_code": v.first_code,
        "codes": v.codes,
        "first_position": v.first_position,
        "patches": v.patches,
        "all_patches": generator.header["patches"],
        "selection": generator.header["selection"],
        "budget": min(generator.header["patches"], generator.budget),
        "bos": text.bos,
        "eos": text.eos,
        "banned": sorted(
            {i for i in (text.pad, text.bos) if i is not None and i != text.eos} | {*range(text.words, text.size)}
        ),
    }
    settings["latent"] = {}
    for name, (objective, found) in generator.decoders.items():
        mine, kinds = dict(flatten(found)), models(objective.config)
        if name == "detokenizer":
            settings["model"]["pixel_decoder"] = dataclasses.asdict(kinds["pixel_decoder"])
            rest |= {p: x for p, x in mine.items() if p.startswith("direct/")}
            continue
        c = objective.config.loss
        sampler = dict(unshuffle=c.unshuffle, prediction=c.prediction, guidance=c.guidance, steps=c.sampling_steps)
        if not objective.latent:
            settings["model"]["unet"], settings["diffusion"] = dataclasses.asdict(kinds["unet"]), sampler
            rest |= {p: x for p, x in mine.items() if p.startswith("unet/")}
            continue
        place = PIXEL_FOLDERS[name]
        settings["latent"][name] = sampler | dict(
            folder=place,
            pixel_size=objective.config.data.pixel_size,
            conditioner=dataclasses.asdict(kinds["conditioner"]),
        )
        rest |= {f"latent/{name}/{p}": x for p, x in mine.items() if p.startswith("conditioner/")}
        tail = "tokenizer/decoder/"
        rest |= {f"latent/{name}/decoder/{p.removeprefix(tail)}": x for p, x in mine.items() if p.startswith(tail)}
        write_diffusers(folder / place, kinds, mine, chosen)
    out.write("unimm", unimm.table({p: tuple(x.shape) for p, x in rest.items()}), rest)
    (folder / "unimm.json").write_text(json.dumps(settings, indent=1))
    shutil.copy(HERE / "interop" / "modeling_unimm.py", folder / "modeling_unimm.py")
    published = published_config(language, v.text + used, text, chosen)
    published["auto_map"] = {"AutoModel": "modeling_unimm.UniMM"}
    (folder / "config.json").write_text(json.dumps(published, indent=1))
    write_tokenizer(folder, text, v)
    write_card(folder, checkpoint, meta, config)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, v.text + used, (2, 24))
    hidden = generator.objective.module(generator.params).language
    logits = _logits(hidden, ids, v.text + used)
    size = config.data.image_size
    images = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    codes, keep = generator.tokenize(images)
    exact = {"ids": ids, "logits": logits, "images": images, "keep": keep, "codes": codes[keep]}
    return _verify(folder, exact, chosen) if verify else []


def write_diffusers(folder: pathlib.Path, kinds: dict[str, Any], params: dict[str, Any], dtype: np.dtype) -> None:
    """`unet/`, `vae/` and `scheduler/` as `diffusers` opens them.

    Args:
      kinds: dataclasses of the model sections. params: of the detokenizer stage, by path.
    """
    unet, vae = dataclasses.asdict(kinds["unet"]), dataclasses.asdict(kinds["vae"])
    configs = {
        "unet/config.json": diffusion.published_unet(unet),
        "vae/config.json": diffusion.published_vae(vae),
        "scheduler/scheduler_config.json": diffusion.SCHEDULER,
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(config, indent=1))
    shapes = {p: tuple(x.shape) for p, x in params.items()}
    for part, linear in (("unet", diffusion.linear_projection(unet)), ("vae", True)):
        table = diffusion.table(shapes, f"{part}/", linear)
        Writer(folder / part, dtype).write("diffusion_pytorch_model", table, params)


def _hf_language(
    checkpoint: str,
    meta: dict[str, Any],
    config: ConfigDict,
    folder: pathlib.Path,
    dtype: np.dtype | None,
    verify: bool,
) -> list[str]:
    """A language model as it was imported, without the visual rows."""
    from flax import nnx

    from unimm_jax.models.language import LanguageModel

    language: LanguageConfig = models(config)["language"]
    params = read_params(find(checkpoint))
    flat = dict(flatten(params))
    words = flat["language/embed_text"].shape[0]
    chosen = dtype or np.dtype(flat["language/embed_text"].dtype)
    Writer(folder, chosen).write("model", llama.language(language, words, 0), flat)
    payload = json.loads(meta["tokenizer"])
    text = TextTokenizer(payload) if payload else None
    (folder / "config.json").write_text(json.dumps(published_config(language, words, text, chosen), indent=1))
    if text is not None:
        write_tokenizer(folder, text, None)
    write_card(folder, checkpoint, meta, config)
    if not verify:
        return []
    rows = flat["language/embed_visual"].shape[0]
    abstract = nnx.eval_shape(lambda: LanguageModel(language, words, rows, rngs=nnx.Rngs(params=0)))
    ids = np.random.default_rng(0).integers(0, words, (2, 24))
    model = nnx.merge(nnx.graphdef(abstract), params["language"])
    return _verify(folder, {"ids": ids, "logits": _logits(model, ids, words)}, chosen)


def _logits(model: Any, ids: np.ndarray, words: int) -> np.ndarray:
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    with jax.default_matmul_precision("highest"):
        hidden = model(model.embed(jnp.asarray(ids)), places, jnp.ones_like(places))
        return np.asarray(hidden @ model.head().T)[..., :words]


def _verify(folder: pathlib.Path, expected: dict[str, np.ndarray], dtype: np.dtype) -> list[str]:
    """Compares in a fresh process; a sentence instead where torch or transformers are not installed.

    Raises:
      ValueError: float32 weights and another result.
    """
    missing = [n for n in ("torch", "transformers", "safetensors") if importlib.util.find_spec(n) is None]
    if missing:
        return [f"not verified: {', '.join(missing)} is not installed"]
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "expected.npz"
        np.savez(file, **expected)  # type: ignore[arg-type]
        command = [sys.executable, "-P", str(HERE / "interop" / "check_export.py"), str(folder), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if done.returncode:
        raise ValueError(f"the export does not open in PyTorch:\n{done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines()
    if dtype == np.float32:
        gap = float(lines[0].rsplit(" ", 1)[1])
        if gap > 1e-4 or any("DIFFER" in line for line in lines):
            raise ValueError("the export computes something else than the checkpoint: " + "; ".join(lines))
    return lines


def write_card(folder: pathlib.Path, checkpoint: str, meta: dict[str, Any], config: ConfigDict) -> None:
    """`README.md`: what this is, what it was trained on, how to load it."""
    data = json.dumps(meta["data"], indent=1, sort_keys=True)
    whole, lavit_layout = (folder / "modeling_unimm.py").exists(), (folder / "visual_tokenizer").exists()
    lines = ["---"] + ([] if lavit_layout else ["library_name: transformers"]) + ["---", f"# {config.name}", ""]
    lines += [f"Exported from a checkpoint of unimm_jax ({pathlib.Path(checkpoint).name}, step {meta['step']}).", ""]
    if lavit_layout:
        lines += [
            "The layout of the published LaVIT: give this directory to its code as the model path, or come back with",
            "",
            "```bash",
            "python -m unimm_jax.import_weights --source=THIS_DIRECTORY --output=CHECKPOINT_DIR",
        ]
    else:
        lines += [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'language = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
            'words = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
        ]
    if whole:
        lines += [
            "",
            "from transformers import AutoModel",
            'model = AutoModel.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)',
            'pictures = model.draw(["two red circles"], guidance=1.5)  # uint8 [1, H, W, 3]',
            'answers = model.describe(pictures, ["how many circles are there?"])',
        ]
    lines += ["```", "", "## Data", "", "```json", data, "```", "", "## Config", "", "```json"]
    lines += [json.dumps(json.loads(meta["config"]), indent=1), "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


# ---- LaVIT -----------------------------------------------------------------------------------------------------------


def _lavit(checkpoint: str, folder: pathlib.Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    """The published layout: tokenizer files, `visual_weight.bin` and the language model's shard; needs torch."""
    try:
        import torch
    except ImportError:
        raise ValueError("the lavit format is PyTorch files; install torch (pip install torch)") from None
    home = find(checkpoint)
    meta = read_meta(home)
    config = ConfigDict(json.loads(meta["config"]))
    m = models(config)
    missing = [n for n in ("encoder", "tokenizer", "language", "unified") if n not in m]
    if missing or ("data" in config and not config.data.get("row_pictures", 1)):
        missing = missing or ["encoder with its language model"]  # a text stage
        raise ValueError(f"{checkpoint} has no {', '.join(missing)}; the lavit format holds a whole unified model")
    e: ViTConfig = m["encoder"]
    t: TokenizerConfig = m["tokenizer"]
    params = dict(flatten(read_params(home)))
    place = home.parent.parent if home.parent.name == "checkpoints" else home.parent
    companion = config.companions.tokenizer if "companions" in config else "../tokenizer"
    tokenizer = dict(flatten(read_params(place / companion)))
    wrong = []
    if e.biases != "qv" or e.output_norm != "none" or e.activation != "gelu":
        wrong.append("its encoder is not EVA-CLIP's (biases, norm or activation)")
    if (t.selection, t.positions, t.eps, t.sink, t.decoder_sink) != ("argmax", "order", 1e-6, 0.0, 0.0):
        wrong.append("its tokenizer has settings that LaVIT lacks (selection, positions, eps or sink)")
    if m["unified"].way_in != "merger":
        wrong.append("its language model reads all features (ILLUME), not the merger's")
    if m["language"].biases or m["language"].qk_norm or m["language"].tied:
        wrong.append("its language model is not LLaMA's")
    own = [p for p in params if p.startswith("encoder/") and not np.array_equal(params[p], tokenizer[p])]
    if own:
        wrong.append("its language model trained an encoder copy of its own, and the layout has room for one encoder")
    if wrong:
        raise ValueError(f"{checkpoint} cannot be written in LaVIT's layout: " + "; ".join(wrong))
    chosen = dtype or np.dtype(ml_dtypes.bfloat16)
    v = Vocabulary(params["language/embed_text"].shape[0], t.codes)

    def save(name: str, table: list[Entry], values: Mapping[str, Any], more: Iterable[tuple[str, np.ndarray]] = ()):
        shapes = foreign_shapes(table, {p: tuple(x.shape) for p, x in values.items()})
        tensors = {n: _torch(torch, a, chosen) for n, a in to_theirs(table, values.__getitem__, shapes)}
        tensors |= {n: _torch(torch, a, chosen) for n, a in more}
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
        print(f"export  {name}: {len(tensors)} tensors", flush=True)

    # The reference loads the encoder strictly; its last norm and head are in the file and used by nobody.
    unused = [
        ("norm.weight", np.ones(e.width)), ("norm.bias", np.zeros(e.width)),
        ("head.weight", np.zeros((1024, e.width))), ("head.bias", np.zeros(1024)),
    ]  # fmt: skip
    save("visual_tokenizer/eva_vitg_psz14.bin", lavit.encoder("encoder/", "", e.depth), tokenizer, unused)
    save("visual_tokenizer/tokenizer_encoder.bin", lavit.tokenizer_encoder(t.merger_depth), tokenizer)
    companions = config.get("companions", {})
    for name, file, kind in (
        ("unet", "tokenizer_decoder.bin", "low"),
        ("unet_high", "highres_tokenizer_decoder.bin", "high"),
    ):
        beside = place / companions[name] if name in companions else None
        sections = models(ConfigDict(json.loads(read_meta(beside)["config"]))) if beside and beside.exists() else {}
        if beside is None or not {"vae", "conditioner"} <= set(sections):
            print(
                f"export: no U-Net of latents beside the model, {file} and {PIXEL_FOLDERS[name]} are left out",
                flush=True,
            )
            continue
        found = dict(flatten(read_params(beside)))
        values = {p.removeprefix("tokenizer/"): x for p, x in found.items()}
        save(f"visual_tokenizer/{file}", lavit.feature_decoder(t.decoder_depth, kind), values)
        write_diffusers(folder / PIXEL_FOLDERS[name], sections, found, chosen)
        if "conditioner/empty" in values:
            negative = _torch(torch, np.asarray(values["conditioner/empty"])[None], chosen)
            torch.save(negative, folder / PIXEL_FOLDERS[name] / "uncond_embeddings.bin")
    save("language_model/visual_weight.bin", lavit.visual_weight(t.merger_depth), params)
    save("language_model/pytorch_model.bin", llama.language(m["language"], v.text, 2 + t.codes), params)
    payload = json.loads(meta["tokenizer"])
    published = published_config(m["language"], v.first_position, TextTokenizer(payload) if payload else None, chosen)
    (folder / "language_model" / "config.json").write_text(json.dumps(published, indent=1))
    write_card(folder, checkpoint, meta, config)
    if not verify:
        return []
    if not _has_low(folder):
        return ["not read again: no decoder file"]
    code = "import sys; from unimm_jax.export import lavit_gap; print(lavit_gap(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), str(home)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=env)
    if done.returncode:
        raise ValueError(f"the export cannot be read again:\n{done.stderr[-2000:]}")
    return [f"read again: largest difference of a weight {float(done.stdout.split()[-1]):.1e}"]


def lavit_gap(folder: str, checkpoint: str) -> float:
    """Largest difference of a weight between a LaVIT directory, read as if it were the published one, and a checkpoint
    of the language model (rows that only pad left out)."""
    from unimm_jax.import_weights import import_lavit

    importer, _ = import_lavit(pathlib.Path(folder))["language"]
    params, worst = dict(flatten(read_params(checkpoint))), 0.0
    for path, value in importer.read(importer.places):
        mine, theirs = np.asarray(value, np.float32), np.asarray(params[path], np.float32)
        used = slice(None)
        if path.endswith("_visual"):
            used = slice(0, int(np.flatnonzero(np.abs(theirs).max(1) > 0)[-1]) + 1)
        worst = max(worst, float(np.abs(mine[used] - theirs[used]).max()))
    return worst


def _has_low(folder: pathlib.Path) -> bool:
    return (folder / "visual_tokenizer" / "tokenizer_decoder.bin").exists()


def _torch(torch: Any, array: np.ndarray, dtype: np.dtype) -> Any:
    array = np.array(array, dtype)  # a copy: torch wants memory that it may write
    if dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def main(_: list[str]) -> None:
    """Runs the command."""
    process.quiet()
    f = flags.FLAGS
    run: Callable[[], Any] = lambda: export(f.checkpoint, f.output, f.format, f.dtype)
    process.run(run)


if __name__ == "__main__":
    process.prepare_process()
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage, or an import.", required=True)
    flags.DEFINE_string("output", None, "Directory that is made.", required=True)
    flags.DEFINE_string("format", "hf", f"One of {', '.join(FORMATS)}.")
    flags.DEFINE_string("dtype", "", f"One of {', '.join(DTYPES)}; the checkpoint's if empty.")
    app.run(main)
