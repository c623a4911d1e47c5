"""ILLUME's recipe at the tiny scale, with SimVQ: a bidirectional tokenizer, an MLP connector, no selector."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import TEXT_VOCAB, link, opened, tiny, tiny_dict
from PIL import Image

from unimm_jax import metrics, resolve
from unimm_jax.checkpoint import find, read_meta, read_params
from unimm_jax.data import packing, scenes, slices, tasks, transforms
from unimm_jax.data.documents import Text
from unimm_jax.data.records import Records
from unimm_jax.errors import ConfigError, DataError, UserError
from unimm_jax.evals.runner import evaluate
from unimm_jax.inference.generator import Generator, Prompt, with_start
from unimm_jax.inference.loading import load_model, stage_config
from unimm_jax.inference.pretokenization import pretokenize
from unimm_jax.inference.sampling import GREEDY, Sampling
from unimm_jax.interop.exporter import export
from unimm_jax.models.vit import resize_positions
from unimm_jax.sharding import flatten
from unimm_jax.train import train

VARIANT = "laptop-illume"
SIMVQ = dict(model__image_tokenizer__quantizer="simvq")


@pytest.fixture(scope="module")
def stages(run, tmp_path_factory):
    """Its stages up to stage 1; encoder and text are those of the other tests."""
    root = link(run, tmp_path_factory.mktemp("illume"), "encoder", "text")
    train(tiny("tokenizer", VARIANT, train__steps=12, loss__restart_below=0.0, **SIMVQ), root / "tokenizer")
    pretokenize(str(root / "tokenizer"), str(root / "records"), "", "", TEXT_VOCAB, 32)
    for stage in ("pixel_decoder", "stage1"):
        train(tiny(stage, VARIANT, train__steps=3, evals={}, **SIMVQ), root / stage)
    return root


def test_the_tokenizer_learns_and_keeps_all_patches(stages):
    rows = metrics.read(stages / "tokenizer")
    assert rows[-1]["loss"] < 0.97 * rows[0]["loss"]
    params = dict(flatten(read_params(stages / "tokenizer")))
    assert {path.split("/")[0] for path in params} == {"encoder", "feature_encoder", "quantizer", "decoder"}
    assert not np.allclose(params["quantizer/code_map/kernel"], np.eye(8))
    records = Records(stages / "records")
    assert records.header["selection"] == "all" and (records.kept.values == 16).all()


def test_generated_images_have_all_codes(stages):
    g = Generator(load_model(stages / "stage1"), batch=2)
    ids = g.generate_image_tokens(["a red circle", "two crosses"], Sampling(guidance=1.5))
    codes, keep = g.codes(ids)
    assert keep.all() and g.vocabulary.num_position_ids == 0
    assert g.decode(codes, keep).shape == (2, 64, 64, 3)


def test_the_exported_model_gives_the_same_codes_and_images(stages, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export(str(stages / "stage1"), str(tmp_path / "out"), verify=False)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    g = Generator(load_model(stages / "stage1"), batch=4)
    images = np.stack([scenes.render(scenes.draw_scene(5, "test", i), 64) for i in range(4)])
    codes, keep = g.tokenize(images)
    found_keep, found_codes = model.tokenize(torch.tensor(images))
    ours = torch.tensor(codes.astype(np.int64))
    vectors = model.image_tokenizer.quantizer.vectors  # of two nearly equal ones, each library may take another
    assert np.array_equal(found_keep, keep) and (vectors[found_codes] - vectors[ours]).abs().max() < 5e-3
    decoded = model.decode(ours, found_keep).numpy()
    assert np.abs(decoded.astype(int) - g.decode(codes, keep)).max() <= 1


# ---- Any resolution --------------------------------------------------------------------------------------------------

LARGE = "scenes:count=24,seed=1,size=192,scale=0.35"
SLICED = dict(
    data__max_slices=9,
    data__global_view_share=0.5,
    data__seq_len=256,
    data__images_per_row=12,
    data__mixture=(dict(source="scenes:count=24"), dict(source=LARGE, tasks=dict(question=1.0), weight=2.0)),
    **SIMVQ,
)


@pytest.fixture(scope="module")
def sliced(stages, tmp_path_factory):
    """A stage 3 that reads images of 192 pixels in slices."""
    root = link(stages, tmp_path_factory.mktemp("sliced"), "encoder", "tokenizer", "pixel_decoder")
    link(stages, root, "stage1")
    sources = f"scenes:count=24;{LARGE}"
    pretokenize(str(root / "tokenizer"), str(root / "records"), sources, str(root / "stage1"), TEXT_VOCAB, 32)
    config = tiny_dict("stage3", VARIANT, train__steps=3, evals={}, **SLICED)
    config.init_from = (dict(checkpoint="../stage1", rename=[("", "")]),)
    train(resolve.parse(config), root / "stage3")
    return root


def test_rows_hold_the_views_of_large_images(sliced):
    config = stage_config(read_meta(find(sliced / "stage3")), "stage3")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, records=str(sliced / "records")))
    data, objective = opened(config)
    plan, records = data.rows.plan, data.records
    examples = [e for step in range(6) for row in plan.rows(step) for e in row]
    assert (records.sizes[0] == [64, 64]).all() and (records.sizes[len(records) - 1] == [192, 192]).all()
    seen = {0: 0, 1: 0, 10: 0}
    params = objective.init(jax.random.key(0))
    measure = jax.jit(objective.cross_entropy)
    compared = set()
    for number, packed in enumerate(plan.rows(0)):
        if len(packed) == 1:
            continue
        row = data.rows.row(0, number)
        together = np.asarray(measure(params, {k: v[None] for k, v in row.items()}))[0]
        for segment, example in enumerate(packed, 1):
            built = packing.build_example(records, example, plan.packing, plan.layout)
            alone = packing.build_row([built], plan.packing, plan.layout.view_features)
            single = np.asarray(measure(params, {k: v[None] for k, v in alone.items()}))[0]
            n, weights = len(built.tokens.ids), alone["weights"] > 0
            inside = np.flatnonzero(row["segments"] == segment)
            assert np.abs(together[inside] - single[:n])[weights[:n]].max() < 1e-5
            compared.add(len(built.images))
    assert {1, 10} <= compared  # the whole image, and with nine slices, beside other examples of their row
    for example in examples:
        built = packing.build_example(records, example, plan.packing, plan.layout)
        size = packing.example_size(records, example, plan.packing, plan.layout)
        assert size == (len(built.tokens.ids), len(built.images))
        seen[len(built.images)] += 1
        if len(built.images) == 10:
            whole = records.image(example.record)
            pixels = transforms.decode_image(records[example.record].images[0])
            assert (built.images[0] == whole).all() and (built.images[9] == np.asarray(pixels)[128:, 128:]).all()
    assert all(seen.values())


def test_slices_that_do_not_fit_are_counted(sliced):
    config = stage_config(read_meta(find(sliced / "stage3")), "stage3")
    notes = {}
    for images in (12, 9):
        data = dataclasses.replace(config.data, records=str(sliced / "records"), images_per_row=images)
        plan = opened(dataclasses.replace(config, data=data))[0].rows.plan
        notes[images] = [note for note in plan.notes() if "without their slices" in note]
        first = plan.first_window().drawn
        places = zip(first.records.tolist(), first.tasks.tolist(), first.variants.tolist(), strict=True)
        examples = [packing.Example(record, plan.names[task], variant) for record, task, variant in places]
        wanted = [len(packing.build_example(plan.records, e, plan.packing, plan.layout).images) for e in examples]
        assert (10 in wanted) is (images == 12)
        lost = sum(packing.loses_slices(plan.records, e, plan.packing, plan.layout) for e in examples)
        assert notes[images] == [] if images == 12 else notes[images][0].startswith(f"{lost} of {len(examples)} ")
    assert "images_per_row" in notes[9][0]


def _stop():
    raise InterruptedError


def test_prompts_are_rendered_as_in_training(sliced, monkeypatch):
    g = Generator(load_model(sliced / "stage3"), batch=2)
    config = dataclasses.replace(g.config, data=dataclasses.replace(g.config.data, records=str(sliced / "records")))
    plan = opened(config)[0].rows.plan
    examples = [e for step in range(6) for row in plan.rows(step) for e in row if e.task == "question"]
    pairs = [(e, packing.build_example(plan.records, e, plan.packing, plan.layout)) for e in examples]
    example, wanted = next(pair for pair in pairs if len(pair[1].images) == 10)
    item = plan.records[example.record]
    document = packing.document_of(plan.records, example, plan.packing, plan.layout)
    asked = item.texts[next(segment.text for segment in document if isinstance(segment, Text))]
    whole = np.asarray(transforms.decode_image(item.images[0]))
    tokens, valid, index, (views,), _ = g._rendered([Prompt(tasks.question_prompt(asked, g.task_settings), [whole])])
    n = int(valid.sum())
    assert tokens[valid].tolist() == wanted.tokens.ids[:n].tolist()
    assert index[valid].tolist() == wanted.tokens.feature[:n].tolist()
    assert all((a == b).all() for a, b in zip(views, wanted.images, strict=True))
    image = scenes.render(scenes.draw_scene(5, "test", 0), 192)
    prompt = Prompt(tasks.question_prompt("how many circles?", g.task_settings), [image])
    tokens, valid, index, *views = g._rendered([prompt, dataclasses.replace(prompt, slices=False)])
    images, keep = g._stacked(*views, 10)
    assert images.shape == (2, 10, 64, 64, 3) and keep.shape == (2, 10, 16) and keep[0].all()
    assert (images[0, 5] == image[64:128, 64:128]).all() and not images[1, 1:].any()
    assert (valid.sum(-1)[0] - valid.sum(-1)[1]) == 9 * 18
    assert sorted(index[0][index[0] >= 0]) == list(range(160)) and sorted(index[1][index[1] >= 0]) == list(range(16))
    # guidance of an edit: the document of an example whose instruction is dropped
    asked = []
    monkeypatch.setattr(g, "continue_with_image", lambda *arguments: asked.append(arguments) or _stop())
    with pytest.raises(InterruptedError):
        g.edit_images([image], [["make it red"]], dataclasses.replace(GREEDY, guidance=2.0))
    prompts, _, _, free = asked[0]
    assert [len(each) for each in g._rendered([*prompts, *free])[3]] == [10, 1]
    text = g.text_tokenizer.decode(tokens[0][-12:].tolist())
    assert text.endswith("how many circles?")
    assert g.continue_with_text([prompt])[0] == g.generate_text([image], ["how many circles?"])[0]


def with_data(config, **settings):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **settings))


def test_slices_of_a_prompt_that_do_not_fit_a_row_are_left_out_as_in_training(sliced, monkeypatch):
    g = Generator(load_model(sliced / "stage3"), batch=2)
    large = scenes.render(scenes.draw_scene(5, "test", 0), 192)
    one, two = g.prompt_of([large, "what is it?"]), g.prompt_of([large, large, "what is it?"])
    assert [len(views) for views in g._rendered([one, two])[3]] == [10, 2]  # of 12 views and 256 tokens
    tokens = int(g._rendered([one])[1].sum())
    monkeypatch.setattr(g, "prompt_length", 100)
    assert g.fits(two) and not g.fits(one)
    assert len(g.continue_with_text([two])) == 1
    monkeypatch.setattr(g, "prompt_length", 256)
    for limits, count in ((dict(seq_len=tokens), 10), (dict(seq_len=tokens - 1), 1), (dict(images_per_row=9), 1)):
        monkeypatch.setattr(g, "config", with_data(g.model.config, **limits))
        assert len(g._rendered([one])[3][0]) == count
    # the prompt of an example whose slices do not fit
    plan = opened(with_data(g.config, records=str(sliced / "records")))[0].rows.plan
    examples = [e for step in range(6) for row in plan.rows(step) for e in row if e.task == "question"]
    example = next(e for e in examples if packing.loses_slices(plan.records, e, plan.packing, plan.layout))
    wanted, item = packing.build_example(plan.records, example, plan.packing, plan.layout), plan.records[example.record]
    document = packing.document_of(plan.records, example, plan.packing, plan.layout)
    asked = item.texts[next(segment.text for segment in document if isinstance(segment, Text))]
    whole = np.asarray(transforms.decode_image(item.images[0]))
    tokens, valid, index, (views,), _ = g._rendered([Prompt(tasks.question_prompt(asked, g.task_settings), [whole])])
    n = int(valid.sum())
    assert whole.shape == (192, 192, 3) and np.array_equal(views, wanted.images)
    assert tokens[valid].tolist() == wanted.tokens.ids[:n].tolist()
    assert index[valid].tolist() == wanted.tokens.feature[:n].tolist()


@pytest.fixture(scope="module")
def exported(sliced, tmp_path_factory):
    """The exported model of `sliced`, its processor and its directory."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("exported") / "out"
    export(str(sliced / "stage3"), str(out), verify=False)
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    return model, transformers.AutoProcessor.from_pretrained(out, trust_remote_code=True), out


