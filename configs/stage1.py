"""Stage 1, visual embedding initialization: captions, conversations and image reconstruction (ILLUME §4, Table 5).

Published sizes train the adapter (learning rate 1e-3) and the visual rows of the embedding and the head (2e-4) for
5,000 steps with batch size 256.

Command: python -m unimm_jax.main --config=configs/stage1.py:laptop --workdir=runs/stage1
At laptop: 47 to 48 s on two cores of an AMD EPYC of family 25; held-out caption cross-entropy 0.08.
At published sizes: planned for a TPU pod; not trained here.
"""

from configs import common

SIZES = {
    "7b": dict(steps=5000, batch_size=256),
    "one_gpu": dict(steps=2000, batch_size=576),
    "laptop": dict(steps=150, batch_size=72),
    "laptop-illume": dict(steps=150, batch_size=30),
    "colab": dict(steps=300, batch_size=144),
}


def get_config(size=None):
    """Config of stage 1.

    Raises:
      ConfigError: LaVIT's own recipe, which has no such stage.
    """
    common.refuse_lavit("stage1", size)
    c = common.language_stage("stage1", size)
    c.train.update(common.of_size(c.size, SIZES))
    c.data.images_per_row = 5 if common.from_nothing(c.size) else 8
    c.data.tasks = dict(caption=0.5, conversation=0.5, reconstruct=0.5)
    c.optimizer.learning_rate = common.of_size(c.size, {"7b": 2e-4, "one_gpu": 1e-3, "laptop": 4e-3, "colab": 2e-3})
    c.init_from = (common.start_from_tokenizer(c.size), common.start_from("text"))
    return c
