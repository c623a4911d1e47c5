"""launch/colab.ipynb: its structure and its commands; with -m slow, all of it on a CPU."""

import base64
import importlib
import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import types

import jax
import nbformat
import numpy as np
import pytest
from absl import flags
from helpers import ROOT
from PIL import Image

from unimm_jax import process, resolve
from unimm_jax.errors import UserError

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
STAGES = ("encoder", "selector", "tokenizer", "pixel_decoder", "text", "stage1", "stage2", "stage3")
MOST_SECONDS = 20 * 60  # for all cells
OPTIONAL = "optional"  # tag of the cell that installs PyTorch


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_optional(cell):
    return OPTIONAL in cell.metadata.get("tags", ())


def python_of(source):
    """The source of a cell as plain Python: a line with ! calls `shell` with its command, %cd is left out."""
    source = source.replace("\\\n", "")
    source = re.sub(r"(?m)^( *)!(.*)$", r"\1_exit_code = shell(f'''\2''')", source)
    return re.sub(r"(?m)^%cd .*$", "", source)


def fake_display(monkeypatch):
    """A stand-in for IPython.display whose `display` collects what it is given; returns the list."""
    shown = []
    module = types.SimpleNamespace(Image=lambda *a, **k: (a, k), display=lambda *a: shown.extend(a))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def commands(monkeypatch, on_tpu=False, **more):
    """The commands that the notebook runs, in order. Its Python runs, its commands do not."""
    found, glob = [], pathlib.Path.glob

    def files(path, pattern):
        return glob(path, pattern) if str(path) != "/dev" else [path / "accel0"] if on_tpu else []

    fake_display(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "glob", files)
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("PATH", "/bin")
        patch.chdir(NOTEBOOK.parent)
        names = dict(shell=lambda line: found.append(line) or 0) | more
        for cell in code_cells(nbformat.read(NOTEBOOK, 4)):
            lines = python_of(cell.source)
            if is_optional(cell):  # opens the result of a command
                lines = "\n".join(line for line in lines.splitlines() if "shell(" in line)
            exec(compile(lines, cell.id, "exec"), names)
    return [shlex.split(line) for line in found]


def parse(monkeypatch, module, *given):
    """Parses the flags of a command as it does itself.

    Raises:
      flags.Error: unknown or missing flags. UserError: an invalid config.
    """
    known = set(flags.FLAGS)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *given])
        patch.setattr(process, "prepare", lambda: None)
        patch.setattr(process, "app", lambda command: None)
        try:
            importlib.import_module(module).cli()
            flags.FLAGS(sys.argv)
            if any(word.startswith("--config=") for word in given):
                if "config" not in flags.FLAGS:
                    raise UserError(f"no config in {given}")
                resolve.parse(flags.FLAGS["config"].value)
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()


def test_the_notebook_is_valid_and_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z]+(-text)?", id) for id in ids), "ids are words"
    for text, code in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert code.cell_type == "markdown" or text.cell_type == "markdown", f"no text above {code.id}"
    assert [cell.id for cell in code_cells(notebook) if is_optional(cell)] == ["transformers"]
    text = NOTEBOOK.read_text()
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n", "not one line per line of text"


@pytest.mark.parametrize("on_tpu", [False, True])
def test_all_commands_of_the_notebook_exist(monkeypatch, on_tpu):
    found = commands(monkeypatch, on_tpu)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    trained = []
    for words in found:
        assert words[:2] == ["python", "-m"], words
        if words[2] == "pip":
            assert words[-2] == "-e" and set(re.findall(r"\[(\w+)\]", words[-1])) <= set(extras)
            continue
        parse(monkeypatch, *words[2:])
        if words[2] == "unimm_jax.main":
            trained.append(re.search(r"configs/(\w+)\.py:(\w+)", " ".join(words)).groups())
            assert any(word.startswith("--config.train.steps=") for word in words) != on_tpu
    size = "colab" if on_tpu else "laptop"
    assert trained == [(stage, size) for stage in (*STAGES, "stage3")]  # stage 3 again, to resume
    assert {words[2].removeprefix("unimm_jax.") for words in found} == {
        "pip", "preflight", "main", "pretokenize", "generate", "evaluate", "export",
    }  # fmt: skip
    assert ("--platform=tpu" in sum(found, [])) == on_tpu
    assert (".[tpu]" in sum(found, [])) == on_tpu


