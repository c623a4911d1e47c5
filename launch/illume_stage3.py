"""Stage 3 of `launch/illume.sh`: scene versions of all kinds of documents that ILLUME fine-tunes on.

The shares of ILLUME's data are not published, apart from the assessments (50,000 of about 8 million examples seen).

Command: python -m unimm_jax.main --config=launch/illume_stage3.py:laptop-illume --workdir=runs/illume/stage3
At laptop-illume: 1,395 to 1,516 s on two cores of an AMD EPYC of family 25; one edit right 0.73, compositions 0.73
(medians of three seeds); all scores in docs/results.md.
"""

from configs import common, stage3

# source → weight and, for scenes, the shares of the tasks
MIXTURE = (
    dict(source="scenes", weight=0.22, tasks=dict(question=0.25, text_to_image=0.72, caption=0.03)),
    dict(source="scene_edits", weight=0.42),
    dict(source="scene_compositions", weight=0.07),
    dict(source="scene_stories", weight=0.02),
    dict(source="scenes:count=6000,seed=1,size=192,scale=0.35,jitter=0.333", weight=0.20, tasks=dict(question=1.0)),
    dict(source="chat", weight=0.07),  # assessments of own images
)


def get_config(size=None):
    """Config of stage 3 with this mixture."""
    c = stage3.get_config(size or "laptop-illume")
    c.train.update(steps=11_050, batch_size=19)  # fills 6 rows (96%)
    c.data.update(mixture=MIXTURE, records="../records_stage3")
    # half of the large images are read in slices (10 images of 16 features), half as a whole
    c.data.update(max_slices=9, global_view_share=0.5, seq_len=256, images_per_row=12)
    c.init_from = (common.start_from("questions"),)
    return c
