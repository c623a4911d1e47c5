"""The chat template of exports: a template of `unimm_jax.data.tasks` as Jinja, and conversations that check it."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax.data.documents import Document, ImageStart, Layout, render
from unimm_jax.data.outlines import Message, Part
from unimm_jax.data.tasks import Spoken, TaskSettings, Template, converse, edit_prompt, image_prompt

# The values of the first four statements come from a `Template`. The template writes one JSON list per segment and
# line, because `render` tokenizes each text on its own: tokens of the joined text would differ where texts meet.
_JINJA = """\
{%%- set bos = %(bos)s -%%}
{%%- set system = %(system)s -%%}
{%%- set before = %(before)s -%%}
{%%- set after = %(after)s -%%}
{%%- if as_segments is not defined -%%}
  {{- raise_exception("each text of a chat is tokenized on its own; use the apply_chat_template of the processor:\
 AutoProcessor.from_pretrained(DIR, trust_remote_code=True)") -}}
{%%- endif -%%}
{%%- macro segment(values) -%%}
  {{- (values | tojson) ~ "\\n" -}}
{%%- endmacro -%%}
{%%- set generated = namespace(count=0) -%%}
{%%- set turns = messages | list -%%}
{%%- if system and turns[0].role != "system" -%%}
  {%%- set turns = [{"role": "system", "content": system}] + turns -%%}
{%%- endif -%%}
{%%- if bos -%%}
  {{- segment(["bos"]) -}}
{%%- endif -%%}
{%%- for turn in turns -%%}
  {%%- if turn.role not in ["system", "user", "assistant"] -%%}
    {{- raise_exception("a message has the role " ~ turn.role ~ "; roles are system, user, assistant") -}}
  {%%- endif -%%}
  {%%- if turn.role in before -%%}
    {{- segment(["markup", before[turn.role]]) -}}
  {%%- endif -%%}
  {%%- set last = generated_images is defined and generated_images == "last" and turn.role == "user" -%%}
  {%%- if not last -%%}
    {%%- for _ in range(generated.count) -%%}
      {{- segment(["image"]) -}}
    {%%- endfor -%%}
    {%%- set generated.count = 0 -%%}
  {%%- endif -%%}
  {%%- for part in ([{"type": "text", "text": turn.content}] if turn.content is string else turn.content) -%%}
    {%%- if part.type == "text" -%%}
      {{- segment(["text", part.text]) -}}
    {%%- elif part.type == "image" and turn.role != "assistant" -%%}
      {%%- if last -%%}
        {%%- set generated.count = generated.count + 1 -%%}
      {%%- else -%%}
        {{- segment(["image"]) -}}
      {%%- endif -%%}
    {%%- elif part.type == "image" and generated_images is defined -%%}
      {{- segment(["image_out"]) -}}
      {%%- set generated.count = generated.count + 1 -%%}
    {%%- else -%%}
      {{- raise_exception("a message of the role " ~ turn.role ~ " has content of the type " ~ part.type ~ "; the\
 content is text, or text and image for system and user") -}}
    {%%- endif -%%}
  {%%- endfor -%%}
  {%%- if last -%%}
    {%%- for _ in range(generated.count) -%%}
      {{- segment(["image"]) -}}
    {%%- endfor -%%}
    {%%- set generated.count = 0 -%%}
  {%%- endif -%%}
  {%%- if turn.role == "assistant" -%%}
    {{- segment(["eos"]) -}}
  {%%- endif -%%}
  {%%- if turn.role in after -%%}
    {{- segment(["markup", after[turn.role]]) -}}
  {%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt and turns[-1].role == "user" and "assistant" in before -%%}
  {{- segment(["markup", before["assistant"]]) -}}
{%%- endif -%%}
"""


def to_jinja(template: Template) -> str:
    """A template as a Jinja chat template of transformers, for the processor of the export."""
    values = {
        "bos": "true" if template.bos else "false",
        "system": json.dumps(template.system),
        "before": json.dumps({role: text for role, text in template.before.items() if text}),
        "after": json.dumps({role: text for role, text in template.after.items() if text}),
    }
    return _JINJA % values


def to_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation in the format of transformers, images without pixels."""

    def part(content: str | int) -> dict[str, str]:
        return {"type": "text", "text": content} if isinstance(content, str) else {"type": "image"}

    return [{"role": message.role, "content": [part(content) for content in message.content]} for message in messages]


def to_document(messages: Sequence[Message], settings: TaskSettings) -> Document:
    """The document of a conversation, which ends with the text before the assistant's turn if a user speaks last."""
    turns = [
        Spoken(message.role, [x if isinstance(x, str) else Part(True, x) for x in message.content])
        for message in messages
    ]
    return converse(turns, settings)


# images, turns, system messages, texts that look like tokens or like the lines that the template writes
EXAMPLES = (
    (Message("user", (0, "how many circles are there?")),),
    (Message("user", ("a red circle",)),),
    (Message("user", (0, "and ", 1, 2, " what differs?")),),
    (
        Message("system", ("Answer briefly.",)),
        Message("user", (0, "is there a cross?")),
        Message("assistant", ("no",)),
        Message("user", ("and in this image?", 1)),
    ),
    (Message("user", ("one",)), Message("assistant", ("yes",)), Message("user", ("two\n\nthree",))),
    (Message("user", (0, "is there a star?")), Message("assistant", ("yes", " indeed"))),
    (Message("user", ('<image> [IMG] [/IMG] <code_0> <place_0> ["image"]\n["image"]\n\u2028\x1e "quoted" \\n',)),),
    (Message("user", ("ends with a space ", 0, " starts with one", "", "é 好 🙂")),),
)


# prompts for images: texts and images, and the instructions of edits
IMAGE_PROMPTS: tuple[tuple[str | int, ...], ...] = ((0, "and a red circle"), (0, 1), (0, " with ", 1), ("a cross",))
EDITS = (("make it red",), ("make it red", "remove the square", "add a star"))


def expected_image_prompts(
    keep: np.ndarray, codes: np.ndarray, layout: Layout, settings: TaskSettings
) -> list[list[int]]:
    """Token ids of each of `IMAGE_PROMPTS`, then of each of `EDITS`, up to [IMG].

    Args:
      keep: keep masks of the images in order, boolean [N, P]. codes: their codes, int32 [N, P].
    """
    documents = [image_prompt(parts, settings) for parts in IMAGE_PROMPTS]
    documents += [edit_prompt(instructions, settings) for instructions in EDITS]
    return [render((*d, ImageStart()), (), keep, codes, layout).ids.tolist() for d in documents]


def expected_ids(keep: np.ndarray, layout: Layout, settings: TaskSettings) -> list[list[int]]:
    """Token ids of each of `EXAMPLES`, whose images have the keep masks boolean [N, P] in order."""
    no_codes = np.zeros(keep.shape, np.int32)
    return [render(to_document(m, settings), (), keep, no_codes, layout).ids.tolist() for m in EXAMPLES]
