#!/usr/bin/env bash
# Trains the whole schedule from nothing, evaluates it and writes runs/quickstart/report.html.
#
#   bash launch/quickstart.sh                      embedded scenes, size laptop
#   SOURCES=/my/pictures RUN=runs/mine bash launch/quickstart.sh     a folder of pictures with .txt captions
#
# RUN, SIZE, SEED and SOURCES may be set. Run again after an interruption it goes on; run again when done it prints the
# table only.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/quickstart} SIZE=${SIZE:-laptop} SEED=${SEED:-0} SOURCES=${SOURCES:-scenes}
PYTHON_FOR_VENV=${PYTHON:-python3}

if [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
  "$PYTHON_FOR_VENV" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed (set PYTHON=...)"; exit 1; }
  echo "installing requirements into .venv"
  [ -x .venv/bin/python ] || "$PYTHON_FOR_VENV" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  touch .venv/installed
fi

mkdir -p "$RUN"
COMMANDS=$RUN/commands.txt
: > "$COMMANDS.new"
step() { # step DIRECTORY COMMAND...: runs the command unless the directory is done
  local done=$1/done.json; shift
  echo "python $*" >> "$COMMANDS.new"
  [ -e "$done" ] || .venv/bin/python "$@"
}
train() { step "$RUN/$1" -m unimm_jax.main --config="configs/$1.py:$SIZE" --workdir="$RUN/$1" --config.seed="$SEED" "${@:2}"; }

# Real pictures hold more than scenes do: own sources keep half of the patches and get more words and longer rows.
OWN_SELECTOR=() OWN_RECORDS=() OWN_ROWS=()
if [ "${SOURCES%%:*}" != scenes ]; then
  OWN_SELECTOR=("--config.loss.rate=(1.0, 0.7, 0.7, 0.5)") OWN_RECORDS=(--text_size=2048)
  OWN_ROWS=(--config.data.row_length=128 --config.train.batch_size=8)
fi
train encoder --config.data.sources="$SOURCES"
train selector --config.data.sources="$SOURCES" "${OWN_SELECTOR[@]}"
train tokenizer --config.data.sources="$SOURCES"
step "$RUN/records" -m unimm_jax.pretokenize --tokenizer="$RUN/tokenizer" --output="$RUN/records" "${OWN_RECORDS[@]}"
train pixel_decoder
train detokenizer
for stage in text stage1 stage2 stage3; do train "$stage" "${OWN_ROWS[@]}"; done
step "$RUN/evaluation" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/evaluation"
if [ "${SOURCES%%:*}" = scenes ]; then
  step "$RUN/evaluation_free" -m unimm_jax.evaluate --checkpoint="$RUN/stage3" --output="$RUN/evaluation_free" --jitter=9
fi
mv "$COMMANDS.new" "$COMMANDS"
.venv/bin/python -m unimm_jax.report --run="$RUN"
