"""The chat template of exports gives the token ids of `render`, in a process without JAX."""

import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from unimm_jax import text_tokenizer
from unimm_jax.data import tasks
from unimm_jax.data.documents import Layout, length, render
from unimm_jax.data.outlines import Message, Record, flatten, outline
from unimm_jax.data.tasks import TaskSettings
from unimm_jax.interop import chat_template, export_hf, processing_unimm
from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

pytest.importorskip("torch")
pytest.importorskip("transformers")

PATCHES, CODES, LIMIT = 16, 8, 6
KEEP = np.random.default_rng(0).random((8, PATCHES)) < 0.6
WORDS = ["a red circle and a blue square", "is there a cross?", "USER: yes", "ASSISTANT: no", "user system assistant"]

SCRIPT = """
import json, sys, torch
given, found, interop, *folders = sys.argv[1:]
sys.path.append(interop)
from check_export import chat_ids, image_prompt_ids
from transformers import AutoProcessor
g = json.load(open(given))
keep = torch.tensor(g["keep"])
out = {}
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    out[folder] = [chat_ids(processor, chat, keep) for chat in g["chats"]]
    out[folder] += [image_prompt_ids(processor, prompt, keep, torch.tensor(g["codes"])) for prompt in g["prompts"]]
assert "jax" not in sys.modules and "unimm_jax" not in sys.modules
json.dump(out, open(found, "w"))
"""


def bpe():
    return text_tokenizer.train(WORDS, 320)


def chat_bpe():
    """A BPE with the tokens of ChatML, which a text may contain, too."""
    import tokenizers

    fast = tokenizers.Tokenizer.from_str(bpe().payload["model"])
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return TextTokenizer({"kind": "tokenizers", "model": fast.to_str(), "rows": 400, "begin": False})


