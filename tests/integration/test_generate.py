import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import command

from unimm_jax import vocabulary as vocab
from unimm_jax.data import scenes, tasks, transforms
from unimm_jax.data.documents import Text
from unimm_jax.errors import CheckpointError, UserError
from unimm_jax.inference import requests, sampling
from unimm_jax.inference.generator import Generator, Prompt, place_images, with_start
from unimm_jax.inference.interleaved import continue_document, document_prompt
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.sampling import NEG_INF, Sampling, image_mask, sample_token
from unimm_jax.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def generator(run):
    return Generator(load_model(run / "stage3"), batch=4)


def test_only_legal_ids_follow(generator):
    prompts = ["a red circle", "", "three blue crosses", "a green square", "two circles"]
    ids = generator.generate_image_tokens(prompts, seed=3)
    v, kinds = generator.vocabulary, generator.vocabulary.kinds()
    for row in ids:
        row = row.tolist()
        assert v.end in row
        inside = row[: row.index(v.end)]
        assert len(inside) % 2 == 0 and len(inside) >= 2
        places = [t - v.first_position for t in inside[::2]]
        assert places == sorted(set(places)) and all(0 <= p < 16 for p in places)
        assert all(kinds[t] == vocab.CODE for t in inside[1::2])
        assert set(row[row.index(v.end) :]) == {v.end}


def test_the_mask_of_plain_order_and_of_fixed_length():
    v = Vocabulary(10, 6)
    kinds = v.kinds()
    count = jnp.array([0, 2, 4])

    def legal(fixed):
        return np.asarray(image_mask(v, count * 0 + v.start, count - 1, count, 4, fixed))

    dynamic, fixed = legal(False), legal(True)
    assert [set(kinds[row]) for row in dynamic] == [{vocab.CODE}, {vocab.CODE, vocab.END}, {vocab.END}]
    assert [set(kinds[row]) for row in fixed] == [{vocab.CODE}, {vocab.CODE}, {vocab.END}]


def test_a_prompts_image_does_not_depend_on_its_neighbours(generator):
    together = generator.generate_image_tokens(["a red circle", "two crosses", "a square"], seed=1)
    alone = generator.generate_image_tokens(["a red circle"], seed=1)
    assert np.array_equal(together[0], alone[0])
    guided = Sampling(guidance=2.0)
    assert np.array_equal(
        generator.generate_image_tokens(["a red circle", "a cross"], guided, 1)[0],
        generator.generate_image_tokens(["a red circle"], guided, 1)[0],
    )


def test_no_recompilation_for_other_prompts(generator):
    generator.generate_image_tokens(["a circle"])
    generator.generate_text(np.zeros((1, 64, 64, 3), np.uint8), ["how many?"])
    before = generator._run._cache_size()
    generator.generate_image_tokens(
        ["three blue crosses and a very long prompt of many words", "a", "b", "c", "d", "e"]
    )
    generator.generate_text(np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8), ["is there?"] * 6)
    assert generator._run._cache_size() == before


def test_guidance_is_the_formula(generator):
    """Greedy first ids by `_run` against two plain forward passes: prompt + [IMG], and [IMG] alone."""
    s = Sampling(guidance=3.0, temperature=0)
    found = generator.generate_image_tokens(["a red circle"], s)[0, 0]
    v, text = generator.vocabulary, generator.text_tokenizer
    model = generator.objective.module(generator.params)

    def logp(ids):
        tokens = jnp.asarray(ids)[None]
        ones = jnp.ones_like(tokens)
        hidden = model.language(model.language.embed(tokens), jnp.arange(len(ids))[None], ones)[0, -1]
        logits = jnp.where(jnp.asarray(v.kinds()) == vocab.PADDING, NEG_INF, model.language.head() @ hidden)
        return jax.nn.log_softmax(logits)

    conditional = logp([text.bos, *text.encode("a red circle"), v.start])
    free = logp([v.start])
    mixed = free + 3.0 * (conditional - free)
    legal = jnp.asarray(v.kinds()) == vocab.POSITION
    assert found == int(jnp.where(legal, mixed, NEG_INF).argmax())


def test_sampling_follows_its_settings():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(400, 0)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(400))

    def draw(**settings):
        return np.asarray(sample_token(logits, keys, Sampling(**settings)))

    assert set(draw(temperature=0)) == {0}
    assert set(draw(top_k=2)) == {0, 1}
    assert set(draw(top_p=0.75)) == {0, 1}
    assert set(draw(top_p=0.4)) == {0}
    share = np.bincount(draw(), minlength=4) / 400
    assert np.abs(share - [0.5, 0.3, 0.15, 0.05]).max() < 0.08
    with pytest.raises(UserError, match="top_p"):
        Sampling(top_p=0)


