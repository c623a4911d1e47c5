"""The emoji edits: pairs of disjoint concepts in both directions, and the judge."""

import json

import numpy as np
from PIL import Image

from benchmarks import emoji_edits
from unimm_jax.data.sources import open_source

COLORS = np.random.default_rng(0).integers(0, 256, (20, 3)).astype(np.uint8)


def emoji(folder):
    rows = []
    for i in range(20):
        for style in ("google", "twitter"):
            file = folder / style / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), COLORS[i])).save(file)
            rows.append(dict(image=f"{style}/{i}.png", name=f"name {i}", style=style))
    rows.append(dict(image="google/0.png", name="of one style", style="google"))
    (folder / "emoji.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_pairs_are_written_in_both_directions_and_concepts_are_held_out(tmp_path):
    counts = emoji_edits.write(emoji(tmp_path / "emoji"), tmp_path / "out", 20, 0.2, 0)
    assert counts == {"train": 32, "test": 8}
    names = {}
    for split, count in counts.items():
        source = open_source(f"edit:{tmp_path / 'out' / split}", held_out=0.0)
        assert len(source) == count and len(source[0].images) == 2
        rows = [json.loads(line) for line in (tmp_path / "out" / split / "edits.jsonl").read_text().splitlines()]
        assert all(row["instruction"].endswith(row["target"].split("/")[0]) for row in rows)
        assert all(row["source"].split("/")[0] != row["target"].split("/")[0] for row in rows)
        names[split] = {row["source"].split("/")[1] for row in rows}
        captions = open_source(f"folder:{tmp_path / 'out' / split}", held_out=0.0)
        assert len(captions) == count and "name" in captions[0].captions[0]
    assert not names["train"] & names["test"]


def test_an_edit_is_right_if_it_is_nearest_to_its_own_target():
    targets = np.tile(COLORS[:, None, None], (1, 4, 4, 1))
    styles = ["a", "b"] * 10
    assert emoji_edits.matches(targets, targets, styles) == 1
    assert emoji_edits.matches(np.roll(targets, 2, 0), targets, styles) < 0.5  # 9 others are all that there are
    wrong = emoji_edits.matches(np.roll(targets, 2, 0)[:, :2], targets[:, :2], ["a"] * 20)
    assert wrong < 0.5


def test_a_style_is_right_if_the_result_is_nearer_to_the_target_than_to_the_source():
    targets, sources = np.full((4, 2, 2, 3), 200, np.uint8), np.full((4, 2, 2, 3), 100, np.uint8)
    made = np.stack([targets[0], sources[0], np.full((2, 2, 3), 160, np.uint8), np.full((2, 2, 3), 140, np.uint8)])
    assert emoji_edits.nearer(made, targets, sources) == 0.5


def test_the_grid_shows_each_edit_in_a_column():
    sources, made, targets = (np.full((20, 4, 4, 3), value, np.uint8) for value in (10, 20, 30))
    sources[19] = 11
    found = emoji_edits.grid([sources, made, targets], count=5, width=3)
    assert found.shape == (2 * 3 * 4, 3 * 4, 3)
    assert [found[4 * row, 0, 0] for row in range(6)] == [10, 20, 30] * 2
    assert found[12, 4, 0] == 11 and found[12, 8, 0] == 0  # the last one is shown, then nothing
