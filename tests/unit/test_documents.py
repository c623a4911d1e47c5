"""Records, outlines, tasks and documents: one rendering, and a length that always equals it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm_jax import text_tokenizer
from unimm_jax.data import tasks
from unimm_jax.data.documents import (
    IGNORED,
    ImageCodes,
    ImageIn,
    ImageStart,
    Layout,
    Special,
    Text,
    fits_row,
    input_views,
    length,
    prompt_images,
    render,
    with_slices,
)
from unimm_jax.data.outlines import Message, Question, Record, flatten, outline
from unimm_jax.data.tasks import TaskSettings
from unimm_jax.errors import InvalidRecordError
from unimm_jax.vocabulary import Vocabulary

PATCHES, CODES = 16, 64
TOKENIZER = text_tokenizer.train(["a red circle and a blue square", "is there a cross?", "yes"], 300)
PIXELS = np.zeros((8, 8, 3), np.uint8)

text = st.text("abc é?", min_size=1, max_size=12).filter(str.strip)
questions = st.lists(st.builds(Question, text, text, st.just(""), st.booleans()), max_size=5)


@st.composite
def conversations(draw):
    count, messages = 0, []
    for i in range(draw(st.integers(2, 6))):
        parts = []
        for _ in range(draw(st.integers(1, 3))):
            if draw(st.booleans()):
                parts.append(count)
                count += 1
            else:
                parts.append(draw(text))
        messages.append(Message("assistant" if i % 2 else "user", parts))
    if draw(st.booleans()):
        messages.insert(0, Message("system", [draw(text)]))
    return Record("c", [PIXELS] * count, messages=messages)


@st.composite
def interleaved(draw):
    count, content = 0, []
    for is_image in draw(st.lists(st.booleans(), min_size=1, max_size=8)):
        content.append(count if is_image else draw(text))
        count += is_image
    return Record("i", [PIXELS] * count, content=content)


records = st.one_of(
    st.builds(
        lambda a, b, c: Record("k", [PIXELS], captions=a, prompts=b, questions=c),
        st.lists(text, min_size=1, max_size=3),
        st.lists(text, max_size=3),
        questions,
    ),
    conversations(),
    interleaved(),
    st.builds(lambda a: Record("e", [PIXELS] * 2, instruction=a), text),
    st.builds(lambda a: Record("t", text=a), text),
)
layouts = st.builds(
    lambda grid, limit: Layout(Vocabulary(TOKENIZER.num_rows, CODES, PATCHES if grid else 0), TOKENIZER, limit),
    st.booleans(),
    st.sampled_from([3, PATCHES]),
) | st.just(Layout(Vocabulary(TOKENIZER.num_rows, CODES), TOKENIZER, PATCHES, view_features=PATCHES))
task_settings = st.builds(
    TaskSettings,
    max_questions=st.integers(1, 3),
    prompt_dropout=st.sampled_from([0.0, 0.5, 1.0]),
    template=st.sampled_from(list(tasks.TEMPLATES)),
    image_prompts=st.sampled_from(tasks.IMAGE_PROMPTS),
)


def contents(record, seed):
    rng = np.random.default_rng(seed)
    keep = rng.random((len(record.images), PATCHES)) < 0.4
    keep[:, 0] = True
    return keep, rng.integers(0, CODES, (len(record.images), PATCHES))


@settings(max_examples=300, deadline=None)
@given(records, layouts, task_settings, st.integers(0, 2**31 - 1))
def test_the_length_of_every_document_is_that_of_its_rendering(record, layout, options, variant):
    texts, codes = flatten(record)
    found = outline(codes, len(record.images))
    keep, image_codes = contents(record, variant)
    counts = [len(TOKENIZER.encode(t)) for t in texts]
    applied = 0
    for name in tasks.REGISTRY:
        task = tasks.get(name)
        if not task.applies(found):
            continue
        applied += 1
        document = task.build(found, variant, options)
        if layout.view_features:
            document = with_slices(document, [(variant + image) % 3 for image in range(len(record.images))])
        row = render(document, texts, keep, image_codes, layout)
        assert len(row.ids) == length(document, counts, keep.sum(-1), layout)
        assert len(row.ids) == len(row.targets) == len(row.weights) == len(row.feature)
        assert row.inputs == input_views(document)
        for slot, (image, _) in enumerate(row.inputs):
            mine = row.feature[row.feature // layout.max_image_tokens == slot]
            mine = mine[mine >= 0]
            wanted = layout.view_features or min(keep[image].sum(), layout.max_image_tokens)
            assert len(mine) == wanted == len(set(mine.tolist()))
        assert row.ids.max() < layout.vocabulary.size and row.ids.min() >= 0
        assert (row.ids == row.targets)[row.feature == IGNORED].all()
        for (_, view), (_, following) in zip(row.inputs, row.inputs[1:], strict=False):
            assert following in (0, view + 1)  # slices follow the whole image, in order
    assert applied


def test_a_document_fits_a_row_by_its_tokens_and_its_views():
    layout = Layout(Vocabulary(TOKENIZER.num_rows, CODES), TOKENIZER, 4, view_features=4)
    document = with_slices((ImageIn(0), Text(0), ImageIn(1)), [2, 0])  # 4 views of 6 tokens, and a text of 3
    for seq_len, views, wanted in ((27, 4, True), (26, 4, False), (27, 3, False), (99, 99, True)):
        assert fits_row(document, [3], [16, 16], layout, seq_len, views) is wanted


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(text, st.none()), max_size=6), layouts, task_settings, st.integers(0, 2**31 - 1))
def test_the_length_of_every_prompt_for_an_image_is_that_of_its_rendering(parts, layout, options, seed):
    numbers = iter(range(len(parts)))
    numbered = [next(numbers) if part is None else part for part in parts]
    instructions = [part for part in parts if part is not None] or ["a"]
    record = Record("p", [PIXELS] * (len(parts) + 1))
    keep, image_codes = contents(record, seed)
    for document, images in (
        (tasks.image_prompt(numbered, options), parts.count(None)),
        (tasks.edit_prompt(instructions, options), len(instructions)),
        (tasks.unconditional_edit_prompt(options), int(options.image_prompts != "codes")),
    ):
        row = render((*document, ImageStart()), (), keep, image_codes, layout)
        assert len(row.ids) == len(row.feature) == length(document, (), keep.sum(-1), layout) + 1
        assert prompt_images(document) == tuple(range(images))
        assert row.inputs == input_views(document)
        assert options.image_prompts != "codes" or (not row.inputs and (row.feature == IGNORED).all())


@pytest.mark.parametrize("positions", [0, PATCHES])
def test_prompts_of_codes_have_no_image_tokens_around_them(positions):
    layout = Layout(Vocabulary(TOKENIZER.num_rows, CODES, positions), TOKENIZER, 5)
    codes_only = TaskSettings(image_prompts="codes", template="chatml")
    document = tasks.image_prompt([0, "a red circle", 1], codes_only)
    assert document == (Special("bos"), ImageCodes(0), Text("a red circle"), ImageCodes(1))
    assert tasks.edit_prompt(["a", "b"], codes_only) == tasks.image_prompt([0, "a", 1, "b"], codes_only)
    keep, image_codes = contents(Record("p", [PIXELS] * 2), 0)
    one, two = (
        layout.vocabulary.write_image(patches, image_codes[i][patches]).tolist()
        for i, patches in enumerate(np.flatnonzero(k)[:5] for k in keep)
    )
    row = render((*document, ImageStart()), (), keep, image_codes, layout)
    text_ids = TOKENIZER.encode("a red circle")
    assert row.ids.tolist() == [TOKENIZER.bos, *one, *text_ids, *two, layout.vocabulary.start]
    assert len(one) == (10 if positions else 5) and row.inputs == ()
    features = tasks.image_prompt([0, "a"], TaskSettings())
    assert features == tasks.user_prompt([0, "a"], TaskSettings()) == (ImageIn(0), Text("a"))


@settings(max_examples=200, deadline=None)
@given(records)
def test_outlines_keep_what_records_have(record):
    texts, codes = flatten(record)
    found = outline(codes, len(record.images))
    assert [texts[i] for i in found.captions] == list(record.captions)
    assert [texts[i] for i in found.prompts] == list(record.prompts)
    assert [(texts[q], texts[a], alt) for q, a, alt in found.questions] == [
        (q.question, q.answer, q.alternative) for q in record.questions
    ]
    spoken = [Message(t.role, [p.number if p.is_image else texts[p.number] for p in t.parts]) for t in found.turns]
    assert spoken == [Message(m.role, list(m.content)) for m in record.messages]
    assert [p.number if p.is_image else texts[p.number] for p in found.content] == list(record.content)
    assert ("" if found.instruction is None else texts[found.instruction]) == record.instruction
    assert ("" if found.text is None else texts[found.text]) == record.text


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record("k"), "no caption, messages"),
        (Record("k", [PIXELS], captions=["a"], text="b"), "captions and text"),
        (Record("k", captions=["a"]), "0 images and uses 1"),
        (Record("k", [PIXELS], text="b"), "1 images and uses 0"),
        (Record("k", [PIXELS], content=["a", 1]), "not used in order"),
        (Record("k", [PIXELS], messages=[Message("robot", ["a"])]), "role 'robot'"),
    ],
)
def test_records_of_no_kind_or_two_are_refused(record, reason):
    with pytest.raises(InvalidRecordError, match=reason):
        flatten(record)


def document(record, task, variant=0, **options):
    texts, codes = flatten(record)
    return tasks.get(task).build(outline(codes, len(record.images)), variant, TaskSettings(**options)), texts


def written(record, task, variant=0, **options):
    """Readable form of a document: texts in the loss in capitals, [i] an image that is read, <i> one generated."""
    segments, texts = document(record, task, variant, **options)
    words = []
    for s in segments:
        kind = type(s).__name__
        if kind == "Text":
            string = s.text if isinstance(s.text, str) else texts[s.text]
            words.append(string.upper() if s.weight else string)
        elif kind == "Special":
            words.append(f"{s.name}{'+' if s.weight else ''}")
        else:
            words.append(f"[{s.image}]" if kind == "ImageIn" else f"<{s.image}>")
    return "|".join(words)


def test_conversations_by_template():
    record = Record(
        "k", [PIXELS] * 2, messages=[Message("user", [0, "q"]), Message("assistant", ["a", 1]), Message("user", ["r"]),
                                     Message("assistant", ["b"]), Message("user", ["unanswered"])]
    )  # fmt: skip
    # the generated image is read again at the start of the next turn; the unanswered turn is left out
    assert written(record, "conversation") == "[0]|q|A|<1>|eos+|[1]|r|B|eos+"
    vicuna = written(record, "conversation", template="vicuna_v1")
    assert vicuna.startswith("bos|A chat between") or vicuna.startswith("bos|a chat between")
    assert vicuna.endswith("|USER:|[0]|q|ASSISTANT:|A|<1>|eos+|USER:|[1]|r|ASSISTANT:|B|eos+")
    chatml = written(record, "conversation", template="chatml")
    assert chatml.endswith("<|im_start|>user\n|[1]|r|<|im_end|>\n|<|im_start|>assistant\n|B|eos+|\n")
    own = Record("k", messages=[Message("system", ["s"]), Message("user", ["q"]), Message("assistant", ["a"])])
    assert written(own, "conversation", template="vicuna_v1") == "bos|s|USER:|q|ASSISTANT:|A|eos+"


def test_a_prompt_is_its_conversation_up_to_the_answer():
    record = Record("k", [PIXELS], captions=["c"], questions=[Question("q", "a")])
    for template in tasks.TEMPLATES:
        whole, texts = document(record, "question", template=template)
        prompt = tasks.question_prompt("q", TaskSettings(template=template))
        layout = Layout(Vocabulary(TOKENIZER.num_rows, CODES), TOKENIZER, PATCHES)
        keep, codes = contents(record, 0)
        start = render(prompt, (), keep, codes, layout).ids
        assert render(whole, texts, keep, codes, layout).ids[: len(start)].tolist() == start.tolist()
    caption, _ = document(record, "caption")
    assert [s.image for s in tasks.caption_prompt()] == [caption[0].image]


@pytest.mark.parametrize("image_prompts", ["features", "features_last"])
@pytest.mark.parametrize("template", tasks.TEMPLATES)
def test_a_prompt_of_edits_is_their_conversation_up_to_the_image(template, image_prompts):
    edit = Record("k", [PIXELS] * 2, instruction="make it red")
    turns = [Message("user", (0, "q")), Message("assistant", (1,)), Message("user", ("r",)), Message("assistant", (2,))]
    layout = Layout(Vocabulary(TOKENIZER.num_rows, CODES), TOKENIZER, PATCHES)
    for record, task, asked in (
        (edit, "edit", ["make it red"]),
        (Record("k", [PIXELS] * 3, messages=turns), "conversation", ["q", "r"]),
    ):
        options = dict(template=template, image_prompts=image_prompts)
        whole, texts = document(record, task, prompt_dropout=0.0, **options)
        keep, codes = contents(record, 0)
        prompt = (*tasks.edit_prompt(asked, TaskSettings(**options)), ImageStart())
        start = render(prompt, (), keep, codes, layout)
        found = render(whole, texts, keep, codes, layout)
        n = len(start.ids)
        assert found.ids[:n].tolist() == start.ids.tolist() and found.feature[:n].tolist() == start.feature.tolist()
        assert found.weights[n:].any() and found.ids[n] >= TOKENIZER.num_rows  # what follows is the image


def test_edits_and_their_dropped_form():
    record = Record("k", [PIXELS] * 2, instruction="make it red")
    assert written(record, "edit", prompt_dropout=0.0) == "[0]|make it red|<1>|eos+"
    assert written(record, "edit", prompt_dropout=1.0) == "[0]|reconstruct|<0>|eos+"
    last = dict(image_prompts="features_last")
    assert written(record, "edit", prompt_dropout=0.0, **last) == "make it red|[0]|<1>|eos+"
    assert written(record, "edit", prompt_dropout=1.0, **last) == "reconstruct|[0]|<0>|eos+"


def test_texts_come_first_only_in_turns_that_an_image_answers():
    turns = [
        Message("user", (0, "q", 1)),
        Message("assistant", (2,)),
        Message("user", ("r",)),
        Message("assistant", (3,)),
        Message("user", ("s", 4)),
        Message("assistant", ("t",)),
    ]
    record = Record("k", [PIXELS] * 5, messages=turns)
    last = dict(image_prompts="features_last")
    assert written(record, "conversation", **last) == "q|[0]|[1]|<2>|eos+|r|[2]|<3>|eos+|[3]|s|[4]|T|eos+"
    assert written(record, "conversation") == "[0]|q|[1]|<2>|eos+|[2]|r|<3>|eos+|[3]|s|[4]|T|eos+"
    settings = TaskSettings(**last)
    assert tasks.image_prompt([0, "a", 1], settings) == (Text("a"), ImageIn(0), ImageIn(1))
    assert tasks.user_prompt([0, "a", 1], settings) == (ImageIn(0), Text("a"), ImageIn(1))


def test_interleaved_documents_read_images_or_end_with_one():
    record = Record("k", [PIXELS] * 3, content=[0, "a", 1, "b", 2, "c"])
    assert written(record, "interleaved", 0) == "bos+|[0]|A|[1]|B|[2]|C|eos+"
    assert written(record, "interleaved", 1) == "bos+|[0]|A|[1]|B|<2>"


def test_interleaved_documents_predict_where_images_come():
    """[IMG] is predicted at every image, its codes at the generated one only (with the image targets of ILLUME)."""
    record = Record("k", [PIXELS] * 3, content=["a", 0, "b", 1, 2])
    layout = Layout(Vocabulary(TOKENIZER.num_rows, CODES), TOKENIZER, PATCHES)
    keep, codes = contents(record, 0)
    for variant, generated in ((0, 0), (1, keep[1].sum())):
        whole, texts = document(record, "interleaved", variant, image_targets=0.0)
        row = render(whole, texts, keep, codes, layout)
        is_start = (row.ids == layout.vocabulary.start) & (row.feature == IGNORED)
        assert is_start.sum() == (2 if variant else 3) and (row.weights[is_start] == 1).all()
        is_code = row.targets >= layout.vocabulary.first_code
        assert row.weights[is_code].sum() == generated
        assert (row.weights[row.ids < TOKENIZER.num_rows] == 1).all()  # texts, <s>, </s>


def test_a_prompt_of_a_document_is_laid_out_as_in_training():
    record = Record("k", [PIXELS] * 3, content=["a", 0, "b", 1, "c", 2])
    layout = Layout(Vocabulary(TOKENIZER.num_rows, CODES), TOKENIZER, PATCHES)
    keep, codes = contents(record, 0)
    prompt = (*tasks.interleaved_prompt(["a", 0, "b"]), ImageStart())
    start = render(prompt, (), keep, codes, layout)
    for variant in (0, 1):
        whole, texts = document(record, "interleaved", variant)
        found = render(whole, texts, keep, codes, layout)
        n = len(start.ids)
        assert found.ids[:n].tolist() == start.ids.tolist() and found.feature[:n].tolist() == start.feature.tolist()
    assert start.inputs == ((0, 0),) and not start.weights.any()


def test_every_caption_is_trained_and_every_question_asked():
    record = Record("k", [PIXELS], captions=list("abcde"), questions=[Question("q", "a"), Question("r", "b")])
    assert {written(record, "caption", variant) for variant in range(10)} == {f"[0]|{c}|eos+" for c in "ABCDE"}
    both = {written(record, "question", variant) for variant in range(20)}
    assert both == {"[0]|q|A|eos+|r|B|eos+", "[0]|r|B|eos+|q|A|eos+"}
    either = Record("k", [PIXELS], captions=["c"], questions=[Question("q", "yes"), Question("r", "no", "", True)])
    assert {written(either, "question", variant) for variant in range(20)} == {"[0]|q|YES|eos+", "[0]|r|NO|eos+"}