def test_answers_are_text_and_images_are_images(generator):
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    replies = generator.generate_text(images, ["how many circles are there?", "", "is there a cross?"])
    assert len(replies) == 3 and all(isinstance(r, str) for r in replies)
    for name in ("pixel_decoder", "unet_decoder"):
        codes, keep = generator.tokenize(images)
        drawn = generator.decode(codes, keep, name)
        assert drawn.shape == (3, 64, 64, 3) and drawn.dtype == np.uint8
    with pytest.raises(UserError, match="the limit is 1024; shorten the prompt or raise --prompt_length"):
        generator.generate_image_tokens(["word " * 2000])


def test_wrong_checkpoints_are_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="give one of stage 1, 2 or 3"):
        load_model(run / "tokenizer")
    with pytest.raises(CheckpointError, match="whose language model reads no images"):
        load_model(run / "text")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no unet_decoder_high beside"):
        model = load_model(run / "stage3")
        Generator(model).decode(np.zeros((1, 16), np.int32), np.ones((1, 16), bool), "unet_decoder_high")


def test_prompts_with_several_images_and_none_in_one_batch(generator):
    """Each reply depends on its own images only, however many the others have."""
    images = np.random.default_rng(1).integers(0, 255, (3, 64, 64, 3), np.uint8)
    settings = generator.task_settings
    prompts = [
        Prompt(tasks.question_prompt("is there a cross?", settings, count), images[:count]) for count in (2, 0, 1, 3)
    ]
    together = generator.continue_with_text(prompts)
    assert together == [generator.continue_with_text([prompt])[0] for prompt in prompts]
    assert together[2] == generator.generate_text(images[:1], ["is there a cross?"])[0]
    drawn = generator.continue_with_image(prompts, Sampling(temperature=0))
    assert all(
        (generator.continue_with_image([p], Sampling(temperature=0))[0] == d).all()
        for p, d in zip(prompts, drawn, strict=True)
    )
    with pytest.raises(UserError, match="has 1 images and reads 2"):
        generator.continue_with_text([Prompt(tasks.question_prompt("q", settings, 2), images[:1])])


def test_a_long_prompt_gives_what_a_short_padding_does(generator):
    """Prompts are padded on the left, so the padding changes nothing."""
    short, long = "a red circle", "a red circle and " * 12 + "a red circle"
    first = generator.generate_image_tokens([short], Sampling(temperature=0))
    both = generator.generate_image_tokens([short, long], Sampling(temperature=0))
    assert (first[0] == both[0]).all()


def test_guidance_is_away_from_the_given_prompts(generator):
    """With the prompt itself as the one without condition, guidance changes nothing; with [IMG] alone, it does."""
    prompts = [Prompt(tasks.text_to_image_prompt(text)) for text in ("a red circle", "two crosses", "a square")]
    plain = generator.continue_with_image(prompts, Sampling(), 5)
    guided = Sampling(guidance=3.0)
    assert np.array_equal(generator.continue_with_image(prompts, guided, 5, prompts), plain)
    alone = generator.continue_with_image(prompts, guided, 5)
    assert np.array_equal(alone, generator.continue_with_image(prompts, guided, 5, [Prompt(())] * 3))
    assert not np.array_equal(alone, plain)


def test_edits_read_the_results_before_them(generator, monkeypatch):
    images = np.stack([scenes.render(scenes.draw_scene(0, "test", i)) for i in range(3)])
    instructions = [["make the circle red", "remove the square"], ["add a cross", "paint it blue"], ["a", "b"]]
    asked = []
    rendered = generator._rendered
    monkeypatch.setattr(generator, "_rendered", lambda prompts: asked.append(list(prompts)) or rendered(prompts))
    first, second = generator.edit_images(images, instructions, Sampling(guidance=1.5), seed=2)
    assert first.shape == second.shape == images.shape and first.dtype == np.uint8
    one, two = asked
    assert len(one) == len(two) == 6  # with and without condition
    for i in range(3):
        assert np.array_equal(one[i].images, images[i : i + 1]) and np.array_equal(one[3 + i].images, images[i : i + 1])
        assert np.array_equal(two[i].images, np.stack([images[i], first[i]]))
        assert np.array_equal(two[3 + i].images[0], first[i])
        texts = [segment.text for segment in two[i].document if isinstance(segment, Text)]
        assert texts == instructions[i]
        assert [segment.text for segment in two[3 + i].document if isinstance(segment, Text)] == ["reconstruct"]
    codes, keep = generator.tokenize(first)
    kept = generator.layout.vocabulary.write_image(np.flatnonzero(keep[0]), codes[0][keep[0]]).tolist()
    tokens = rendered(two[:1])[0][0].tolist()
    assert any(tokens[i : i + len(kept)] == kept for i in range(len(tokens)))  # the result's codes are in the prompt
    alone = generator.edit_images(images[:1], instructions[:1], Sampling(guidance=1.5), seed=2)
    assert np.array_equal(alone[1][0], second[0])


