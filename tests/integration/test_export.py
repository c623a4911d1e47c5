"""Exports, opened by PyTorch in processes without JAX."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from helpers import ROOT, STAGES, TEXT_VOCAB, command, link, tiny, tiny_dict
from PIL import Image

from unimm_jax import resolve
from unimm_jax.checkpoint import Checkpoints, read_meta, read_params
from unimm_jax.data import pipeline, scenes, tasks, transforms
from unimm_jax.errors import CheckpointError, ConfigError, DataError, UnsupportedConfigError, UserError
from unimm_jax.inference.generator import Generator, Prompt
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.pretokenization import pretokenize
from unimm_jax.inference.sampling import Sampling
from unimm_jax.interop import processing_unimm
from unimm_jax.interop.exporter import export
from unimm_jax.interop.importer import import_weights
from unimm_jax.sharding import flatten
from unimm_jax.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUICKSTART = ROOT / "runs" / "quickstart"

# Everything that a user without JAX would do, on the inputs of a file; results go to another.
SCRIPT = """
import sys, numpy as np, torch
from transformers import AutoModel, AutoTokenizer
folder, given, found = sys.argv[1:4]
g = np.load(given, allow_pickle=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
images = torch.tensor(g["images"])
distances = []
model.image_tokenizer.quantizer.register_forward_hook(lambda q, x, _: distances.append(q.distances(x[0])))
keep, codes = model.tokenize(images)
out = dict(keep=keep.numpy(), distances=distances[0].numpy())
assert (distances[0].argmin(-1) == codes).all()
codes = torch.tensor(g["codes"])
out["captions"] = np.array(model.describe(g["images"]))
out["answers"] = np.array(model.describe(images, "is there a red circle?"))
for guidance in (1.0, 1.5):
    ids = model.generate_image_tokens(list(g["prompts"]), guidance=guidance, temperature=0)
    drawn, kept = model.codes(ids)
    out[f"drawn_{guidance}"], out[f"drawn_keep_{guidance}"] = drawn.numpy(), kept.numpy()
out["pixel_decoder"] = model.decode(codes, keep).numpy()
if "noise" in g:
    n = len(g["noise"])
    out["unet_decoder"] = model.decode(codes[:n], keep[:n], "unet_decoder", torch.tensor(g["noise"])).numpy()
words = AutoTokenizer.from_pretrained(folder)
out["added"] = np.array(words.convert_tokens_to_ids(["[IMG]", "[/IMG]", "<code_0>", "<code_3>"]))
assert "jax" not in sys.modules
np.savez(found, **out)
"""


def compare_in_pytorch(checkpoint, folder, scratch, images, prompts):
    """What the exported model does in a process without JAX, against the checkpoint; returns both."""
    g = Generator(load_model(checkpoint), batch=8)
    size = g.config.data.image_size
    images = np.stack([scenes.render(scenes.draw_scene(5, "test", i), size) for i in range(images)])
    texts = [scenes.draw_prompt(scenes.TASKS[i % 6], 5, i).text for i in range(prompts)]
    codes, keep = g.tokenize(images)
    given = {"images": images, "prompts": np.array(texts), "codes": codes.astype(np.int64)}
    if "unet_decoder" in g.decoders:
        c = g.decoders["unet_decoder"][0].config
        side = c.data.image_size // c.loss.unshuffle
        noise = jax.random.normal(jax.random.key(0), (g.batch, side, side, 3 * c.loss.unshuffle**2))
        given["noise"] = np.asarray(noise)[: len(images)]
    np.savez(scratch / "given.npz", **given)
    arguments = [str(folder), str(scratch / "given.npz"), str(scratch / "found.npz")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=scratch)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(scratch / "found.npz")
    assert (found["keep"] == keep).all()
    distances = found["distances"][keep]  # a tiny tokenizer has equal codes, and which of them is nearest is rounding
    assert (distances[np.arange(len(distances)), codes[keep]] < distances.min(-1) + 1e-5).all()
    assert found["captions"].tolist() == g.generate_text(images, [""] * len(images))
    assert found["answers"].tolist() == g.generate_text(images, ["is there a red circle?"] * len(images))
    for guidance in (1.0, 1.5):
        ids = g.generate_image_tokens(texts, Sampling(guidance=guidance, temperature=0))
        drawn, kept = g.codes(ids)
        assert (found[f"drawn_keep_{guidance}"] == kept).all() and (found[f"drawn_{guidance}"] == drawn).all()
    difference = lambda a, b: np.abs(a.astype(int) - b.astype(int)).max()
    assert difference(found["pixel_decoder"], g.decode(codes, keep)) <= 1
    if "unet_decoder" in g.decoders:
        assert difference(found["unet_decoder"], g.decode(codes[:8], keep[:8], "unet_decoder")) <= 1
    v = g.vocabulary
    assert found["added"].tolist() == [v.start, v.end, v.first_code, v.first_code + 3]
    return found


def test_the_whole_model_without_jax(run, tmp_path, capsys):
    lines = export(str(run / "stage3"), str(tmp_path / "out"))
    compared = [line for line in lines if "largest difference" in line]
    assert [line.split(":")[0] for line in compared] == ["language model", "vision encoder and connector"]
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in compared)
    assert len(lines) == 5 and all("equal" in line for line in lines if line not in compared)
    assert "prompts for images: token ids of 6 prompts" in lines[4]
    compare_in_pytorch(run / "stage3", tmp_path / "out", tmp_path, images=3, prompts=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fingerprint" in card and "AutoModel.from_pretrained" in card and "step" in card


HUB_SCRIPT = """
from transformers import AutoModel
model = AutoModel.from_pretrained("me/model", trust_remote_code=True)
print(model.describe(model.draw(["two red circles"], temperature=0))[0])
try:
    AutoModel.from_pretrained("me/model", trust_remote_code=True, device_map="cpu")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_whole_model_opens_from_a_repository_of_the_hub(run, tmp_path):
    """The hub is its cache on this disk, used offline."""
    repository, commit = tmp_path / "hub" / "models--me--model", "0123456789" * 4
    export(str(run / "stage3"), str(repository / "snapshots" / commit), verify=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    where = dict(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT], capture_output=True, text=True, env=os.environ | where, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    caption, refused = done.stdout.splitlines()[-2:]
    assert "without device_map" in refused
    generator = Generator(load_model(run / "stage3"), batch=1)
    drawn = generator.generate_images(["two red circles"], Sampling(temperature=0))
    assert caption == generator.generate_text(drawn, [""])[0]


def changed(run, root, change):
    """The tiny stages, with a stage3 whose parameters `change(params, eos)` has changed in place."""
    meta, params = read_meta(run / "stage3"), read_params(run / "stage3")
    change(params, load_model(run / "stage3").text_tokenizer.eos)
    folder = link(run, root / "linked", *(name for name in STAGES if name != "stage3" and (run / name).exists()))
    checkpoints = Checkpoints(folder / "stage3")
    checkpoints.save(0, {"params": params}, meta)
    checkpoints.close()
    return folder


def talkative(params, eos):
    """Answers do not end: templates that the tiny model has not read otherwise give none."""
    for name in {"embed_text", "head_text"} & params["language"].keys():
        params["language"][name] = params["language"][name].at[eos].set(0)


def varied(params, eos):
    """Answers of many lengths, which depend on the question."""
    language, rng = params["language"], np.random.default_rng(3)
    language["layers"] = jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, language["layers"])
    params["adapter"] = jax.tree.map(lambda x: 6 * x, params["adapter"])
    language["embed_text"] = jnp.asarray(rng.normal(size=language["embed_text"].shape), jnp.float32)
    head = 0.3 * rng.normal(size=language["head_text"].shape)
    head[eos] *= 2
    language["head_text"] = jnp.asarray(head, jnp.float32)


def inventive(params, eos):
    """Images of many lengths, which depend on the prompt."""
    language, rng = params["language"], np.random.default_rng(4)
    random = lambda x, scale: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)
    layers = jax.tree.map(lambda x: random(x, 1.5 * x.shape[1] ** -0.5) if x.ndim > 2 else x, language["layers"])
    scales = dict(embed_text=1, embed_visual=1, head_visual=0.3)
    language |= {name: random(language[name], scale) for name, scale in scales.items()} | dict(layers=layers)
    language["head_visual"] = language["head_visual"].at[1].multiply(0.2)  # [/IMG]
    params["adapter"] = jax.tree.map(lambda x: 6 * x, params["adapter"])


