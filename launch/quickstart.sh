#!/usr/bin/env bash
# Trains all stages from scratch, evaluates the model and writes runs/quickstart/report.html.
#
#   bash launch/quickstart.sh                                       embedded scenes, size laptop
#   SOURCES=/my/images RUN=runs/mine bash launch/quickstart.sh      a directory of images with .txt captions
#   QUESTIONS=llava:/my/train.json TEST_QUESTIONS=llava:/my/test.json SOURCES=... RUN=... bash launch/quickstart.sh
#                                                                   also learns to answer; scored on the test questions
#   QUESTIONS=edit:/my/edits SOURCES=... RUN=... bash launch/quickstart.sh
#                                                                   also learns to edit
#
# Environment variables: RUN (output directory), SIZE, SEED, SOURCES, QUESTIONS, TEST_QUESTIONS, UNET=1 (also trains the
# U-Net decoder, which is too small to draw objects at size laptop), PYTHON (for a new .venv) and EXTRAS (cuda13 on a GPU).
# After an interruption, run the same command again: it resumes. When everything is done, it prints the scores only.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/quickstart} SIZE=${SIZE:-laptop} SEED=${SEED:-0} SOURCES=${SOURCES:-scenes} UNET=${UNET:-0}
QUESTIONS=${QUESTIONS:-} TEST_QUESTIONS=${TEST_QUESTIONS:-}
. launch/common.sh

# Photos and drawings hold more than scenes do: own sources keep half of the patches, and get more text tokens and
# longer rows.
OWN_SELECTOR=() OWN_RECORDS=() OWN_ROWS=()
if [ "${SOURCES%%:*}" != scenes ] || [ -n "$QUESTIONS" ]; then
  # laptop-lavit keeps LaVIT's constant rate
  if [ "$SIZE" != laptop-lavit ]; then OWN_SELECTOR=("--config.loss.keep_rate=(1.0, 0.7, 0.7, 0.5)"); fi
  OWN_RECORDS=(--text_vocab_size=2048)
  OWN_ROWS=(--config.data.seq_len=128 --config.data.batch_unit=tokens --config.train.batch_size=960)
fi
if [ -n "$QUESTIONS" ]; then OWN_RECORDS+=(--sources="$SOURCES;$QUESTIONS"); fi
train encoder --config.data.sources="$SOURCES"
# ILLUME's image tokenizer keeps all patches
if [[ "$SIZE" != *illume* ]]; then train selector --config.data.sources="$SOURCES" "${OWN_SELECTOR[@]}"; fi
train tokenizer --config.data.sources="$SOURCES"
step "$RUN/records" -m unimm_jax.pretokenize --image_tokenizer="$RUN/tokenizer" --output="$RUN/records" "${OWN_RECORDS[@]}"
train pixel_decoder
if [ "$UNET" = 1 ]; then train unet_decoder; fi
for stage in text stage1 stage2 stage3; do train "$stage" "${OWN_ROWS[@]}"; done
step "$RUN/evaluation" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/evaluation"
answers() { step "$RUN/$1" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/$1" --evals=answers "${@:2}"; }
# edits have no answers to score
if [ -n "$QUESTIONS" ] && [[ "$QUESTIONS" != edit:* ]]; then answers evaluation_train --sources="$QUESTIONS" --split=train; fi
if [ -n "$TEST_QUESTIONS" ]; then answers evaluation_test --sources="$TEST_QUESTIONS" --split=all; fi
if [ "${SOURCES%%:*}" = scenes ]; then
  step "$RUN/evaluation_free" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/evaluation_free" --jitter=9
fi
report