def test_text_that_ended_is_filled_and_the_loop_stops_when_all_ended(generator, monkeypatch):
    steps = []
    sample = sampling.sample_token

    def counted(logits, keys, settings):
        jax.debug.callback(lambda: steps.append(1))
        return sample(logits, keys, settings)

    monkeypatch.setattr(sampling, "sample_token", counted)
    fresh = Generator(generator.model, batch=4, answer_length=37)  # a program of its own, traced with `counted`
    image = scenes.render(scenes.draw_scene(0, "test", 0))[None]
    asked = [
        Prompt(tasks.question_prompt(text, fresh.task_settings), image) for text in ("is there a cross?", "how many?")
    ]
    ids = fresh._continue(asked, False, Sampling(temperature=0), 0, 2)
    jax.effects_barrier()
    eos = fresh.text_tokenizer.eos
    ends = [row.index(eos) if eos in row else len(row) for row in ids.tolist()]
    assert all(set(row[end:]) <= {eos} for row, end in zip(ids.tolist(), ends, strict=True))
    assert max(ends) + 1 < 37 and len(steps) == max(ends) + 1
    with pytest.raises(UserError, match="min_length 37 must be below the maximum"):
        fresh.continue_with_text(asked, Sampling(temperature=0, min_length=37))
    with pytest.raises(UserError, match="same number of instructions"):
        fresh.edit_images(np.concatenate([image, image]), [["a"], ["b", "c"]])


@pytest.mark.parametrize(
    ("prompt", "count", "parts"),
    [
        ("what?", 2, [0, 1, "what?"]),
        ("", 1, [0]),
        ("a cross", 0, ["a cross"]),
        ("<image> and <image>", 2, [0, "and", 1]),
        ("a <image>", 1, ["a", 0]),
        ("<image><image>", 2, [0, 1]),
    ],
)
def test_images_are_placed_in_prompts(prompt, count, parts):
    assert place_images(prompt, count) == parts


def test_places_without_an_image_are_refused():
    with pytest.raises(UserError, match="has <image> 2 times, and there are 1 images"):
        place_images("<image> and <image>", 1)


def test_images_are_composed_from_parts_in_their_order(generator):
    a, b = (scenes.render(scenes.draw_scene(0, "test", i)) for i in range(2))
    greedy = Sampling(temperature=0)
    prompts = [generator.prompt_of(parts) for parts in (["x", a, "and", b], [b], ["a cross"])]
    kinds = [[type(segment).__name__ for segment in prompt.document] for prompt in prompts]
    assert kinds == [["Text", "ImageIn", "Text", "ImageIn"], ["ImageIn"], ["Text"]]
    assert np.array_equal(prompts[0].images, np.stack([a, b])) and not prompts[2].images
    made = generator.compose_images([["x", a, "and", b], [b], ["a cross"]], greedy)
    ids = generator.continue_with_image(prompts, greedy)
    assert np.array_equal(made, generator.decode(*generator.codes(ids)))


# ---- Documents -------------------------------------------------------------------------------------------------------


def test_a_text_that_may_draw_ends_with_an_image_or_the_end(generator):
    """At a high temperature every legal id occurs: texts hold no code, and nothing follows [IMG] or </s>."""
    v, eos = generator.vocabulary, generator.text_tokenizer.eos
    prompts = [document_prompt([f"{word} circle"]) for word in ("a", "the", "red", "blue")] * 10
    hot = Sampling(temperature=50.0)
    ids = generator._continue(prompts, False, hot, 0, len(prompts), may_draw=True)
    ends = []
    for row in ids.tolist():
        at = next((i for i, token in enumerate(row) if token in (v.start, eos)), len(row))
        assert set(row[at + 1 :]) <= {eos} and all(v.kinds()[token] == vocab.TEXT for token in row[:at])
        ends.append(row[at] if at < len(row) else None)
    assert v.start in ends
    found = generator.continue_until_image(prompts, hot)
    assert [drawn for _, drawn in found] == [end == v.start for end in ends]
    assert v.start not in generator._continue(prompts, False, hot, 0, len(prompts))
    with pytest.raises(UserError, match="with 1 beam"):
        generator.continue_until_image(prompts[:1], Sampling(temperature=0, beams=2))