BEAM_SCRIPT = """
import json, sys, numpy as np, torch
from transformers import AutoModel
folder, given, settings, found = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
g = np.load(given)
inputs = model.processor(list(g["images"]), [model.processor.ask(str(text)) for text in g["questions"]])
new = inputs["input_ids"].shape[1]
out = [model.generate(**inputs, max_new_tokens=16, **each)[:, new:].tolist() for each in json.loads(settings)]
try:
    model.generate(**inputs, num_return_sequences=2, num_beams=2)
    raise SystemExit("accepted")
except ValueError as error:
    assert "num_return_sequences cannot be set" in str(error)
assert "jax" not in sys.modules
open(found, "w").write(json.dumps(out))
"""


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_beams_are_those_of_transformers(count, run, tmp_path):
    """Captions and as many answers, token by token, with the lengths and penalties of both: -m slow -k beams for 50."""
    folder = changed(run, tmp_path, varied) / "stage3"
    export(str(folder), str(tmp_path / "out"))
    images = np.stack([scenes.render(scenes.draw_scene(6, "test", i), 64) for i in range(2 * count)])
    questions = [""] * count + [scenes.draw_prompt(scenes.TASKS[i % 6], 6, i).text for i in range(count)]
    np.savez(tmp_path / "given.npz", images=images, questions=np.array(questions))
    kinds = [(1, 1.0, 0), (1, 1.0, 3), (2, 0.5, 0), (5, 0.0, 0), (5, 2.0, 3)]
    settings = [dict(num_beams=b, length_penalty=p, min_new_tokens=m) for b, p, m in kinds]
    arguments = [str(tmp_path / "out"), str(tmp_path / "given.npz"), json.dumps(settings), str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, "-c", BEAM_SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    g = Generator(load_model(folder), batch=min(2 * count, 25), answer_length=16)
    documents = [tasks.question_prompt(text, g.task_settings) if text else tasks.caption_prompt() for text in questions]
    prompts = [Prompt(document, image[None]) for document, image in zip(documents, images, strict=True)]
    eos, seen, lengths = g.text_tokenizer.eos, [], set()
    for (beams, penalty, least), expected in zip(kinds, json.loads((tmp_path / "found.json").read_text()), strict=True):
        how = Sampling(temperature=0, beams=beams, length_penalty=penalty, min_length=least)
        found = g._continue(prompts, False, how, 0, len(prompts)).tolist()
        ends = [row.index(eos) + 1 if eos in row else len(row) for row in found]
        for row, end, other in zip(found, ends, expected, strict=True):
            assert row[:end] == other[:end] and set(row[end:]) <= {eos}
        assert min(ends) > least
        lengths |= set(ends)
        seen.append(found)
    assert len(lengths) > 4
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])  # every setting makes a difference