def test_the_exported_model_leaves_out_the_same_slices(sliced, exported, monkeypatch):
    model, processor, _ = exported
    g = Generator(load_model(sliced / "stage3"), batch=4, prompt_length=512)
    rng = np.random.default_rng(0)
    wide, square, small = (
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in ((300, 70), (192, 192), (64, 64))
    )
    parts = [[square, square, "what is it?"], [wide, small, "is there a cross?"], [square, "is it red?"]]
    in_pil = [[part if isinstance(part, str) else Image.fromarray(part) for part in each] for each in parts]
    message = lambda each: [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image"} for x in each]
    chats = [[{"role": "user", "content": message(each)}] for each in parts]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    images = [part for each in in_pil for part in each if not isinstance(part, str)]
    prompts = [g.prompt_of(each) for each in parts]
    tokens = g._rendered(prompts)[1].sum(-1).tolist()
    assert (processor.seq_len, processor.images_per_row) == (256, 12)
    for fit in ("stretch", "crop"):  # the whole image of one with slices is always stretched
        cases = [((256, 12), [2, 7, 10]), ((tokens[2], 20), [2, 7, 10]), ((tokens[2] - 1, 20), [2, 7, 1])]
        cases += [((tokens[1] - 1, 20), [2, 2, 1]), ((256, 9), [2, 7, 1])]
        for limits, counts in cases:
            monkeypatch.setattr(g, "fit", fit)
            monkeypatch.setattr(g, "config", with_data(g.model.config, seq_len=limits[0], images_per_row=limits[1]))
            for each in (processor, model.processor):
                monkeypatch.setattr(each, "fit", fit)
                monkeypatch.setattr(each, "seq_len", limits[0])
                monkeypatch.setattr(each, "images_per_row", limits[1])
            _, valid, _, views, _ = g._rendered(prompts)
            inputs = processor(images, texts)
            assert [len(each) for each in views] == counts
            assert np.array_equal(inputs["pixel_values"].numpy(), np.concatenate(views))
            placed = inputs["attention_mask"].sum(-1) + 16 * np.array(counts)
            assert placed.tolist() == valid.sum(-1).tolist()
    found = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(found, skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == [answer.strip() for answer in g.continue_with_text(prompts)]
    found = model.compose_image_tokens(in_pil, temperature=0)
    wanted = g.continue_with_image([g.image_prompt_of(each) for each in parts], GREEDY)
    assert found == [row[: len(ids)].tolist() for ids, row in zip(found, wanted, strict=True)]
    embedded = []
    for each in in_pil:
        seen = model.seen([part for part in each if not isinstance(part, str)])
        embedded.append(model.embed_parts(model.processor.image_prompt(each), seen))
    composed = [with_start(g.image_prompt_of(each)) for each in parts]
    assert [x.shape[1] for x in embedded] == g._rendered(composed)[1].sum(-1).tolist()


def test_exports_that_do_not_know_the_size_of_a_row_read_all_slices(exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(exported[2], tmp_path / "old")
    file = tmp_path / "old" / "processor_config.json"
    settings = json.loads(file.read_text())
    assert (settings.pop("seq_len"), settings.pop("images_per_row")) == (256, 12)
    file.write_text(json.dumps(settings))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "old", trust_remote_code=True)
    image = Image.fromarray(np.zeros((192, 192, 3), np.uint8))
    assert len(processor([image] * 2, [processor.ask("what is it?")] * 2)["pixel_values"]) == 20
    assert processor.fits_row(10**6, 10**3)


def test_the_exported_model_reads_the_same_slices(sliced, exported):
    torch = pytest.importorskip("torch")
    model, processor, _ = exported
    g = Generator(load_model(sliced / "stage3"), batch=4, prompt_length=256)
    sizes = ((192, 192), (64, 64), (100, 180), (300, 70))
    pixels = [np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
    prompts = [Prompt(tasks.question_prompt("what is it?", g.task_settings), [image]) for image in pixels]
    tokens, valid, index, views, _ = g._rendered(prompts)
    assert [len(each) for each in views] == [10, 1, 7, 6]
    images = [Image.fromarray(image) for image in pixels]
    inputs = processor(images, [processor.ask("what is it?")] * 4)
    assert np.array_equal(inputs["pixel_values"].numpy(), np.concatenate(views))
    ids = inputs["input_ids"][0][inputs["attention_mask"][0] > 0].tolist()
    placed, where = processor.place_images(ids, torch.ones(10, 16, dtype=torch.bool))
    read = index[0][valid[0]] >= 0
    assert np.flatnonzero(read).tolist() == where
    assert np.array(placed)[~read].tolist() == tokens[0][valid[0]][~read].tolist()
    assert model.describe(images, "what is it?") == g.generate_text(pixels, ["what is it?"] * 4)
    assert len(processor(images)["pixel_values"]) == 4
    # prompts for images
    found = model.compose_image_tokens([[image, "and a circle"] for image in images], temperature=0)
    wanted = g.continue_with_image([g.image_prompt_of([image, "and a circle"]) for image in pixels], GREEDY)
    assert found == [row[: len(ids)].tolist() for ids, row in zip(found, wanted, strict=True)]
    turns = [["make it red", "remove it"]] * 4
    edited = model.edit(images, turns, guidance=2.0, temperature=0)
    ours = g.edit_images(pixels, turns, dataclasses.replace(GREEDY, guidance=2.0))
    for a, b in zip(edited, ours, strict=True):
        assert np.abs(a.numpy().astype(int) - b.astype(int)).max() <= 1
    assert model.compose_image_tokens([[pixels[1], "and a circle"]], temperature=0) == found[1:2]
    prompt = Prompt(tasks.edit_prompt(["make it red"], g.task_settings), pixels[:1])
    segments = model.processor.edit_prompt(["make it red"])
    embedded = model.embed_parts(segments[:-1], model.seen(images[:1]))  # without [IMG], which the generator adds
    assert embedded.shape[1] == g._rendered([prompt])[1].sum() > 160


def test_small_objects_are_scored_with_and_without_slices(sliced, stages):
    found = evaluate(str(sliced / "stage3"), str(sliced / "scores"), ["small_objects"], {"small_questions": 2})
    scores = found["small_objects"]
    views = {"slices", "global_view", "slices_by_kind", "global_view_by_kind"}
    assert views | {"difference", "interval"} == set(scores)
    assert scores["difference"] == pytest.approx(scores["slices"] - scores["global_view"])
    assert scores["interval"][0] <= scores["difference"] <= scores["interval"][1]
    outcomes = json.loads((sliced / "scores" / "outcomes.json").read_text())
    assert {view: sum(right) / len(right) for view, right in outcomes.items()} == pytest.approx(
        {f"small_objects/{view}": scores[view] for view in ("slices", "global_view")}
    )
    assert all(0 <= scores[view] <= 1 for view in ("slices", "global_view"))
    with pytest.raises(ConfigError, match="max_slices of stage1:laptop-illume is 0"):
        evaluate(str(stages / "stage1"), str(sliced / "no"), ["small_objects"])


def test_settings_that_do_not_fit_slices_are_refused(sliced, tmp_path):
    with pytest.raises(ConfigError, match="max_slices is 9; only the connector 'mlp' can have it"):
        tiny("stage3", data__max_slices=9)
    with pytest.raises(ConfigError, match="max_image_tokens is 16; the connector 'mlp' gives 4"):
        tiny("stage3", VARIANT, model__unified__patch_merge=2)
    with pytest.raises(ConfigError, match="patch_merge 3 does not divide 4 patches"):
        tiny("stage3", VARIANT, model__unified__patch_merge=3, model__unified__max_image_tokens=1)
    shutil.copytree(sliced / "records", tmp_path / "records")
    for name in ("sizes", "sizes_ends"):
        (tmp_path / f"records/index/{name}.npy").unlink()
    config = tiny("stage3", VARIANT, data__records=str(tmp_path / "records"), **SLICED)
    with pytest.raises(DataError, match="do not say how large their images are"):
        opened(config)


LARGER = dict(evals={}, data__image_size=128, model__encoder__image_size=128)


def test_a_stage_at_another_image_size_starts_with_interpolated_positions(stages, tmp_path):
    root = link(stages, tmp_path, "tokenizer", "records", "pixel_decoder", "stage1")
    config = tiny_dict("stage2", VARIANT, train__steps=1, model__unified__patch_merge=2, **LARGER, **SIMVQ)
    config.init_from = (dict(checkpoint="../stage1", rename=[("(encoder|language)/", r"\1/")]),)
    with pytest.raises(UserError, match="encoder.image_size"):
        train(resolve.parse(config), root / "stage2")
    config.init_from = (config.init_from[0] | dict(allow=("encoder.image_size",)),)
    train(resolve.parse(config), root / "stage2")
    table = dict(flatten(read_params(root / "stage2")))["encoder/positions"]
    small = dict(flatten(read_params(stages / "stage1")))["encoder/positions"]
    assert table.shape[0] == 65 and np.allclose(table, resize_positions(np.asarray(small), 65), atol=1e-6)
    g = Generator(load_model(root / "stage2"), batch=2)
    image = scenes.render(scenes.draw_scene(5, "test", 0), 128)
    assert g.tokenize([image])[0].shape == (1, 16)  # the image tokenizer keeps its size
    assert len(g.generate_text([image, image], ["", ""])) == 2


def test_a_model_that_reads_larger_images_than_its_tokenizer_is_exported(stages, sliced, tmp_path):
    """As `illume-7b`: images and slices of 128 pixels, 4 features each, and 16 codes of 64 pixels."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    root = link(sliced, tmp_path, "tokenizer", "records", "pixel_decoder", "stage1")
    merging = dict(model__unified__patch_merge=4, model__unified__max_image_tokens=4)
    config = tiny_dict("stage3", VARIANT, train__steps=2, **merging, **LARGER, **SLICED)
    start = dict(checkpoint="../stage1", rename=[("(encoder|language)/", r"\1/")], allow=("encoder.image_size",))
    config.init_from = (start,)
    train(resolve.parse(config), root / "stage3")
    lines = export(str(root / "stage3"), str(tmp_path / "out"))
    assert len(lines) == 5 and all("equal" in line or float(line.rsplit(" ", 1)[1]) < 1e-4 for line in lines)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    g = Generator(load_model(root / "stage3"), batch=4)
    drawn = [scenes.render(scenes.draw_scene(5, "test", i), side) for i, side in enumerate((300, 128, 64))]
    images = [g.read_image(transforms.encode_png(x)) for x in drawn]
    assert [x.shape[0] for x in images] == [300, 128, 64]
    codes, keep = g.tokenize(images)
    vectors = model.image_tokenizer.quantizer.vectors  # of two nearly equal ones, each library may take another
    for given in ([Image.fromarray(x) for x in drawn], [Image.fromarray(drawn[0]), *map(torch.tensor, drawn[1:])]):
        seen = model.seen(given)
        assert [len(image.views) for image in seen] == [10, 1, 1]
        for i, image in enumerate(seen):
            wanted = slices.views(Image.fromarray(drawn[i]), 128, slices.choose_grid(*[len(drawn[i])] * 2, 128, 9))
            assert np.array_equal(image.views, wanted) and np.array_equal(image.keep, keep[i])
            gap = vectors[image.codes] - vectors[torch.tensor(codes[i]).long()]
            assert gap.abs().max() < 5e-3
    questions = ["", "is there a cross?", "what is it?"]
    assert model.describe(given, questions) == g.generate_text(images, questions)
    prompts = [[image, "and a cross"] for image in given]
    ours = [g.image_prompt_of([image, "and a cross"]) for image in images]
    ids = g.continue_with_image(ours, GREEDY)[:, :16]  # the last one is [/IMG]
    assert model.compose_image_tokens(prompts, temperature=0.0) == ids.tolist()
    asked, how = [["make it red", "remove it"]] * 3, dict(guidance=1.5, temperature=0.0)
    turns, ours = model.edit(given, asked, **how), g.edit_images(images, asked, Sampling(**how))
    assert len(turns) == len(ours) == 2 and turns[1].shape == ours[1].shape == (3, 64, 64, 3)
    assert np.abs(turns[0].numpy().astype(int) - ours[0]).max() <= 1
