"""Runs the code of docs/extending.md as a contributor would: files, registry lines, tests and commands of the page."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

PAGE = ROOT / "docs" / "extending.md"
FENCE = re.compile(r"`([\w/.]+)`:\n\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks():
    """(path of the file or of the registry, code) of every Python block that names one."""
    return [(path, code) for path, code in FENCE.findall(PAGE.read_text())]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project with everything that the page adds."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("unimm_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, code in _blocks():
        file = root / path.removeprefix("/my/")
        if file.exists():  # a registry
            text = file.read_text()
            assert text.count("REGISTRY = {\n") == 1, path
            code = text.replace("REGISTRY = {\n", "REGISTRY = {\n" + code)
        file.write_text(code)
    return root


def _run(root, *command):
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_has_the_files_that_it_announces():
    paths = [path for path, _ in _blocks()]
    registries = [path for path in paths if path.endswith(("__init__.py", "/tasks.py"))]
    tests = [path for path in paths if path.startswith("tests/unit/")]
    assert len(registries) == len(tests) == 5 and len(paths) == len(set(paths)) == 17


@pytest.mark.slow
def test_the_tests_of_the_page_pass(clone):
    tests = [path for path, _ in _blocks() if path.startswith("tests/unit/")]
    assert "6 passed" in _run(clone, "-m", "pytest", "-p", "no:cacheprovider", *tests)


@pytest.mark.slow
def test_the_stage_of_the_page_trains(clone, tmp_path):
    small = ["--config.train.steps=3", "--config.train.batch_size=8", "--config.data.sources=scenes:count=96"]
    workdir = tmp_path / "masked_pixels"
    out = _run(clone, "-m", "unimm_jax.main", "--config=masked_pixels:laptop", f"--workdir={workdir}", *small)
    assert "3/3" in out and "held_out" in out and (workdir / "done.json").exists()


@pytest.mark.slow
def test_the_config_of_the_page_is_complete(clone):
    out = _run(clone, "-m", "unimm_jax.main", f"--config={clone / 'stage2_short.py'}", "--print_config")
    assert "model.language.layers = 2" in out and "evals.scenes.prompts = 10" in out
