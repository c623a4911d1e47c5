"""Stage 3, supervised fine-tuning (ILLUME §4, Table 5).

Questions, text to image and captions; conversations, edits and interleaved documents where the records have them.

Published sizes train everything but the image tokenizer for 8,000 steps with batch size 1,024: the encoder at learning
rate 2e-6, the rest at 2e-5.

Command: python -m unimm_jax.main --config=configs/stage3.py:laptop --workdir=runs/stage3
At laptop: 528 to 687 s on two cores of an AMD EPYC of family 25; scores in docs/results.md.
At published sizes: planned for a TPU pod; not trained here.
"""

from configs import common

SIZES = {
    "7b": dict(steps=8000, batch_size=1024),
    "one_gpu": dict(steps=8000, batch_size=320),
    "laptop": dict(steps=4200, batch_size=40),
    "laptop-illume": dict(steps=8000, batch_size=28),
    "colab": dict(steps=6000, batch_size=80),
}


def get_config(size=None):
    """Config of stage 3.

    Raises:
      ConfigError: LaVIT's own recipe, which has no such stage.
    """
    common.refuse_lavit("stage3", size)
    c = common.language_stage("stage3", size)
    small = common.from_nothing(c.size)
    c.train.update(common.of_size(c.size, SIZES))
    c.data.tasks = dict(question=0.6, text_to_image=0.35, caption=0.05, **common.OTHER_TASKS)
    if small:
        # Answers that need a match (existence, color, shape) are learned late and suddenly: more questions first.
        c.data.tasks.update(question=0.8, text_to_image=0.15)
        c.data.tasks_end = c.data.tasks.to_dict() | dict(question=0.6, text_to_image=0.35)
        c.data.tasks_epochs = common.of_size(c.size, {"7b": 100, "laptop": 15, "colab": 40})
        if c.size == "laptop-illume":  # an image is 16 codes, which take longer to learn than the answers
            c.data.tasks.update(question=0.75, text_to_image=0.2)
            c.data.tasks_end.update(question=0.5, text_to_image=0.45)
            c.data.tasks_epochs = 22
        c.data.code_targets = 0.5  # at full weight the many codes outweigh the answers
    c.data.image_targets = 0.0  # fine-tuning masks image positions, as Video-LaVIT's does
    c.optimizer.learning_rate = common.of_size(c.size, {"7b": 2e-5, "one_gpu": 1e-3, "laptop": 4e-3, "colab": 2e-3})
    c.optimizer.warmup = 0.01 if small else 0.03
    if c.size == "illume-7b":  # the whole image and 9 slices are 2,580 tokens
        c.data.update(max_slices=9, seq_len=4096, images_per_row=16)
    c.init_from = (common.start_from("stage2"),)
    return c