@pytest.mark.parametrize(
    "line, error",
    [
        ("generate --checkpoint=x --promt=y", flags.Error),
        ("evaluate --output=x", flags.Error),  # no --checkpoint
        ("main --config=stage3:colab --config.train.stepz=3 --workdir=x", UserError),
        ("preflight --config=stage3:nowhere --workdir=x", UserError),
    ],
)
def test_a_command_that_does_not_exist_would_be_found(monkeypatch, line, error):
    module, *given = line.split()
    with pytest.raises(error):
        parse(monkeypatch, f"unimm_jax.{module}", *given)


def test_another_version_of_jax_restarts_the_notebook(monkeypatch):
    restarts = []
    kernel = types.SimpleNamespace(do_shutdown=lambda restart: restarts.append(restart))
    commands(monkeypatch, get_ipython=lambda: types.SimpleNamespace(kernel=kernel))
    assert not restarts
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    commands(monkeypatch, get_ipython=lambda: types.SimpleNamespace(kernel=kernel))
    assert restarts == [True]


def test_a_failed_command_stops_the_notebook(monkeypatch):
    with pytest.raises(AssertionError, match="the command above failed"):
        commands(monkeypatch, shell=lambda line: int("preflight" in line))


# ---- All of it -------------------------------------------------------------------------------------------------------


def png_images(cell):
    """The PNG images among the outputs of a cell, as arrays."""
    data = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item))).convert("RGB")) for item in data]


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream").replace("\r\n", "\n")


def new_kernel(folder):
    """A virtual environment that holds Jupyter's kernel and nothing else, and the kernel's specification."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "ipykernel"], check=True)
    spec = folder / "jupyter" / "kernels" / "new"
    spec.mkdir(parents=True)
    line = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps(dict(argv=line, display_name="new", language="python")))
    return python


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_notebook_trains_draws_and_answers_on_a_cpu(tmp_path, monkeypatch):
    """In a copy of the checkout and a new virtual environment, so that the notebook installs the project.

    Needs: pip install nbclient ipykernel. From its first cell to its last it may take 20 minutes on two free cores.
    Command: python -m pytest -m slow tests/integration/test_notebook.py
    """
    from nbclient import NotebookClient

    ignored = shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", "__pycache__", "*.egg-info")
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    python = new_kernel(tmp_path)
    has_jax = [python, "-c", "import jax"]
    assert subprocess.run(has_jax, capture_output=True).returncode
    for name in ("XLA_FLAGS", "UNIMM_TRACEBACK", "PYTHONPATH"):  # settings of the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(checkout / "launch" / "colab.ipynb", 4)
    optional = next(cell for cell in notebook.cells if is_optional(cell))
    notebook.cells.remove(optional)
    where = {"metadata": {"path": str(checkout / "launch")}}
    client = NotebookClient(notebook, timeout=3600, kernel_name="new", resources=where)
    began = time.monotonic()
    try:
        client.execute()
    finally:
        nbformat.write(notebook, tmp_path / "executed.ipynb")
    assert (seconds := time.monotonic() - began) < MOST_SECONDS
    print(f"the notebook took {seconds:.0f} s")
    subprocess.run(has_jax, check=True)
    cells = {cell.id: cell for cell in notebook.cells}
    for name, count in dict(kept=1, reconstruction=1, draw=4, questions=1, evaluate=1).items():
        found = png_images(cells[name])
        assert len(found) == count, f"{len(found)} images in {name}"
        assert all(image.std() > 3 for image in found), f"an image of {name} is blank"
    answers = dict(re.findall(r"question: (.*)\n(.*)", text_of(cells["questions"])))
    assert len(answers) == 3 and all(re.search("[a-z]{3}", answer) for answer in answers.values()), answers
    assert "text to image" in text_of(cells["evaluate"])
    workdir = checkout / "runs" / "notebook" / "stage3"
    assert len(list((workdir / "checkpoints").glob("[0-9]*"))) == 1, "the finished stage trained again"

    shown = fake_display(monkeypatch)  # the export, in this process, which has PyTorch
    names = dict(RUN=str(workdir.parent), PROMPT="a red circle", shell=lambda line: 0, check=lambda: None)
    exec(compile(python_of(optional.source), optional.id, "exec"), names | dict(display=lambda *a: shown.extend(a)))
    assert np.asarray(shown[0]).shape == (128, 128, 3)
