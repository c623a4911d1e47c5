import dataclasses

import jax
import numpy as np
import pytest
from conftest import tiny

from unimm_jax.data import packing, pipeline
from unimm_jax.data.packing import Example, Layout, Plan, Records, RowSource, example_length
from unimm_jax.vocabulary import Vocabulary

EVERYTHING = (("caption", 0.3), ("question", 0.2), ("reconstruct", 0.1), ("text", 0.1), ("text_to_image", 0.3))


@pytest.fixture(scope="module")
def records(run):
    return Records(str(run / "records"))


@pytest.fixture(scope="module")
def layout():
    return Layout(length=96, slots=4, budget=16, weights=EVERYTHING)


@pytest.fixture(scope="module")
def vocabulary(records):
    return pipeline.vocabulary_of(records)


def test_planned_lengths_are_the_built_lengths(records, layout, vocabulary):
    source = RowSource(records, layout, vocabulary, 0, 100)
    tasks = set()
    for row in source.plan.pack(0):
        built = [source.build(e) for e in row]
        for example, tokens in zip(row, built, strict=True):
            assert len(tokens.ids) == packing.example_length(records, example, layout, vocabulary, 1)
            tasks.add(example.task)
        assert sum(len(t.ids) for t in built) <= layout.length
        assert sum(t.image is not None for t in built) <= layout.slots
    assert tasks == set(packing.TASKS)


def test_the_plan_is_a_function_of_seed_and_row(records, layout, vocabulary):
    a, b = (Plan(records, layout, vocabulary, 3) for _ in range(2))
    assert [a[i] for i in range(80)] == [b[i] for i in reversed(range(80))][::-1]
    assert [a[i] for i in range(10)] != [Plan(records, layout, vocabulary, 4)[i] for i in range(10)]
    rows = a.pack(0)
    assert sorted(e.record for row in rows for e in row) == list(range(len(records)))
    assert rows != a.pack(1)


def test_the_mixture_moves_over_the_passes(records, vocabulary):
    layout = Layout(96, 4, 16, (("caption", 1.0),), weights_end=(("text_to_image", 1.0),), passes=3)
    plan = Plan(records, layout, vocabulary, 0)
    shares = [np.mean([e.task == "caption" for e in plan.examples(epoch)]) for epoch in range(5)]
    assert shares[0] == 1 and 0.3 < shares[1] < 0.7 and shares[2:] == [0, 0, 0]


def test_rows_are_well_filled(records, layout, vocabulary):
    source = RowSource(records, layout, vocabulary, 0, 1000)
    count = len(source.plan.pack(0)) - 2  # the last rows of an epoch stay open
    fill = np.mean([(source[i]["segments"] > 0).mean() for i in range(count)])
    assert fill > 0.85


def test_rows_say_what_they_hold(records, layout, vocabulary):
    source = RowSource(records, layout, vocabulary, 0, 100)
    for index in range(10):
        row, examples = source[index], source.plan[index]
        for segment, example in enumerate(examples, 1):
            inside = row["segments"] == segment
            assert (row["positions"][inside] == np.arange(inside.sum())).all()
            assert row["weights"][np.flatnonzero(inside)[-1]] == 0  # nothing predicts across examples
            kept = min(int(records.kept[example.record]), layout.budget)
            reads = packing.reads_picture(example.task)
            assert (row["feature_index"][inside] >= 0).sum() == (kept if reads else 0)
        used = row["feature_index"][row["feature_index"] >= 0]
        assert len(set(used.tolist())) == len(used)
        for slot in set((used // layout.budget).tolist()):
            assert (used // layout.budget == slot).sum() == min(row["keep"][slot].sum(), layout.budget)


def test_packing_changes_no_examples_loss(run, records, vocabulary):
    from unimm_jax import objectives

    config = tiny("stage3", data__records=str(run / "records"), data__row_length=96, data__row_pictures=4)
    data = pipeline.open_input(config)
    objective = objectives.build(config, data)
    params = objective.init(jax.random.key(0))
    layout = Layout(length=96, slots=4, budget=16, weights=EVERYTHING)
    source = RowSource(records, layout, vocabulary, 0, 100)
    measure = jax.jit(objective.cross_entropy)
    header = records.header
    seen = 0
    for index in range(6):
        examples = [source.build(e) for e in source.plan[index]]
        packed = source[index]
        together = np.asarray(measure(params, {k: v[None] for k, v in packed.items()}))[0]
        for segment, example in enumerate(examples, 1):
            alone = packing.build_row([example], layout, header["image_size"], header["patches"])
            single = np.asarray(measure(params, {k: v[None] for k, v in alone.items()}))[0]
            weights = alone["weights"] > 0
            inside = np.flatnonzero(packed["segments"] == segment)
            n = len(example.ids)
            assert np.abs(together[inside] - single[:n])[weights[:n]].max(initial=0) < 1e-5
            seen += 1
    assert seen > 12


def test_records_are_complete_or_refused(tmp_path, records):
    with pytest.raises(ValueError, match="pretokenize"):
        Records(str(tmp_path))
    item = records[0]
    assert item["keep"].sum() == records.kept[0]
    assert records.image(0).shape == (64, 64, 3) and item["captions"]


def test_an_example_longer_than_a_row_is_cut_and_counted(records, vocabulary):
    layout = Layout(length=1000, slots=4, budget=16, weights=(("caption", 1.0),))
    bos = int(records.tokenizer.bos is not None)
    lengths = [example_length(records, Example(i, "caption", 0), layout, vocabulary, bos) for i in range(len(records))]
    short = dataclasses.replace(layout, length=int(np.median(lengths)))
    plan = Plan(records, short, vocabulary, 0)
    rows = plan.pack(0)
    assert plan.cut + sum(map(len, rows)) == len(records) and plan.cut > 0
    with pytest.raises(ValueError, match="no example fits"):
        Plan(records, Layout(length=3, slots=4, budget=16, weights=(("caption", 1.0),)), vocabulary, 0).pack(0)


def test_features_follow_the_ids_of_their_places():
    v = Vocabulary(100, 64, 16)
    ids, rows = v.place_features(np.array([3, 9]))
    assert ids.tolist() == [v.first_position + 3, v.start, v.first_position + 9, v.start]
    assert rows.tolist() == [-1, 0, -1, 1]
    ids, rows = Vocabulary(100, 64).place_features(np.array([3, 9]))
    assert ids.tolist() == [100, 100] and rows.tolist() == [0, 1]


def test_vocabulary_writes_and_reads_pictures():
    rng = np.random.default_rng(0)
    for patches in (0, 16):
        v = Vocabulary(100, 64, patches)
        keep = rng.random(16) < 0.5
        keep[3] = True
        codes = rng.integers(64, size=16)
        ids = v.write_image(np.flatnonzero(keep), codes[keep])
        assert (v.kinds()[ids] != 0).all() and ids.max() < v.size and v.visual_rows % 128 == 0
        found, kept = v.read_image(np.concatenate([[v.start], ids, [v.end, 5]]), 16)
        if patches:
            assert np.array_equal(kept, keep) and np.array_equal(found[keep], codes[keep])
        else:
            assert np.array_equal(found[: keep.sum()], codes[keep]) and kept.sum() == keep.sum()
    assert (Vocabulary(32000, 16384).start, Vocabulary(32000, 16384).first_code) == (32000, 32002)