CHAT_SCRIPT = """
import pathlib, sys, numpy as np, torch
from transformers import AutoModel, AutoProcessor
given, found, *folders = sys.argv[1:]
g = np.load(given)
images = list(g["images"])
turn = lambda role, *content: {"role": role, "content": list(content)}
text = lambda x: {"type": "text", "text": x}
out = {}
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chats = [[turn("user", *[{"type": "image", "image": x} for x in images[:n]], text("how many?"))] for n in (0, 1, 2)]
    chats[0] += [turn("assistant", text("two")), turn("user", text("is there a red circle?"))]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=12)
    assert (ids[:, : inputs["input_ids"].shape[1]] == inputs["input_ids"]).all()
    new = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [x.strip() for x in new]
    answers += model.describe(images[:1], "how many?", length=12)
    out[pathlib.Path(folder).name] = np.array(answers)
assert "jax" not in sys.modules
np.savez(found, **out)
"""


@pytest.mark.parametrize("templates", [("chatml",), pytest.param(tuple(tasks.TEMPLATES), marks=pytest.mark.slow)])
def test_chats_are_answered_without_jax_as_here(templates, run, tmp_path, monkeypatch):
    """One batch of a text-only conversation, one image and two images."""
    folder = changed(run, tmp_path, talkative)
    settings = pipeline.task_settings
    size = tiny("stage3").data.image_size
    images = np.stack([scenes.render(scenes.draw_scene(5, "test", i), size) for i in range(2)])
    np.savez(tmp_path / "given.npz", images=images)
    expected = {}
    for template in templates:
        change = lambda config, template=template: dataclasses.replace(settings(config), template=template)
        monkeypatch.setattr(pipeline, "task_settings", change)
        export(str(folder / "stage3"), str(tmp_path / template), verify=False)
        g = Generator(load_model(folder / "stage3"), batch=2, answer_length=12)
        turns = [("user", ("how many?",)), ("assistant", ("two",)), ("user", ("is there a red circle?",))]
        prompts = [Prompt(tasks.converse([tasks.Spoken(*turn) for turn in turns], g.task_settings))]
        for n in (1, 2):
            prompts.append(Prompt(tasks.question_prompt("how many?", g.task_settings, n), images[:n]))
        expected[template] = g.continue_with_text(prompts)
    arguments = ["given.npz", "found.npz", *expected]
    done = subprocess.run([sys.executable, "-c", CHAT_SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    for template, answers in expected.items():
        assert found[template].tolist() == [*answers, answers[1]]
    assert all(len(answer) > 3 for answers in expected.values() for answer in answers)


PROMPT_SCRIPT = """
import pathlib, sys, numpy as np, torch
from transformers import AutoModel
given, found, *folders = sys.argv[1:]
a, b = np.load(given)["images"]
out = {}
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    log = dict(seen=[], codes=[], decode=[])
    def watch(name):
        method = getattr(model, name)
        def call(*arguments, **options):
            log[name].append(method(*arguments, **options))
            return log[name][-1]
        setattr(model, name, call)
    for name in log:
        watch(name)
    for guidance in (1.0, 1.5):
        how = dict(guidance=guidance, temperature=0)
        model.compose([[a, "and a red circle"], [a, b], ["x", b, "with", a], ["a cross"]], **how)
        turns = model.edit([a, b], [["make it red", "remove the square"], ["add a cross", "paint it blue"]], **how)
        assert all(torch.equal(x, y) for x, y in zip(turns, log["decode"][-2:]))
    key = pathlib.Path(folder).name
    for name, items in log.items():
        for i, item in enumerate(items):
            if name == "seen":
                item = tuple(map(torch.stack, zip(*((image.views[0], image.keep, image.codes) for image in item))))
            for j, x in enumerate(item if isinstance(item, tuple) else (item,)):
                out[f"{key}/{name}/{i}/{j}"] = x.numpy()
# prompts of codes without images are text to image
assert model.generate_image_tokens(["a cross"], 1.5, 0) == model.compose_image_tokens([["a cross"]], **how)
half = model.edit(a, ["make it red"], temperature=0.7, top_k=3, generator=torch.Generator().manual_seed(0))
assert len(half) == 1 and half[0].shape == a[None].shape
larger = model.input_size(torch.zeros(2, 80, 80, 3, dtype=torch.uint8))
assert larger.shape == (2, *a.shape) and larger.dtype == torch.uint8
for wrong in ([["a"]], [["a"], ["b", "c"]], [[], []]):
    try:
        model.edit([a, b], wrong)
        raise SystemExit("accepted")
    except ValueError as error:
        assert "same number of instructions" in str(error)
assert "jax" not in sys.modules
np.savez(found, **out)
"""


def test_images_are_composed_and_edited_without_jax_as_here(run, tmp_path, monkeypatch):
    """Codes of generated images are equal for both layouts of prompts, turn by turn, with and without guidance.

    Codes at the same distance may be told apart differently, and pixels may be rounded differently (see the tests
    above). So each turn here reads the codes and the results of the one there.
    """
    checkpoint = changed(run, tmp_path, inventive) / "stage3"
    size = tiny("stage3").data.image_size
    images = np.stack([scenes.render(scenes.draw_scene(5, "test", i), size) for i in range(2)])
    np.savez(tmp_path / "given.npz", images=images)
    export(str(checkpoint), str(tmp_path / "features_last"), verify=False)
    processor = json.loads((tmp_path / "features_last" / "processor_config.json").read_text())
    assert processor["image_prompts"] == "features_last"
    for layout in ("features", "codes"):
        shutil.copytree(tmp_path / "features_last", tmp_path / layout)
        (tmp_path / layout / "processor_config.json").write_text(json.dumps(processor | dict(image_prompts=layout)))
    arguments = ["given.npz", "found.npz", *tasks.IMAGE_PROMPTS]
    done = subprocess.run(
        [sys.executable, "-c", PROMPT_SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    g = Generator(load_model(checkpoint), batch=4)
    drawn = []
    for layout in tasks.IMAGE_PROMPTS:
        with monkeypatch.context() as patch:
            patch.setattr(g, "task_settings", dataclasses.replace(g.task_settings, image_prompts=layout))
            drawn.append(drawn_as_there(g, layout, found, images, patch))
    assert len({codes.tobytes() for codes in drawn}) == 3  # the layouts differ


def drawn_as_there(g, layout, found, images, patch):
    """Composes and edits with `layout` and compares with what the other process wrote; returns the first codes."""
    there = lambda name, i, j: found[f"{layout}/{name}/{i}/{j}"]
    count = lambda name: len({key.split("/")[2] for key in found.files if key.startswith(f"{layout}/{name}/")})
    seen = {}
    for i in range(count("seen")):
        for image, keep, codes in zip(*(there("seen", i, j) for j in range(3)), strict=True):
            seen[image.tobytes()] = codes, keep
    assert len(seen) > 4  # the sources and different results
    tokenize, read, decode = g.tokenize, g.codes, g.decode
    calls = {"codes": 0, "decode": 0}

    def tokenized(images):
        codes, keep = (np.stack(x) for x in zip(*(seen[image.tobytes()] for image in images), strict=True))
        assert (tokenize(images)[1] == keep).all()
        return codes.astype(np.int32), keep

    def drawn(ids):
        codes, keep = read(ids)
        i, calls["codes"] = calls["codes"], calls["codes"] + 1
        assert (keep == there("codes", i, 1)).all() and (codes == there("codes", i, 0)).all()
        return codes, keep

    def decoded(*arguments):
        i, calls["decode"] = calls["decode"], calls["decode"] + 1
        result = there("decode", i, 0)
        assert np.abs(decode(*arguments).astype(int) - result).max() <= 1
        return result

    for name, method in dict(tokenize=tokenized, codes=drawn, decode=decoded).items():
        patch.setattr(g, name, method)
    a, b = images
    for guidance in (1.0, 1.5):
        greedy = Sampling(guidance=guidance, temperature=0)
        g.compose_images([[a, "and a red circle"], [a, b], ["x", b, "with", a], ["a cross"]], greedy)
        edits = [["make it red", "remove the square"], ["add a cross", "paint it blue"]]
        g.edit_images(images, edits, greedy)
    assert calls == {"codes": 6, "decode": 6} == {name: count(name) for name in calls}
    first = there("codes", 0, 0)
    assert len({row.tobytes() for row in first}) == 4 and (first != there("codes", 3, 0)).any()
    return first


@pytest.mark.slow
def test_the_quickstarts_model_without_jax(tmp_path):
    """pytest -m slow tests/integration/test_export.py, after the quickstart: 50 captions, 20 drawings."""
    assert (QUICKSTART / "stage3").exists(), "run bash launch/quickstart.sh first"
    export(str(QUICKSTART / "stage3"), str(tmp_path / "out"))
    found = compare_in_pytorch(QUICKSTART / "stage3", tmp_path / "out", tmp_path, images=50, prompts=20)
    assert len(set(found["captions"].tolist())) > 10


def test_half_precision_and_what_is_refused(run, tmp_path):
    export(str(run / "stage3"), str(tmp_path / "half"), dtype="bfloat16", verify=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16

    def refused(kind, match, checkpoint="stage3", output="no", **options):
        with pytest.raises(kind, match=match):
            export(str(run / checkpoint), str(tmp_path / output), **options)

    refused(DataError, "half exists; give another --output", output="half")
    refused(CheckpointError, "holds no language model", "tokenizer")
    refused(CheckpointError, "whose language model reads no images", "text")
    refused(CheckpointError, "no checkpoint in .*records", "records")
    wrong = "LaVIT's layout: its encoder is not EVA-CLIP's.*settings that LaVIT lacks"
    refused(UnsupportedConfigError, wrong, form="lavit")
    refused(CheckpointError, "is not a language stage that reads images", "text", form="lavit")
    refused(ConfigError, "--format=onnx is not known; formats are hf, lavit", form="onnx")
    refused(ConfigError, "--dtype=int8 is not known", dtype="int8")
    shutil.copytree(run / "stage3", tmp_path / "alone" / "stage3")
    with pytest.raises(CheckpointError, match="no checkpoint in .*alone/tokenizer"):
        export(str(tmp_path / "alone" / "stage3"), str(tmp_path / "no"))
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no.partial*"))


def test_the_commands_print_one_line_for_a_users_mistake(run, tmp_path):
    for module, arguments, message in (
        ("import_weights", ["--source=nowhere"], "there is no file or directory nowhere"),
        ("export", [f"--checkpoint={run / 'tokenizer'}"], "holds no language model"),
    ):
        done = command(module, *arguments, f"--output={tmp_path / 'no'}")
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1


# ---- What the exported model accepts ---------------------------------------------------------------------------------


def test_images_of_every_accepted_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pils = [Image.fromarray(image) for image in pixels]
    mixed = [pixels[0], torch.tensor(pixels[1]), pils[2]]
    for images in (pixels, torch.tensor(pixels), pils, tuple(pils), list(pixels), mixed, [pixels[:2], pils[2]]):
        found = processing_unimm.as_images(images, 16)
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), pixels)
    for image in (pixels[0], torch.tensor(pixels[0]), pils[0]):
        assert np.array_equal(processing_unimm.as_images(image, 16).numpy(), pixels[:1])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16", "1", "CMYK"])
def test_pil_images_are_prepared_as_in_training(mode, tmp_path):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (21, 30), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (21, 30, 4), dtype=np.uint8), "RGBA").convert(mode)
    file = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(file)
    found = processing_unimm.as_images(Image.open(file), 16)
    assert np.array_equal(found[0].numpy(), transforms.to_pixels(file.read_bytes(), 16))
    cropped = processing_unimm.as_images(Image.open(file), 16, "crop")
    assert np.array_equal(cropped[0].numpy(), transforms.to_pixels(file.read_bytes(), 16, "crop"))


@pytest.mark.parametrize(
    "images, kind",
    [("a.png", "str"), (None, "NoneType"), (np.zeros((16, 16, 3)), "ndarray of float64"), ([b"x"], "bytes")],
)
def test_other_images_are_one_clear_type_error(images, kind):
    with pytest.raises(TypeError, match=f"images are uint8 tensors or NumPy arrays .* PIL .*; this is a {kind}"):
        processing_unimm.as_images(images, 16)
    with pytest.raises(ValueError, match=r"this model reads \[B, 16, 16, 3\]"):
        processing_unimm.as_images(np.zeros((1, 8, 8, 3), np.uint8), 16)
    with pytest.raises(ValueError, match="no images"):
        processing_unimm.as_images([], 16)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2", "qwen3"))]
)
def test_an_imported_language_model_comes_back(kind, tmp_path):
    peer = peers.language(kind, scaling=peers.SCALING, words=90)
    peer.save_pretrained(tmp_path / "peer")
    import_weights(str(tmp_path / "peer"), str(tmp_path / "one"), codes=32)
    lines = export(str(tmp_path / "one"), str(tmp_path / "back"))
    assert float(lines[0].rsplit(" ", 1)[1]) < 1e-4
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(peer)
    mine, theirs = back.state_dict(), peer.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    import_weights(str(tmp_path / "back"), str(tmp_path / "two"), codes=32)
    one, two = (dict(flatten(read_params(tmp_path / n))) for n in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


C = peers.LAVIT_META["config"]


def lavit_words(folder):
    """A sentencepiece model with fewer words than the tiny model has text rows."""
    import sentencepiece

    sentences = [f"{n} {c} {s}s." for n in ("one", "two") for c in ("red", "blue") for s in ("circle", "star")] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def pixel_folders(folder):
    """Tiny U-Nets and autoencoders by `diffusers`, with the widths of the reference's two conditionings."""
    import diffusers

    pooled = C["unet_dim_2"]
    small = dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        transformer_layers_per_block=1,
        norm_num_groups=8,
    )
    xl = dict(cross_attention_dim=C["unet_dim_1"] + pooled, projection_class_embeddings_input_dim=pooled + 6 * 8)
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
    )
    for name, settings in (
        ("pixel_decoding", small | dict(cross_attention_dim=C["unet_dim"])),
        ("highres_pixel_decoding", peers.SDXL | small | xl),
    ):
        half = lambda module, seed: peers.randomize(module, seed).to(torch.bfloat16)
        half(diffusers.UNet2DConditionModel(**settings), 1).save_pretrained(folder / name / "unet")
        half(diffusers.AutoencoderKL(**vae), 2).save_pretrained(folder / name / "vae")
    empty = torch.randn(1, 5, C["unet_dim"]).to(torch.bfloat16)
    torch.save(empty, folder / "pixel_decoding" / "uncond_embeddings.bin")


