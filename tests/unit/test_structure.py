"""Rules of the code base: no import cycles, short functions, thin commands, UserError everywhere."""

import ast
import pathlib

from helpers import ROOT

PACKAGE = ROOT / "unimm_jax"
COMMANDS = (
    "main", "pretokenize", "generate", "evaluate", "export", "import_weights", "aot", "report", "inspect_data",
    "self_enhance", "replay", "preflight",
)  # fmt: skip
MODULES = {
    ".".join(("unimm_jax", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): f
    for f in sorted(PACKAGE.rglob("*.py"))
    if "configs" not in f.relative_to(PACKAGE).parts
}


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            source = node.module
            if node.level:
                assert name.endswith("_unimm") and node.level == 1, f"{name} has a relative import"  # files of exports
                source = f"{name.rpartition('.')[0]}.{source}"
            # `from package import module` imports the module; `from module import name` the module itself
            found |= {m if (m := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return {module for module in found if module in MODULES and module != name}


def test_modules_form_no_import_cycle():
    graph = {name: imports(name) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 60


def test_data_and_models_do_not_import_what_is_above_them():
    for name in MODULES:
        if name.startswith("unimm_jax.data"):
            source = MODULES[name].read_text()
            assert "import jax" not in source and "from jax" not in source, f"{name} imports JAX"
        if name.startswith("unimm_jax.models"):
            above = {m for m in imports(name) if not m.startswith("unimm_jax.models")}
            assert not above, f"{name} imports {above}"


def functions():
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_80_lines_but_train():
    long = {name: lines for name, lines in functions() if lines > 80}
    assert set(long) <= {"unimm_jax.train.train"}, long


def test_commands_are_thin_and_imported_by_nobody():
    for command in COMMANDS:
        file = PACKAGE / f"{command}.py"
        assert len(file.read_text().splitlines()) <= 120, f"{command} has over 120 lines"
        assert "def cli()" in file.read_text()
        users = [name for name in MODULES if f"unimm_jax.{command}" in imports(name)]
        assert not users, f"{command} is imported by {users}"


def test_user_errors_are_not_value_errors():
    """`raise ValueError` is for programming errors; functions that read a user's input raise UserError."""
    from unimm_jax import errors

    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)]
    assert len(kinds) > 8
    assert all(issubclass(kind, errors.UserError) and not issubclass(kind, ValueError) for kind in kinds)


def test_there_is_no_grab_bag():
    assert not [f for f in pathlib.Path(PACKAGE).rglob("*.py") if f.stem in ("utils", "util", "misc", "common")]
