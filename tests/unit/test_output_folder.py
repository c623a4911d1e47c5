"""Directories that appear when they are complete."""

import fcntl

import pytest

from unimm_jax.storage import output_folder


def test_a_directory_appears_when_it_is_complete(tmp_path):
    with output_folder(tmp_path / "new" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "new" / "out").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "other") as folder:
        (folder / "file").write_text("x")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(tmp_path):
    left, live, other = (
        tmp_path / f".{name}.partial.{'0a' * 15}{i:02}" for i, name in enumerate(("out", "out", "not"))
    )
    for folder in (left, live, other):
        folder.mkdir()
        (folder / "file").write_text("x")
        folder.with_name(f"{folder.name}.lock").touch()
    with live.with_name(f"{live.name}.lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with output_folder(tmp_path / "out"):
            pass
    assert not left.exists() and not left.with_name(f"{left.name}.lock").exists()
    assert all((folder / "file").exists() for folder in (live, other))