def lavit_folder(folder):
    """The reference's tiny weights as its own files."""
    tensors = lambda source: {k: torch.tensor(v).to(torch.bfloat16) for k, v in source.items()}
    every = peers.lavit_weights("visual_tokenizer")
    pick = lambda start: {k.removeprefix(start): v for k, v in every.items() if k.startswith(start)}
    merger = {k: v for k, v in every.items() if k.startswith("causal_encoder.")}
    files = {
        "visual_tokenizer/eva_vitg_psz14.bin": pick("encoder."),
        "visual_tokenizer/tokenizer_encoder.bin": {
            k: v for k, v in every.items() if not k.startswith(("encoder.", "vit_proj."))
        },
        "visual_tokenizer/tokenizer_decoder.bin": peers.lavit_weights("tokenizer_decoder"),
        "visual_tokenizer/highres_tokenizer_decoder.bin": peers.lavit_weights("highres_tokenizer_decoder"),
        "language_model/visual_weight.bin": merger | {k: v for k, v in every.items() if k.startswith("vit_proj.")},
        "language_model/pytorch_model.bin": peers.lavit_weights("llama_model"),
    }
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors(source), folder / name)
    config = dict(
        model_type="llama",
        vocab_size=102 + C["n_code"],
        hidden_size=C["llm_dim"],
        intermediate_size=C["llm_inter"],
        num_hidden_layers=C["llm_layers"],
        num_attention_heads=C["llm_heads"],
    )
    (folder / "language_model" / "config.json").write_text(json.dumps(config))
    return files


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """LaVIT as it is published, tiny, and the same imported: (folder, names of its files)."""
    folder = tmp_path_factory.mktemp("lavit")
    files = lavit_folder(folder / "published")
    lavit_words(folder / "published" / "language_model")
    pixel_folders(folder / "published")
    import_weights(str(folder / "published"), str(folder / "in"))
    saved = json.loads(read_meta(folder / "in" / "language")["config"])
    assert saved["data"]["image_prompts"] == "codes"
    return folder, files


