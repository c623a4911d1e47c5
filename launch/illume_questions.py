"""The stage between 2 and 3 of `launch/illume.sh`: questions, before edits and assessments join them.

Some answers, such as whether an object exists, are learned late and suddenly: by size `laptop-illume` after about
130,000 questions, in two of three seeds. Stage 3 spends most of its steps on other documents, so without this stage it
has too few questions (docs/experiments.md, "Small objects and slices"). ILLUME has no such stage.

Command: python -m unimm_jax.main --config=launch/illume_questions.py:laptop-illume --workdir=runs/illume/questions
At laptop-illume: 748 to 848 s on two cores of an AMD EPYC of family 25.
"""

from configs import stage3

# source → weight and shares of the tasks
MIXTURE = (
    dict(source="scenes", weight=0.78, tasks=dict(question=0.9, text_to_image=0.07, caption=0.03)),
    dict(source="scenes:count=6000,seed=1,size=192,scale=0.35,jitter=0.333", weight=0.22, tasks=dict(question=1.0)),
)


def get_config(size=None):
    """Config of stage 3 with this mixture."""
    c = stage3.get_config(size or "laptop-illume")
    c.train.update(steps=3_900, batch_size=43)  # fills 10 rows (96%)
    c.data.mixture = MIXTURE
    # half of the large images are read in slices, as in stage 3
    c.data.update(max_slices=9, global_view_share=0.5, seq_len=256, images_per_row=12)
    return c
