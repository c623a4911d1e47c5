import dataclasses
import types

import jax
import numpy as np
import pytest
from helpers import opened, with_records
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm_jax.data import outlines, packing, pipeline
from unimm_jax.data.documents import Layout
from unimm_jax.data.packing import Example, PackingConfig, SourceShare, build_example, example_size
from unimm_jax.data.pipeline import PackedRows
from unimm_jax.data.plan import Plan, Turns, deal, pack, permuted
from unimm_jax.data.records import Ragged, Records
from unimm_jax.errors import ConfigError, DataError, UserError
from unimm_jax.vocabulary import Vocabulary

EVERYTHING = (("caption", 0.3), ("question", 0.2), ("reconstruct", 0.1), ("text", 0.1), ("text_to_image", 0.3))
SCENE_TASKS = {name for name, _ in EVERYTHING}
CONFIG = PackingConfig(batch=16, seq_len=96, images_per_row=4, max_image_tokens=16, weights=EVERYTHING, image_size=64)
CAPTIONS = dataclasses.replace(CONFIG, weights=(("caption", 1.0),))


@pytest.fixture(scope="module")
def records(run):
    return Records(str(run / "records"))


@pytest.fixture(scope="module")
def layout(records):
    return Layout(pipeline.vocabulary_of(records.header, records.text_tokenizer), records.text_tokenizer, 16)


def examples_of(plan, steps):
    return [example for step in range(steps) for row in plan.rows(step) for example in row]