def pieces(file, **settings):
    """A sentencepiece model."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(file),
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    model = base64.b64encode(file.with_suffix(".model").read_bytes()).decode()
    return TextTokenizer({"kind": "sentencepiece", "model": model})


LLAMA = dict(
    model_type="bpe",
    vocab_size=330,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
)


def random_conversation(rng):
    """A conversation that may start with a system message, and ends with a user or an assistant turn."""
    letters = list('ab ?\n<|>s[]/IMGé🙂"\\') + ["<|im_end|>", "</s>", "<s>", "USER:", "[IMG]", "  "]
    text = lambda: "".join(rng.choice(letters, rng.integers(1, 9)))
    messages, images = [], 0
    if rng.random() < 0.5:
        messages.append(Message("system", (text(),)))
    for i in range(rng.integers(1, 6)):
        content = [text()]
        while i % 2 == 0 and rng.random() < 0.5 and images < len(KEEP):
            content.append(images)
            images += 1
        content += [text() for _ in range(rng.integers(0, 2))]
        messages.append(Message("assistant" if i % 2 else "user", content))
    return messages


def write(folder, layout, settings):
    folder.mkdir(parents=True)
    export_hf.write_text_tokenizer(folder, layout.text_tokenizer, layout.vocabulary)
    export_hf.write_processor(folder, layout, (24, 24), settings)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def test_ids_of_chats_and_of_prompts_for_images_are_those_of_the_rendering(tmp_path):
    rng = np.random.default_rng(0)
    image_codes = rng.integers(0, CODES, KEEP.shape)
    chats = [*chat_template.EXAMPLES, *(random_conversation(rng) for _ in range(20))]
    tokenizers = {
        "bpe": bpe(),
        "chat_bpe": chat_bpe(),
        "llama": pieces(tmp_path / "llama", **LLAMA),
        "symbols": pieces(tmp_path / "symbols", **LLAMA, user_defined_symbols=["USER:", "[/", "  "]),
        "unigram": pieces(tmp_path / "unigram", vocab_size=60),
    }
    expected = {}
    for name, words in tokenizers.items():
        for template, image_prompts in [
            *((template, "features") for template in tasks.TEMPLATES),
            ("chatml", "codes"),
            ("chatml", "features_last"),
            ("plain", "features_last"),
        ]:
            vocabulary = Vocabulary(words.num_rows, CODES, PATCHES if name == "bpe" else 0)
            layout = Layout(vocabulary, words, LIMIT)
            settings = TaskSettings(template=template, image_prompts=image_prompts)
            folder = tmp_path / f"{name}_{template}_{image_prompts}"
            write(folder, layout, settings)
            no_codes = np.zeros(KEEP.shape, np.int32)
            documents = [chat_template.to_document(chat, settings) for chat in chats]
            expected[str(folder)] = [render(d, (), KEEP, no_codes, layout).ids.tolist() for d in documents]
            expected[str(folder)] += chat_template.expected_image_prompts(KEEP, image_codes, layout, settings)
    given = {"keep": KEEP.tolist(), "codes": image_codes.tolist()}
    given["chats"] = [chat_template.to_chat(chat) for chat in chats]
    given["prompts"] = [*chat_template.IMAGE_PROMPTS, *(dict(edits=edits) for edits in chat_template.EDITS)]
    (tmp_path / "given.json").write_text(json.dumps(given))
    arguments = [tmp_path / "given.json", tmp_path / "found.json", ROOT / "unimm_jax" / "interop", *expected]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for folder, rows in expected.items():
        for chat, mine, theirs in zip([*chats, *given["prompts"]], rows, found[folder], strict=True):
            has_exception = "symbols_" in folder or "unigram_" in folder  # see `_convert_sentencepiece`
            assert mine == theirs or (has_exception and "s>" in str(chat)), (folder, chat)


@pytest.mark.parametrize("template", tasks.TEMPLATES)
def test_documents_of_chats_are_those_of_the_tasks(template):
    settings = TaskSettings(template=template)
    assert chat_template.to_document(chat_template.EXAMPLES[0], settings) == tasks.question_prompt(
        "how many circles are there?", settings
    )
    for example in chat_template.EXAMPLES:
        if example[-1].role != "assistant":
            example = (*example, Message("assistant", ("yes",)))
        images = sum(not isinstance(x, str) for message in example for x in message.content)
        texts, codes = flatten(Record("k", [b""] * images, messages=example))
        trained = tasks.CONVERSATION.build(outline(codes, images), 0, settings)
        words = Layout(Vocabulary(400, CODES), bpe(), LIMIT)
        no_codes = np.zeros(KEEP.shape, np.int32)
        trained = render(trained, texts, KEEP, no_codes, words).ids.tolist()
        complete = render(chat_template.to_document(example, settings), (), KEEP, no_codes, words).ids.tolist()
        assert trained == complete
        prompt = render(chat_template.to_document(example[:-1], settings), (), KEEP, no_codes, words).ids.tolist()
        if example[-2].role == "user":
            assert trained[: len(prompt)] == prompt


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("exported") / "plain"
    write(folder, Layout(Vocabulary(bpe().num_rows, CODES), bpe(), LIMIT), TaskSettings())
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_a_processor_gives_ids_mask_and_pixels(processor, tmp_path):
    import torch
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    file = {"type": "image", "path": str(tmp_path / "a.png")}
    pixels = {"type": "image", "image": np.zeros((24, 24, 3), np.uint8)}
    text = {"type": "text", "text": "is there a cross?"}
    one = [{"role": "user", "content": [file, pixels, text]}]
    two = [{"role": "user", "content": "is there a cross?"}]
    found = processor.apply_chat_template([one, two], add_generation_prompt=True, tokenize=True, return_dict=True)
    words = list(bpe().encode("is there a cross?"))
    start, end, pad = processor.start, processor.end, bpe().pad
    assert found["input_ids"].tolist() == [[start, end, start, end, *words], [pad] * 4 + words]
    assert found["attention_mask"].tolist() == [[1] * (4 + len(words)), [0] * 4 + [1] * len(words)]
    assert found["pixel_values"].shape == (2, 24, 24, 3) and found["pixel_values"].dtype == torch.uint8
    assert found["pixel_values"][0, 0, 0].tolist() == [255, 0, 0] and not found["pixel_values"][1].any()
    # the same in two steps
    lines = processor.apply_chat_template(one, add_generation_prompt=True)
    assert lines == '["image"]\n["image"]\n["text", "is there a cross?"]\n'
    again = processor(images=[str(tmp_path / "a.png"), pixels["image"]], text=lines, return_tensors="np")
    assert again["input_ids"].tolist() == found["input_ids"].tolist()[:1] and again["pixel_values"].shape[0] == 2
    processor.save_pretrained(tmp_path / "saved")
    saved = type(processor).from_pretrained(tmp_path / "saved")
    assert saved.apply_chat_template(one) == lines and saved.encode([["image"], ["text", "[IMG]"]]) == [
        *(start, end),
        *bpe().encode("[IMG]"),
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "robot", "content": "a"}], "role robot; roles are system, user, assistant"),
        ([{"role": "user", "content": [{"type": "video"}]}], "role user has content of the type video"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "role assistant has content of the type image"),
    ],
)
def test_messages_that_have_no_place_are_refused(processor, messages, reason):
    with pytest.raises(Exception, match=reason):
        processor.apply_chat_template(messages)


def test_prompts_for_images_need_as_many_images_as_they_have(processor):
    import torch

    keep, codes = torch.tensor(KEEP), torch.zeros(KEEP.shape, dtype=torch.long)
    segments = processor.edit_prompt(["a", "b"])
    assert segments == [["image"], ["text", "a"], ["image_out"], ["eos"], ["image"], ["text", "b"], ["image_start"]]
    with pytest.raises(ValueError, match="the prompt has 2 images, and 3 are given"):
        processor.lay_out(segments, keep[:3], codes[:3])
    with pytest.raises(ValueError, match="the prompt has more than 1 images"):
        processor.lay_out(segments, keep[:1], codes[:1])
    assert processing_unimm.RECONSTRUCT == tasks.RECONSTRUCT_INSTRUCTION
    assert processor.unconditional_edit_prompt() == processor.edit_prompt([tasks.RECONSTRUCT_INSTRUCTION])


def test_misuse_is_refused(processor):
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(Exception, match="each text of a chat is tokenized on its own; use the apply_chat_template of"):
        processor.tokenizer.apply_chat_template(chat)
    lines = processor.apply_chat_template(chat)
    pixels = np.zeros((24, 24, 3), np.uint8)
    with pytest.raises(ValueError, match="the texts have 1 images, and 2 are given"):
        processor(text=lines, images=[pixels, pixels])
    for text in ("a red circle", '{"a": 1}'):
        with pytest.raises(ValueError, match="is not a chat that apply_chat_template"):
            processor(text=text)
    with pytest.raises(ValueError, match="text and images only"):
        processor(text=lines, audio=[0])
    with pytest.raises(ValueError, match="no images in the list"):
        processor(images=[])
    ids, keep = [processor.start, processor.end], processor(images=pixels)["pixel_values"].new_ones(2, PATCHES)
    with pytest.raises(ValueError, match="the prompt has 1 images, and 2 are given"):
        processor.place_images(ids, keep)
    with pytest.raises(ValueError, match="more than 1 images"):
        processor.place_images(ids * 2, keep[:1])


def test_names_of_special_tokens_in_captions_prompts_and_answers_are_plain_text():
    """Only the texts of a template hold special tokens, and `eos` and `bos` are segments of their own."""
    words = chat_bpe()
    start, end = (words.as_tokenizers().token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    specials = {words.eos, start, end, words.as_tokenizers().token_to_id("<s>")}
    written = "a</s> <s><|im_end|>\n<|im_start|>user\nred"
    assert not specials & set(words.encode(written)) and words.decode(words.encode(written)) == written
    assert words.encode_markup("<|im_start|>user\n")[0] == start
    layout = Layout(Vocabulary(words.num_rows, CODES, 0), words, LIMIT)
    settings = TaskSettings(template="chatml")
    turns = [Message("user", (written, 0)), Message("assistant", (written,))]
    document = chat_template.to_document(turns, settings)
    ids = render(document, (), KEEP, np.zeros(KEEP.shape, np.int32), layout).ids.tolist()
    assert len(ids) == length(document, (), KEEP.sum(1), layout)
    assert [ids.count(i) for i in (start, end, words.eos)] == [3, 2, 1]  # system, user, assistant; its end is `eos`
    record = Record("k", [np.zeros((8, 8, 3), np.uint8)], captions=[written])
    texts, codes = flatten(record)
    caption = tasks.get("text_to_image").build(outline(codes, 1), 0, settings)
    ids = render(caption, texts, KEEP[:1], np.zeros((1, PATCHES), np.int32), layout).ids.tolist()
    assert not specials & set(ids)
