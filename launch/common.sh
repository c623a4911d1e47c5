# shellcheck shell=bash
# Shared by the scripts that train all stages. They set RUN, SIZE and SEED, and read this file at the root of the clone.
# Installs the requirements into .venv (PYTHON names the Python of a new one), and the extras of pyproject.toml that EXTRAS
# names, such as cuda13.
if [[ $RUN == *://* ]]; then
  echo "error: RUN is $RUN; give a local directory. Stages on an object store: python -m unimm_jax.main --workdir=gs://..." >&2
  exit 1
fi
PYTHON_FOR_VENV=${PYTHON:-python3}
INSTALLED=.venv/installed${EXTRAS:+-$EXTRAS}
if [ ! -e "$INSTALLED" ] || [ requirements.txt -nt "$INSTALLED" ]; then
  "$PYTHON_FOR_VENV" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed (set PYTHON=...)"; exit 1; }
  echo "installing requirements into .venv"
  # an interrupted venv has Python without pip
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$PYTHON_FOR_VENV" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt ${EXTRAS:+-e ".[$EXTRAS]"}
  touch "$INSTALLED"
fi

mkdir -p "$RUN"
COMMANDS=$RUN/commands.txt
: > "$COMMANDS.new"

step() { # step DIRECTORY COMMAND...: runs the command unless the directory is done
  local done=$1/done.json; shift
  { printf python; printf ' %q' "$@"; echo; } >> "$COMMANDS.new"
  [ -e "$done" ] || .venv/bin/python "$@"
}

train() { # train STAGE OPTION...: trains a stage in its directory
  step "$RUN/$1" -m unimm_jax.main --config="configs/$1.py:$SIZE" --workdir="$RUN/$1" --config.seed="$SEED" "${@:2}"
}

report() { # writes report.html and scores.json, and prints the scores
  mv "$COMMANDS.new" "$COMMANDS"
  .venv/bin/python -m unimm_jax.report --run="$RUN"
}