# ---- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 96, 1000, 4096, 70_000])
def test_a_permutation_has_every_number_once(count):
    found = permuted(np.arange(count), count, [3, 1])
    assert sorted(found) == list(range(count))
    some = np.arange(count)[:: max(count // 7, 1)]
    assert (permuted(some, count, [3, 1]) == found[some]).all()
    if count > 90:
        other = permuted(np.arange(count), count, [3, 2])
        assert (found == other).mean() < 0.1 and (found == np.arange(count)).mean() < 0.1
        assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 0.3


def test_the_plan_is_a_function_of_seed_and_step(records, layout):
    a, b = (Plan(records, CONFIG, layout, 3) for _ in range(2))
    assert [a.rows(i) for i in range(20)] == [b.rows(i) for i in reversed(range(20))][::-1]
    assert [a.rows(i) for i in range(3)] != [Plan(records, CONFIG, layout, 4).rows(i) for i in range(3)]
    assert a.window == 96 // 16
    for number in range(3):  # each pass has every record once, in another order
        steps = range(number * a.window, (number + 1) * a.window)
        found = [e.record for step in steps for row in a.rows(step) for e in row]
        assert sorted(found) == list(range(len(records)))
    assert examples_of(a, 6) != [e for step in range(6, 12) for row in a.rows(step) for e in row]


def test_every_step_has_its_number_of_examples(records, layout):
    for batch in (1, 7, 16, 96, 250):
        plan = Plan(records, dataclasses.replace(CONFIG, batch=batch), layout, 0, steps=8)
        assert all(sum(map(len, plan.rows(step))) == plan.batch == batch for step in range(8))
        assert max(len(plan.rows(step)) for step in range(8)) == plan.rows_per_step
        assert all(all(row) for step in range(8) for row in plan.rows(step))


def test_steps_have_nearly_equal_numbers_of_tokens(records, layout):
    plan = Plan(records, CONFIG, layout, 0, steps=12)
    totals = []
    for step in range(plan.window):
        totals.append(sum(example_size(records, e, CONFIG, layout)[0] for row in plan.rows(step) for e in row))
    lengths = plan.first_window().drawn.tokens
    assert max(totals) - min(totals) < lengths.max() and len(set(lengths)) > 5


def test_a_batch_in_tokens_has_that_many_on_average(records, layout):
    plan = Plan(records, dataclasses.replace(CONFIG, batch=600, batch_unit="tokens"), layout, 0, steps=40)
    tokens = [example_size(records, e, CONFIG, layout)[0] for e in examples_of(plan, 40)]
    assert abs(sum(tokens) / 40 / 600 - 1) < 0.05
    assert len({sum(map(len, plan.rows(step))) for step in range(40)}) == 1


def test_the_mixture_moves_over_the_passes(records, layout):
    config = dataclasses.replace(CAPTIONS, weights_end=(("text_to_image", 1.0),), epochs=3)
    plan = Plan(records, config, layout, 0, steps=30)
    shares = []
    for number in range(5):
        found = [e for step in range(6 * number, 6 * number + 6) for row in plan.rows(step) for e in row]
        shares.append(np.mean([e.task == "caption" for e in found]))
    assert shares[0] == 1 and 0.4 < shares[1] < 0.6 and shares[2:] == [0, 0, 0]


# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_planned_lengths_are_the_built_lengths(records, layout):
    plan, tasks = Plan(records, CONFIG, layout, 0), set()
    for step in range(plan.window):
        for row in plan.rows(step):
            built = [build_example(records, e, CONFIG, layout) for e in row]
            for example, tokens in zip(row, built, strict=True):
                assert len(tokens.tokens.ids) == example_size(records, example, CONFIG, layout)[0]
                tasks.add(example.task)
            assert sum(len(t.tokens.ids) for t in built) <= CONFIG.seq_len
            assert sum(len(t.images) for t in built) <= CONFIG.images_per_row
    assert tasks == SCENE_TASKS


def test_rows_are_well_filled(records, layout):
    plan = Plan(records, dataclasses.replace(CONFIG, batch=48), layout, 0, steps=100)
    tokens = [example_size(records, e, CONFIG, layout)[0] for e in examples_of(plan, 100)]
    assert sum(tokens) / (100 * plan.rows_per_step * CONFIG.seq_len) > 0.85


def test_rows_are_padded_to_a_multiple(records, layout):
    rows = PackedRows(Plan(records, CONFIG, layout, 0, steps=6), 6)
    needed = rows.size(0, 1)
    assert needed == max(len(rows.plan.rows(step)) for step in range(6))
    assert rows.size(0, 8) % 8 == 0 and 0 <= rows.size(0, 8) - needed < 8
    padding = rows.row(0, rows.size(0, 8) - 1)
    assert not padding["segments"].any() and not padding["weights"].any()


def test_a_step_that_needs_more_rows_gets_them(records, layout):
    rows = PackedRows(Plan(records, CONFIG, layout, 0), 6)
    rows.plan.rows_per_step = 1  # as if the survey had seen smaller steps only
    assert rows.size(0, 1) == len(rows.plan.rows(0)) > 1
    counts = [rows.row(0, row)["segments"].max() for row in range(rows.size(0, 1))]
    assert sum(counts) == CONFIG.batch


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(50, 80),
    st.integers(3, 6),
)
@settings(max_examples=200, deadline=None)
def test_packing_keeps_the_limits(sizes, seq_len, images_per_row):
    tokens, images = (np.array(column) for column in zip(*sizes, strict=True))
    row_of = pack(tokens, images, seq_len, images_per_row)
    assert set(row_of) == set(range(row_of.max() + 1))
    assert np.bincount(row_of, tokens).max() <= seq_len and np.bincount(row_of, images).max() <= images_per_row


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_dealing_gives_every_example_to_one_step(lengths, steps):
    tokens = np.array(lengths * steps)
    found = deal(tokens, steps, np.random.default_rng(0))
    assert found.shape == (steps, len(lengths)) and sorted(found.ravel()) == list(range(len(tokens)))
    totals = tokens[found].sum(1)
    assert totals.max() - totals.min() <= max(lengths)


def test_rows_say_what_they_hold(records, layout):
    rows = PackedRows(Plan(records, CONFIG, layout, 0), 10)
    for step in range(4):
        for index, examples in enumerate(rows.plan.rows(step)):
            row = rows.row(step, index)
            for segment, example in enumerate(examples, 1):
                inside = row["segments"] == segment
                assert (row["positions"][inside] == np.arange(inside.sum())).all()
                assert row["weights"][np.flatnonzero(inside)[-1]] == 0  # nothing predicts across examples
                kept = min(int(records.kept[example.record][0]), CONFIG.max_image_tokens)
                reads = packing.example_size(records, example, CONFIG, layout)[1]
                assert (row["feature_index"][inside] >= 0).sum() == kept * reads
            used = row["feature_index"][row["feature_index"] >= 0]
            assert len(set(used.tolist())) == len(used)
            for slot in set((used // CONFIG.max_image_tokens).tolist()):
                assert (used // CONFIG.max_image_tokens == slot).sum() == min(
                    row["keep"][slot].sum(), CONFIG.max_image_tokens
                )


def test_packing_changes_no_examples_loss(run, records, layout):
    _, objective = opened(with_records("stage3", run, data__seq_len=96, data__images_per_row=4))
    params = objective.init(jax.random.key(0))
    source = PackedRows(Plan(records, CONFIG, layout, 0), 10)
    measure = jax.jit(objective.cross_entropy)
    header = records.header
    seen = 0
    for place in [(step, row) for step in range(2) for row in range(len(source.plan.rows(step)))]:
        examples = [build_example(records, e, CONFIG, layout) for e in source.plan.rows(place[0])[place[1]]]
        packed = source.row(*place)
        together = np.asarray(measure(params, {k: v[None] for k, v in packed.items()}))[0]
        for segment, example in enumerate(examples, 1):
            alone = packing.build_row([example], CONFIG, header["num_patches"])
            single = np.asarray(measure(params, {k: v[None] for k, v in alone.items()}))[0]
            weights = alone["weights"] > 0
            inside = np.flatnonzero(packed["segments"] == segment)
            n = len(example.tokens.ids)
            assert np.abs(together[inside] - single[:n])[weights[:n]].max(initial=0) < 1e-5
            seen += 1
    assert seen > 12


def test_only_images_that_are_read_in_slices_are_cut(monkeypatch, layout):
    cut = []

    class Stored:
        def __getitem__(self, index):
            return types.SimpleNamespace(texts=[], keep=[np.ones(16, bool)] * 2, codes=[])

        def views(self, index, image, side, most, rule):
            cut.append((image, most))
            return ["whole", "slice"]

    inputs = [(0, 0), (0, 1), (1, 0)]
    monkeypatch.setattr(packing, "document_of", lambda *_: ())
    monkeypatch.setattr(packing, "render", lambda *_: types.SimpleNamespace(inputs=inputs))
    config = dataclasses.replace(CONFIG, max_slices=9)
    built = build_example(Stored(), Example(0, "edit", 0), config, layout)
    assert sorted(cut) == [(0, 9), (1, 0)] and built.images == ["whole", "slice", "whole"]


def test_records_are_complete_or_refused(tmp_path, records):
    with pytest.raises(DataError, match="pretokenize"):
        Records(str(tmp_path))
    item = records[0]
    assert item.keep[0].sum() == records.kept[0][0]
    assert records.image(0).shape == (64, 64, 3) and item.texts


def test_an_example_longer_than_a_row_is_replaced_and_counted(records, layout):
    lengths = [example_size(records, Example(i, "caption", 0), CAPTIONS, layout)[0] for i in range(len(records))]
    short = dataclasses.replace(CAPTIONS, seq_len=int(np.median(lengths)))
    plan = Plan(records, short, layout, 0, steps=6)
    assert list(plan.replaced) == [f"longer than {short.seq_len} tokens"] and plan.surveyed == 96
    assert "examples were replaced by others: longer than" in plan.notes()[1]
    assert plan.step(0).replaced_share == sum(plan.replaced.values()) / 96 > 0
    assert all(sum(map(len, plan.rows(step))) == 16 for step in range(6))
    assert all(example_size(records, e, short, layout)[0] <= short.seq_len for e in examples_of(plan, 6))
    with pytest.raises(
        UserError, match=r"no example of the records fits a row of 3 tokens .*96 × longer than 3 tokens"
    ):
        Plan(records, dataclasses.replace(CAPTIONS, seq_len=3), layout, 0)


def test_features_follow_the_ids_of_their_places():
    v = Vocabulary(100, 64, 16)
    ids, rows = v.place_features(np.array([3, 9]))
    assert ids.tolist() == [v.first_position + 3, v.start, v.first_position + 9, v.start]
    assert rows.tolist() == [-1, 0, -1, 1]
    ids, rows = Vocabulary(100, 64).place_features(np.array([3, 9]))
    assert ids.tolist() == [100, 100] and rows.tolist() == [0, 1]


def test_vocabulary_writes_and_reads_images():
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


class Synthetic:
    """Records of several sources, with a caption each; those of source `texts` have a text only."""

    path, header = "memory", dict(sources="a;b;c")

    def __init__(self, sizes, texts=-1):
        self.source = np.repeat(np.arange(len(sizes)), sizes)
        count = len(self.source)
        codes = np.where(self.source == texts, outlines.TEXT, outlines.CAPTION).astype(np.uint8)
        lengths = np.random.default_rng(0).integers(5, 40, count)
        self.outlines, self.texts, self.kept = (
            Ragged(values, np.arange(count + 1)) for values in (codes, lengths, np.full(count, 5))
        )

    def __len__(self):
        return len(self.source)

    def outline(self, index):
        return outlines.outline(self.outlines[index].tobytes(), 1)


class Tokenizer:
    bos = None


SYNTHETIC = Layout(Vocabulary(100, 64), Tokenizer(), 16)


def test_a_mixture_has_the_shares_of_its_weights():
    records = Synthetic((3000, 6000, 1000))
    tasks = (("caption", 0.5), ("text_to_image", 0.5))
    sources = (SourceShare(0, 3.0), SourceShare(1, 1.0, (("text", 0.2), ("caption", 0.8))), SourceShare(2, 1.0))
    plan = Plan(records, PackingConfig(100, 96, 4, 16, tasks, sources=sources), SYNTHETIC, 0, steps=200)
    drawn = examples_of(plan, 200)
    assert len(drawn) == 20_000
    source = records.source[[example.record for example in drawn]]
    for number, share in enumerate((0.6, 0.2, 0.2)):
        assert abs((source == number).mean() - share) < 0.001
    task = np.array([example.task for example in drawn])
    for number, name, share in ((0, "caption", 0.5), (1, "text", 0.2), (1, "text_to_image", 0.0), (2, "caption", 0.5)):
        assert abs((task[source == number] == name).mean() - share) < 0.01
    # no record is read again before all others of its source were
    visits = np.bincount([example.record for example in drawn], minlength=len(records))
    for mine in (visits[:3000], visits[3000:9000], visits[9000:]):
        assert mine.max() - mine.min() <= 1


@pytest.mark.parametrize(
    "weights", [[1.0], [3.0, 1.0, 1.0], [1e-9, 5.0], [5.0, 1e-9], [5.0, 1e-9, 5.0], [1.0] * 32, list(range(1, 20))]
)
def test_sources_take_turns(weights):
    turns, places = Turns(weights), np.arange(200_000)
    sources, ranks = turns.of(places)
    assert set(sources) == set(range(len(weights)))
    shares = np.array(weights) / sum(weights)
    for i, share in enumerate(shares):
        assert (ranks[sources == i] == np.arange((sources == i).sum())).all()
        for start in (0, 777, 150_001):
            found = (sources[start : start + 20_000] == i).mean()
            assert abs(found - share) < 0.001
    assert (turns.of(places[5:9])[1] == ranks[5:9]).all()


def test_replacements_come_from_the_same_source():
    records, tasks = Synthetic((300, 100)), (("caption", 1.0),)
    records.texts.values[:290] = 500  # of the first source, 10 records are left
    sources = (SourceShare(0, 1.0), SourceShare(1, 1.0))
    plan = Plan(records, PackingConfig(30, 96, 4, 16, tasks, sources=sources), SYNTHETIC, 0, steps=10)
    drawn = [example.record for example in examples_of(plan, 10)]
    assert len(drawn) == 300 and np.mean(records.source[drawn] == 0) == pytest.approx(0.5, abs=0.02)
    assert set(drawn) & set(range(300)) <= set(range(290, 300))
    assert plan.step(0).replaced_share == pytest.approx(0.5, abs=0.1)
    records.texts.values[:300] = 500
    with pytest.raises(DataError, match=r"no example of the source 'a' fits a row .* × longer than 96 tokens"):
        Plan(records, PackingConfig(30, 96, 4, 16, tasks, sources=sources), SYNTHETIC, 0)


def test_a_source_without_a_task_is_an_error_or_left_out():
    records = Synthetic((300, 100), texts=1)
    sources = (SourceShare(0, 1.0), SourceShare(1, 1.0, (("text", 0.0), ("caption", 1.0))))
    config = PackingConfig(30, 96, 4, 16, (("caption", 1.0),), sources=sources)
    with pytest.raises(DataError, match="applies to any record of the source 'b'"):
        Plan(records, config, SYNTHETIC, 0)
    plan = Plan(records, config, SYNTHETIC, 0, steps=10, skip_empty=True)
    assert set(records.source[[example.record for example in examples_of(plan, 10)]]) == {0}
    alone = dataclasses.replace(config, sources=sources[:1])
    assert list(Plan(records, alone, SYNTHETIC, 0).unused) == ["config.data.mixture does not name their source"]


def test_records_without_a_task_are_never_drawn():
    records = Synthetic((300, 100), texts=1)
    plan = Plan(records, PackingConfig(30, 96, 4, 16, (("caption", 1.0),)), SYNTHETIC, 0, steps=10)
    assert plan.unused == {"no task of config.data.tasks applies": 100}
    assert "100 of 400 records are never read: no task" in plan.notes()[1] and not plan.replaced
    assert sorted(example.record for example in examples_of(plan, 10)) == list(range(300))
    with pytest.raises(DataError, match="no task of config.data.tasks applies to any record of the records"):
        Plan(records, PackingConfig(30, 96, 4, 16, (("edit", 1.0),)), SYNTHETIC, 0)


def test_a_mixture_names_sources_of_the_records(run):
    with pytest.raises(ConfigError, match="names the source 'folder:/x'; the records .* come from scenes:count=96"):
        pipeline.packed_input(with_records("stage2", run, data__mixture=(dict(source="folder:/x"),)))
    with pytest.raises(ConfigError, match=r"mixture\[0\] has no setting 'wieght'; did you mean 'weight'"):
        with_records("stage2", run, data__mixture=(dict(source="scenes", wieght=2.0),))
    with pytest.raises(ConfigError, match=r"mixture\[0\].weight is 0.0; it must be a positive number"):
        with_records("stage2", run, data__mixture=(dict(source="scenes", weight=0.0),))
    only = (dict(source="scenes:count=96", tasks=dict(text=1.0)),)
    plan = pipeline.packed_input(with_records("stage2", run, data__mixture=only)).rows.plan
    assert {example.task for example in examples_of(plan, 3)} == {"text"}