def test_the_first_id_of_a_document_is_the_most_likely_text_or_image(generator):
    """Compared with a plain forward pass over <s>, text, [IMG] features [/IMG]."""
    image = scenes.render(scenes.draw_scene(0, "test", 0))
    prompt = document_prompt(["a red circle", image])
    tokens, valid, index, *views = generator._rendered([prompt])
    images, keep = generator._stacked(*views, 1)
    model, v, text = generator.objective.module(generator.params), generator.vocabulary, generator.text_tokenizer
    n = int(valid[0].sum())
    rows = model.features(model.encoder.normalize(images[0]), jnp.asarray(keep[0]))
    x = model.inputs(jnp.asarray(tokens[:, -n:]), jnp.asarray(index[:, -n:]), rows[None])
    hidden = model.language(x, jnp.arange(n)[None], jnp.ones((1, n), jnp.int32))[0, -1]
    assert tokens[0, -n:][:1].tolist() == [text.bos] and tokens[0, -1] == v.end
    legal = np.asarray(v.kinds() == vocab.TEXT)
    legal[[text.pad, text.bos]] = False
    legal[text.vocab_size : text.num_rows] = False
    legal[v.start] = True
    best = int(np.where(legal, np.asarray(model.language.head() @ hidden), NEG_INF).argmax())
    assert generator._continue([prompt], False, Sampling(temperature=0), 0, 1, may_draw=True)[0, 0] == best


def script(generator, monkeypatch, *rounds):
    """Gives documents these texts, by round and stream; the last round stays. Returns all calls: (streams, prompts)."""
    asked = []

    def write(prompts, sampling, seed, streams):
        asked.append((list(streams), prompts))
        return [rounds[min(len(asked), len(rounds)) - 1][stream] for stream in streams]

    monkeypatch.setattr(generator, "continue_until_image", write)
    return asked


def test_documents_go_on_with_texts_and_images_in_turn(generator, monkeypatch):
    image = scenes.render(scenes.draw_scene(0, "test", 0))
    end = ("", False)
    asked = script(
        generator,
        monkeypatch,
        [("and a cross", True), ("the end", False), ("", True), end],
        [("add a square", True), end, ("", True), end],
        [("more", False), end, ("", True), end],
    )
    prompts = [["a circle", image], ["a"], [image], ["b"]]
    found = continue_document(generator, prompts, max_images=2, max_parts=9, seed=4)
    shapes = [[part if isinstance(part, str) else part.shape for part in parts] for parts in found]
    size = (64, 64, 3)
    assert shapes == [["and a cross", size, "add a square", size, "more"], ["the end"], [size, size], []]
    assert [streams for streams, _ in asked] == [[0, 1, 2, 3], [0, 2], [0, 2]]
    second = asked[1][1][0]
    kinds = [type(segment).__name__ for segment in second.document]
    assert kinds == ["Special", "Text", "ImageIn", "Text", "ImageIn"]
    assert np.array_equal(second.images, np.stack([image, found[0][1]]))  # it reads what it drew
    assert [len(parts) for parts in prompts] == [2, 1, 1, 1]  # prompts stay as they are
    ids = generator.continue_with_image([document_prompt(["a circle", image, "and a cross"])], seed=5)
    assert np.array_equal(found[0][1], generator.decode(*generator.codes(ids))[0])
    for limit, count in ((1, [1, 1, 1, 0]), (3, [3, 1, 2, 0])):
        script(generator, monkeypatch, *[[("x", True), ("y", False), ("", True), end]] * 2)
        limited = continue_document(generator, prompts, max_images=2, max_parts=limit)
        assert [len(parts) for parts in limited] == count
    script(generator, monkeypatch, [("x", True)])
    assert continue_document(generator, [["a"]], max_images=0) == [["x"]]
    with pytest.raises(UserError, match="neither text nor image"):
        continue_document(generator, [["a"], [""]])