LATENT_SCRIPT = """
import sys, numpy as np, torch
from transformers import AutoModel
folder, given, found = sys.argv[1:4]
g = np.load(given)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
images = torch.tensor(g["images"])
keep, codes = model.tokenize(images)
out = dict(keep=keep.numpy(), codes=codes.numpy(), captions=np.array(model.describe(images, length=12)))
for name, size in (("unet_decoder", (16, 16)), ("unet_decoder_high", (32, 16))):
    out[name] = model.decode(codes, keep, name, torch.tensor(g[name]), size=size).numpy()
ids = model.generate_image_tokens(["two red stars."], guidance=4.0, temperature=0)
out["drawn"] = model.codes(ids)[0].numpy()
composed = [[images[0], "two red stars."], [images[0], images[1]], [images[0], "two red stars.", images[1]]]
out["composed"] = model.codes(model.compose_image_tokens(composed, guidance=4.0, temperature=0))[0].numpy()
assert "jax" not in sys.modules
np.savez(found, **out)
"""


@pytest.mark.slow
def test_an_imported_lavit_reads_and_draws_here_and_in_pytorch(published, tmp_path):
    folder, _ = published
    g = Generator(load_model(folder / "in" / "language"), batch=2, answer_length=12)
    assert (
        g.text_tokenizer.bos is None and g.text_tokenizer.num_rows == 100 > g.text_tokenizer.vocab_size
    )  # rows that no word has
    images = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    export(str(folder / "in" / "language"), str(tmp_path / "hf"), dtype="float32")
    sizes = {"unet_decoder": (16, 16), "unet_decoder_high": (32, 16)}
    noise = {k: jax.random.normal(jax.random.key(0), (2, h // 2, w // 2, 4)) for k, (h, w) in sizes.items()}
    given = {"images": images} | {k: np.asarray(v) for k, v in noise.items()}
    np.savez(tmp_path / "given.npz", **given)
    arguments = [str(tmp_path / "hf"), str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    done = subprocess.run([sys.executable, "-c", LATENT_SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    codes, keep = g.tokenize(images)
    assert (found["keep"] == keep).all() and (found["codes"][keep] == codes[keep]).all()
    assert found["captions"].tolist() == g.generate_text(images, ["", ""])
    for name, size in sizes.items():
        drawn = g.decode(codes, keep, name, size=size)
        assert drawn.shape == (2, *size, 3)
        gap = np.abs(found[name].astype(int) - drawn.astype(int)).max()
        assert gap <= 1, (name, size, gap)
    assert drawn.std() > 1
    ids = g.generate_image_tokens(["two red stars."], Sampling(guidance=4.0, temperature=0))
    assert (found["drawn"] == g.codes(ids)[0]).all()
    assert g.task_settings.image_prompts == "codes"
    words = "two red stars."
    parts = ([images[0], words], [images[0], images[1]], [images[0], words, images[1]])
    composed = [g.image_prompt_of(each) for each in parts]
    ids = g.continue_with_image(composed, Sampling(guidance=4.0, temperature=0))
    assert (found["composed"] == g.codes(ids)[0]).all()
    (tmp_path / "a.png").write_bytes(transforms.encode_png(images[0]))
    how = ["--draw", f"--image={tmp_path / 'a.png'}", "--prompt=two red stars.", "--samples=1", "--temperature=0"]
    done = command("generate", f"--checkpoint={folder / 'in' / 'language'}", f"--output={tmp_path / 'drawn'}", *how)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in (tmp_path / "drawn").iterdir()] == ["0000.png"]
    with pytest.raises(UserError, match="multiples of 4"):
        g.decode(codes, keep, "unet_decoder", size=(22, 16))
    with pytest.raises(CheckpointError, match="no pixel_decoder beside .*present: unet_decoder, unet_decoder_high"):
        g.decode(codes, keep, "pixel_decoder")


def test_a_selector_starts_from_the_encoder_of_an_imported_lavit(published, tmp_path):
    """The walk-through of docs/tpu.md starts so."""
    source = published[0] / "in" / "tokenizer"
    saved = json.loads(read_meta(source)["config"])
    encoder = {f"model__encoder__{name}": value for name, value in saved["model"]["encoder"].items()}
    start = dict(checkpoint=str(source), rename=[("encoder/", "encoder/")])
    size = saved["data"]["image_size"]
    train(
        tiny("selector", train__steps=1, evals={}, init_from=(start,), data__image_size=size, **encoder),
        tmp_path / "selector",
    )
    found, given = (dict(flatten(read_params(folder))) for folder in (tmp_path / "selector", source))
    names = [name for name in given if name.startswith("encoder/")]
    assert len(names) > 10 and all(np.array_equal(found[name], given[name]) for name in names)


def test_stage_1_starts_from_the_image_tokenizer_of_an_imported_lavit(published, tmp_path):
    """The shorter way of docs/tpu.md: without training an image tokenizer."""
    shutil.copytree(published[0] / "in" / "tokenizer", tmp_path / "tokenizer")
    pretokenize(str(tmp_path / "tokenizer"), str(tmp_path / "records"), "scenes:count=24", "", TEXT_VOCAB, 32)
    saved = json.loads(read_meta(tmp_path / "tokenizer")["config"])
    sections = {
        f"model__{section}__{name}": value
        for section in ("encoder", "image_tokenizer")
        for name, value in saved["model"][section].items()
    }
    size, patches = saved["data"]["image_size"], (saved["data"]["image_size"] // 14) ** 2
    sections |= dict(data__image_size=size, model__unified__max_image_tokens=patches)
    config = tiny_dict("stage1", train__steps=2, evals={}, **sections)
    config.init_from = config.init_from[:1]  # the image tokenizer; without a language model
    train(resolve.parse(config), tmp_path / "stage1")
    found, given = (dict(flatten(read_params(tmp_path / name))) for name in ("stage1", "tokenizer"))
    names = [name for name in given if name.startswith("encoder/")]
    assert len(names) > 10 and all(np.array_equal(found[name], given[name]) for name in names)
    assert {name for name in given if name.startswith("merger/")} <= set(found)
    g = Generator(load_model(tmp_path / "stage1"), batch=2)
    codes, keep = g.codes(g.generate_image_tokens(["a red circle"], Sampling()))
    assert keep.any() and codes.shape == (1, patches)


def test_lavits_files_come_in_and_go_out_again(published, tmp_path):
    folder, files = published
    published = folder / "published"
    (tmp_path / "in").symlink_to(folder / "in")
    lines = export(str(tmp_path / "in" / "language"), str(tmp_path / "out"), form="lavit")
    assert lines == ["read again: largest difference of a weight 0.0e+00"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import_weights --source=THIS_DIRECTORY" in card and "AutoModel" not in card and "fingerprint" in card
    import diffusers

    for name in ("pixel_decoding", "highres_pixel_decoding"):
        for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")):
            theirs, mine = (
                kind.from_pretrained(f / name / part, torch_dtype="auto") for f in (published, tmp_path / "out")
            )
            theirs, mine = theirs.state_dict(), mine.state_dict()
            assert theirs.keys() == mine.keys() and all(torch.equal(theirs[k], mine[k]) for k in theirs)
        diffusers.DDIMScheduler.from_pretrained(tmp_path / "out" / name / "scheduler")
    empty = [torch.load(f / "pixel_decoding" / "uncond_embeddings.bin") for f in (published, tmp_path / "out")]
    assert torch.equal(*empty)
    for name in files:
        there = torch.load(published / name, weights_only=True)
        here = torch.load(tmp_path / "out" / name, weights_only=True)
        assert there.keys() == here.keys(), name
        for key in there:
            if not key.startswith(("norm.", "head.")) or "eva" not in name:
                assert torch.equal(there[key], here[key]), (name, key)
    # a trained copy of the encoder has no place in this layout
    shutil.copytree(tmp_path / "in" / "tokenizer", tmp_path / "moved" / "tokenizer")
    params = read_params(tmp_path / "in" / "language")
    params["encoder"]["cls"] = params["encoder"]["cls"] + 1
    checkpoints = Checkpoints(tmp_path / "moved" / "language")
    checkpoints.save(0, {"params": params}, read_meta(tmp_path / "in" / "language"))
    checkpoints.close()
    with pytest.raises(UnsupportedConfigError, match="its own copy of the encoder"):
        export(str(tmp_path / "moved" / "language"), str(tmp_path / "no"), form="lavit")
