#!/usr/bin/env bash
# Trains ILLUME's schedule from scratch on scenes: pairs, then edits, compositions, stories, questions about large images
# in slices, and assessments of the model's own images. Writes runs/illume/report.html.
#
#   bash launch/illume.sh
#
# Environment variables: RUN (output directory), SEED, PYTHON (for a new .venv) and EXTRAS (extras of the package to
# install). After an interruption, run the same command again: it resumes. When everything is done, it prints the scores
# only.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/illume} SIZE=laptop-illume SEED=${SEED:-0}
. launch/common.sh

# large images whose objects are small, and in the middle of the encoder's patches, where it has seen objects
LARGE="scenes:count=6000,seed=1,size=192,scale=0.35,jitter=0.333"
MORE="scene_edits:count=12000,turns=3;scene_compositions:count=6000;scene_stories:count=4000;$LARGE"
records() { # records DIRECTORY SOURCES OPTION...: tokenizes the sources
  step "$RUN/$1" -m unimm_jax.pretokenize --image_tokenizer="$RUN/tokenizer" --output="$RUN/$1" --sources="$2" "${@:3}"
}
train encoder
train tokenizer
records records "scenes;$MORE"
train pixel_decoder
for stage in text stage1 stage2; do
  train "$stage" --config.data.mixture="({'source': 'scenes'},)"
done
# images from prompts with images, before the model was trained on any: LaVIT's zero-shot prompts
step "$RUN/evaluation_stage2" -m unimm_jax.evaluate --checkpoint="$RUN/stage2" --output="$RUN/evaluation_stage2" \
  --evals=compositions --image_prompts=codes
# the model draws for training captions, and learns from what is right and wrong in its images
enhance() { step "$RUN/$1" -m unimm_jax.self_enhance "${@:2}"; }
enhance drawings generate --checkpoint="$RUN/stage2" --records="$RUN/records" --output="$RUN/drawings" \
  --share=0.35 --source=scenes
enhance drawings/verdicts assess --drawings="$RUN/drawings" --judge=scenes
enhance assessments build --drawings="$RUN/drawings" --records="$RUN/records" --output="$RUN/assessments" --max_bad_share=0.6
records records_stage3 "scenes;$MORE;chat:$RUN/assessments/documents.jsonl" --reuse="$RUN/records"
for stage in questions stage3; do
  step "$RUN/$stage" -m unimm_jax.main --config="launch/illume_$stage.py:$SIZE" --workdir="$RUN/$stage" --config.seed="$SEED"
done
step "$RUN/evaluation" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/evaluation" \
  --evals=scenes,edits,compositions,stories,small_objects,assessments --small_jitter=0.333
# objects that lie across patches, too
step "$RUN/evaluation_across" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/evaluation_across" \
  --evals=small_objects
report
