#!/usr/bin/env bash
# Installs what the tests need into .venv and passes them: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON_FOR_VENV=${PYTHON:-python3}
if [ ! -e .venv/installed-test ] || [ requirements.txt -nt .venv/installed-test ] || [ pyproject.toml -nt .venv/installed-test ]; then
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$PYTHON_FOR_VENV" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -e '.[test]'
  touch .venv/installed .venv/installed-test
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