def test_a_document_without_room_for_an_image_ends(generator, monkeypatch):
    texts = ["a", "a circle and a square and a cross"]
    long = document_prompt(texts[1:])
    monkeypatch.setattr(generator, "prompt_length", int(generator._rendered([long])[1].sum()))
    assert generator.fits(long) and not generator.fits(with_start(long))
    asked = script(generator, monkeypatch, [("", True)] * 2, [("", False)] * 2)
    found = continue_document(generator, [[text] for text in texts], max_images=2)
    assert [len(parts) for parts in found] == [1, 0] and found[0][0].shape == (64, 64, 3)
    assert [streams for streams, _ in asked][0] == [0, 1] and all(1 not in streams for streams, _ in asked[1:])


def test_a_document_does_not_depend_on_when_others_end(generator, monkeypatch):
    script(generator, monkeypatch, [("", False), ("", True)], [("", False), ("", True)])
    first = continue_document(generator, [["a"], ["a circle"]], max_images=2)[1]
    script(generator, monkeypatch, [("", True), ("", True)], [("", True), ("", True)])
    second = continue_document(generator, [["two crosses"], ["a circle"]], max_images=2)[1]
    assert len(first) == 2 and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_requests_are_checked_before_anything_is_loaded(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(transforms.encode_png(scenes.render(scenes.draw_scene(0, "test", 0))))
    (tmp_path / "b.png").write_text("no image")
    one = dict(images=[str(image)])
    for options, reason in (
        (dict(document=True, edits=["a"], **one), "needs no --edit and no --draw"),
        (dict(document=True, draw=True, prompt="a"), "needs no --edit and no --draw"),
        (
            dict(document=True, prompt="a", spoken=Sampling(temperature=0, beams=2)),
            "--beams, --min_length and --length_penalty",
        ),
        (dict(prompt="a", spoken=Sampling(temperature=0, length_penalty=2.0)), "are for answers, not for images"),
        (dict(sampled=Sampling(temperature=0.5), **one), "an answer is greedy, or the best of --beams"),
        (dict(samples=2, **one), "an answer is greedy, or the best of --beams"),
        (dict(prompt="a", max_parts=3), "--max_parts is for --document"),
        (dict(draw=True, best_of=2, **one), "--best_of is for images without --image"),
        (dict(document=True, prompt="a", size=(64, 64)), "without --image and without --document"),
        (dict(document=True), "give --prompt"),
        (dict(document=True, prompt="<image> <image>", **one), "has <image> 2 times, and there are 1 images"),
        (dict(prompt="a", size=(64, 0)), "together or not at all"),
        (dict(size=(64, 64), **one), "without --image and without --document"),
        (dict(edits=["a"], prompt="b", **one), "--edit needs exactly one --image, and no --prompt"),
        (dict(images=[str(tmp_path / "c.png")]), "there is no image file .*c.png"),
        (dict(images=[str(tmp_path / "b.png")]), "b.png is not a readable image"),
    ):
        with pytest.raises(UserError, match=reason):
            requests.check(requests.Request(**options))
    kinds = {
        "draw": dict(prompt="a"),
        "compose": dict(draw=True, **one),
        "edit": dict(edits=["a"], **one),
        "answer": one,
        "document": dict(document=True, prompt="a <image> b", **one),
    }
    assert set(kinds) == set(requests.ANSWERS)
    for kind, options in kinds.items():
        assert requests.check(requests.Request(**options)).request.kind == kind
    assert requests.check(requests.Request(**kinds["document"])).order == ["a", 0, "b"]


def test_documents_are_written_with_their_images(generator, monkeypatch, tmp_path, capsys):
    image = tmp_path / "a.png"
    image.write_bytes(transforms.encode_png(scenes.render(scenes.draw_scene(0, "test", 0))))
    script(generator, monkeypatch, [("add a cross", True), ("", False)], [("", False)] * 2)
    request = requests.Request(prompt="a circle <image>", images=[str(image)], document=True, samples=2)
    requests.write(requests.answer(requests.check(request), generator), tmp_path / "out")
    assert capsys.readouterr().out.splitlines() == [
        "a circle <image> add a cross <image>",
        "a circle <image>",
        f"3 images in {tmp_path / 'out'}",
    ]
    assert (tmp_path / "out" / "document.md").read_text() == (
        "a circle\n\n![](0000_image0.png)\n\nadd a cross\n\n![](0000_image1.png)\n"
        "\n---\n\na circle\n\n![](0001_image0.png)\n"
    )
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == ["0000_image0.png", "0000_image1.png", "0001_image0.png"]
    read = transforms.decode_image((tmp_path / "out" / names[0]).read_bytes())
    assert np.array_equal(np.asarray(read), scenes.render(scenes.draw_scene(0, "test", 0)))


def test_prompts_of_codes_need_no_features_and_edits_read_their_results(generator, monkeypatch):
    """LaVIT's layout, by a setting of the config."""
    model = generator.model
    data = dataclasses.replace(model.config.data, image_prompts="codes")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
    coded = Generator(model, batch=4)
    a, b = (scenes.render(scenes.draw_scene(0, "test", i)) for i in range(2))
    codes, keep = coded.tokenize(np.stack([a, b]))
    v, text = coded.vocabulary, coded.text_tokenizer
    one, two = (v.write_image(np.flatnonzero(k), c[k]).tolist() for c, k in zip(codes, keep, strict=True))
    words = list(text.encode("and"))
    greedy = Sampling(guidance=1.5, temperature=0)
    prompts = [coded.image_prompt_of(parts) for parts in ([a, "and", b], [b, a], ["and"])]
    by_argument = generator.image_prompt_of([a, "and", b], "codes")
    assert by_argument.document == prompts[0].document != generator.image_prompt_of([a, "and", b]).document
    tokens, valid, index, seen, masks = coded._rendered(prompts)
    rows = [row[ok].tolist() for row, ok in zip(tokens, valid, strict=True)]
    assert rows == [[text.bos, *one, *words, *two], [text.bos, *two, *one], [text.bos, *words]]
    assert seen == masks == [[], [], []] and (index < 0).all()
    ids = coded.continue_with_image(prompts, greedy)
    assert (ids[2] == generator.generate_image_tokens(["and"], greedy)[0]).all()  # without images, text to image
    made = coded.compose_images([[a, "and", b], [b, a], ["and"]], greedy)
    assert np.array_equal(made, coded.decode(*coded.codes(ids)))
    asked = []
    continued = coded.continue_with_image
    monkeypatch.setattr(coded, "continue_with_image", lambda *x: asked.append(x) or continued(*x))
    first, _ = coded.edit_images(np.stack([a, b]), [["add a cross", "and"]] * 2, greedy)
    history, _, _, free = asked[1]
    assert all(prompt.document == () and not len(prompt.images) for prompt in free)  # guidance is away from [IMG] alone
    assert np.array_equal(history[1].images, np.stack([b, first[1]]))
    assert history[1].document == coded.image_prompt_of([b, "add a cross", first[1], "and"]).document
    answer = [coded.prompt_of([a, "is there a cross?"])]  # what is understood stays features
    assert coded.continue_with_text(answer) == generator.continue_with_text(answer)


def test_the_command_edits_turn_by_turn(run, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "out"
    image.write_bytes(transforms.encode_png(scenes.render(scenes.draw_scene(0, "test", 0))))
    edits = ["--edit=make the circle red", "--edit=remove the square"]
    arguments = ["generate", f"--checkpoint={run / 'stage3'}", f"--output={out}", *edits]
    done = command(*arguments, f"--image={image}", "--samples=2", "--guidance=1.5")
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in out.iterdir()) == [f"000{i}_edit{t}.png" for i in (0, 1) for t in (1, 2)]
    asked = [*arguments[:2], f"--image={image}"]
    done = command(*asked, "--prompt=is there a cross?", "--min_length=5", "--max_length=5")
    assert done.returncode == 1 and "--min_length=5 must be below --max_length=5" in done.stderr
    how = ["--min_length=3", "--max_length=5", "--beams=2", "--length_penalty=0.5"]
    done = command(*asked, "--prompt=is there a cross?", *how)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = command(*asked, f"--output={out}/drawn", "--draw", "--prompt=<image> and a cross")
    assert done.returncode == 0, done.stderr
    assert len(list((out / "drawn").iterdir())) == 4
    document = [*asked, f"--output={out}/document", "--document", "--max_parts=3", "--samples=2"]
    done = command(*document, "--prompt=a red circle <image> add a blue square", "--temperature=5")
    assert done.returncode == 0, done.stderr
    pages = (out / "document" / "document.md").read_text().split("\n---\n\n")
    assert [page.startswith(f"a red circle\n\n![](000{i}_image0.png)\n\nadd a") for i, page in enumerate(pages)] == [
        True
    ] * 2
    assert len(list((out / "document").glob("*.png"))) == sum(page.count("![](") for page in pages)
    assert done.stdout.count("a red circle <image> add a blue square") == 2
