"""Stage 2, unified image-text alignment (ILLUME §4, Table 5; LaVIT §3.2).

Captions, text to image and text; conversations, edits and interleaved documents where the records have them.

ILLUME's schedule (`7b`, `illume-7b`) trains the language model and the adapter, and with LaVIT's connector also its
merger, at learning rate 5e-5 for 15,000 steps with 1,024 examples each. `lavit-7b` is LaVIT's single stage: it starts
from the image tokenizer and LLaMA, with two texts for each image-text pair, learning rate 1e-5 for the language model
and 1e-4 for merger and adapter; its optimizer, batch and steps are those of Video-LaVIT, because LaVIT's are not known.

Command: python -m unimm_jax.main --config=configs/stage2.py:laptop --workdir=runs/stage2
At laptop: 114 to 123 s on two cores of an AMD EPYC of family 25; held-out code cross-entropy 2.19.
At published sizes: planned for a TPU pod; not trained here.
"""

from configs import common

SIZES = {
    "7b": dict(steps=15_000, batch_size=1024),
    "lavit-7b": dict(steps=30_000, batch_size=2048),
    "one_gpu": dict(steps=8000, batch_size=640),
    "laptop": dict(steps=700, batch_size=80),
    "laptop-illume": dict(steps=2500, batch_size=36),
    "colab": dict(steps=1400, batch_size=160),
}


def get_config(size=None):
    """Config of stage 2."""
    c = common.language_stage("stage2", size)
    c.train.update(common.of_size(c.size, SIZES))
    c.data.tasks = dict(caption=0.35, text_to_image=0.55, text=0.1, **common.OTHER_TASKS)
    c.optimizer.learning_rate = common.of_size(c.size, {"7b": 5e-5, "one_gpu": 1e-3, "laptop": 4e-3, "colab": 2e-3})
    if common.from_nothing(c.size):
        c.optimizer.schedule = "constant"  # stage 3 continues at the same rate and decays
    c.init_from = (common.start_from("stage1"),)
    if c.size == "lavit-7b":
        pairs = 93 + 100  # millions of [image, text] and [text, image] pairs
        c.data.tasks.update(text=2 / 3, caption=93 / pairs / 3, text_to_image=100 / pairs / 3)
        c.data.image_prompts = "codes"
        c.optimizer.update(learning_rate=1e-5, warmup=2000 / 30_000, weight_decay=0.1, eps=1e-6)
        c.init_from = (common.start_from_tokenizer(c.size), common.start_from("text"))
    return c
