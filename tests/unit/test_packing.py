import dataclasses

import jax
import numpy as np
import pytest
from helpers import opened, with_records

from unimm_jax.data import packing, pipeline
from unimm_jax.data.documents import Layout
from unimm_jax.data.outlines import Outline
from unimm_jax.data.packing import Example, PackingConfig, Plan, RowSource, SourceShare, example_size
from unimm_jax.data.records import Records
from unimm_jax.errors import ConfigError, DataError, UserError
from unimm_jax.vocabulary import Vocabulary

EVERYTHING = (("caption", 0.3), ("question", 0.2), ("reconstruct", 0.1), ("text", 0.1), ("text_to_image", 0.3))
SCENE_TASKS = {name for name, _ in EVERYTHING}


@pytest.fixture(scope="module")
def records(run):
    return Records(str(run / "records"))


@pytest.fixture(scope="module")
def config():
    return PackingConfig(seq_len=96, images_per_row=4, max_image_tokens=16, weights=EVERYTHING)


@pytest.fixture(scope="module")
def layout(records):
    return Layout(pipeline.vocabulary_of(records.header, records.text_tokenizer), records.text_tokenizer, 16)


def test_planned_lengths_are_the_built_lengths(records, config, layout):
    source = RowSource(records, config, layout, 0, 100)
    tasks = set()
    for row in source.plan.pack(0):
        built = [source.build(e) for e in row]
        for example, tokens in zip(row, built, strict=True):
            assert len(tokens.tokens.ids) == packing.example_size(records, example, config, layout)[0]
            tasks.add(example.task)
        assert sum(len(t.tokens.ids) for t in built) <= config.seq_len
        assert sum(len(t.images) for t in built) <= config.images_per_row
    assert tasks == SCENE_TASKS


def test_the_plan_is_a_function_of_seed_and_row(records, config, layout):
    a, b = (Plan(records, config, layout, 3) for _ in range(2))
    assert [a[i] for i in range(80)] == [b[i] for i in reversed(range(80))][::-1]
    assert [a[i] for i in range(10)] != [Plan(records, config, layout, 4)[i] for i in range(10)]
    rows = a.pack(0)
    assert sorted(e.record for row in rows for e in row) == list(range(len(records)))
    assert rows != a.pack(1)


def test_the_mixture_moves_over_the_passes(records, layout):
    config = PackingConfig(96, 4, 16, (("caption", 1.0),), weights_end=(("text_to_image", 1.0),), epochs=3)
    plan = Plan(records, config, layout, 0)
    shares = [np.mean([e.task == "caption" for e in plan.examples(epoch)]) for epoch in range(5)]
    assert shares[0] == 1 and 0.3 < shares[1] < 0.7 and shares[2:] == [0, 0, 0]


def test_rows_are_well_filled(records, config, layout):
    source = RowSource(records, config, layout, 0, 1000)
    count = len(source.plan.pack(0)) - 2  # the last rows of an epoch stay open
    fill = np.mean([(source[i]["segments"] > 0).mean() for i in range(count)])
    assert fill > 0.85


def test_rows_say_what_they_hold(records, config, layout):
    source = RowSource(records, config, layout, 0, 100)
    for index in range(10):
        row, examples = source[index], source.plan[index]
        for segment, example in enumerate(examples, 1):
            inside = row["segments"] == segment
            assert (row["positions"][inside] == np.arange(inside.sum())).all()
            assert row["weights"][np.flatnonzero(inside)[-1]] == 0  # nothing predicts across examples
            kept = min(int(records.kept[example.record][0]), config.max_image_tokens)
            reads = packing.example_size(records, example, config, layout)[1]
            assert (row["feature_index"][inside] >= 0).sum() == kept * reads
        used = row["feature_index"][row["feature_index"] >= 0]
        assert len(set(used.tolist())) == len(used)
        for slot in set((used // config.max_image_tokens).tolist()):
            assert (used // config.max_image_tokens == slot).sum() == min(
                row["keep"][slot].sum(), config.max_image_tokens
            )


def test_packing_changes_no_examples_loss(run, records, layout):
    _, objective = opened(with_records("stage3", run, data__seq_len=96, data__images_per_row=4))
    params = objective.init(jax.random.key(0))
    config = PackingConfig(seq_len=96, images_per_row=4, max_image_tokens=16, weights=EVERYTHING)
    source = RowSource(records, config, layout, 0, 100)
    measure = jax.jit(objective.cross_entropy)
    header = records.header
    seen = 0
    for index in range(6):
        examples = [source.build(e) for e in source.plan[index]]
        packed = source[index]
        together = np.asarray(measure(params, {k: v[None] for k, v in packed.items()}))[0]
        for segment, example in enumerate(examples, 1):
            alone = packing.build_row([example], config, header["image_size"], header["num_patches"])
            single = np.asarray(measure(params, {k: v[None] for k, v in alone.items()}))[0]
            weights = alone["weights"] > 0
            inside = np.flatnonzero(packed["segments"] == segment)
            n = len(example.tokens.ids)
            assert np.abs(together[inside] - single[:n])[weights[:n]].max(initial=0) < 1e-5
            seen += 1
    assert seen > 12


def test_records_are_complete_or_refused(tmp_path, records):
    with pytest.raises(DataError, match="pretokenize"):
        Records(str(tmp_path))
    item = records[0]
    assert item.keep[0].sum() == records.kept[0][0]
    assert records.image(0).shape == (64, 64, 3) and item.texts


def test_an_example_longer_than_a_row_is_cut_and_counted(records, layout):
    config = PackingConfig(seq_len=1000, images_per_row=4, max_image_tokens=16, weights=(("caption", 1.0),))
    lengths = [example_size(records, Example(i, "caption", 0), config, layout)[0] for i in range(len(records))]
    short = dataclasses.replace(config, seq_len=int(np.median(lengths)))
    plan = Plan(records, short, layout, 0)
    rows = plan.pack(0)
    assert list(plan.dropped) == [f"longer than {short.seq_len} tokens"] and "are dropped" in plan.notes()[1]
    assert sum(plan.dropped.values()) + sum(map(len, rows)) == len(records)
    with pytest.raises(UserError, match="no example fits"):
        Plan(
            records,
            PackingConfig(seq_len=3, images_per_row=4, max_image_tokens=16, weights=(("caption", 1.0),)),
            layout,
            0,
        ).pack(0)


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


class Mixed:
    """Records of three sources, with captions only."""

    def __init__(self, sizes):
        self.source = np.repeat(np.arange(len(sizes)), sizes)

    def __len__(self):
        return len(self.source)

    def outline(self, index):
        return Outline(images=1, captions=(0,))


def test_a_mixture_has_the_shares_of_its_weights():
    records = Mixed((3000, 6000, 1000))
    tasks = (("caption", 0.5), ("text_to_image", 0.5))
    sources = (SourceShare(0, 3.0), SourceShare(1, 1.0, (("text", 0.2), ("caption", 0.8))), SourceShare(2, 1.0))
    plan = Plan(records, PackingConfig(96, 4, 16, tasks, sources=sources), None, 0)
    drawn = [example for epoch in range(2) for example in plan.examples(epoch)]
    assert len(drawn) == 20_000
    source = records.source[[example.record for example in drawn]]
    for number, share in enumerate((0.6, 0.2, 0.2)):
        assert abs((source == number).mean() - share) < 0.001
    task = np.array([example.task for example in drawn])
    for number, name, share in ((0, "caption", 0.5), (1, "text", 0.2), (1, "text_to_image", 0.0), (2, "caption", 0.5)):
        assert abs((task[source == number] == name).mean() - share) < 0.02
    # source 2 is read twice per pass: every record equally often; source 1 a third of it, without repeats
    visits = np.bincount([example.record for example in drawn], minlength=len(records))
    assert (visits[9000:] == 4).all() and visits[3000:9000].max() == 1 and (visits[:3000] == 4).all()
    assert drawn[:50] != plan.examples(1)[:50] and drawn[:10_000] == plan.examples(0)


def test_a_mixture_names_sources_of_the_records(run):
    with pytest.raises(ConfigError, match="names the source 'folder:/x'; the records .* come from scenes:count=96"):
        pipeline.packed_input(with_records("stage2", run, data__mixture=(dict(source="folder:/x"),)))
    with pytest.raises(ConfigError, match=r"mixture\[0\] has no setting 'wieght'; did you mean 'weight'"):
        with_records("stage2", run, data__mixture=(dict(source="scenes", wieght=2.0),))
    with pytest.raises(ConfigError, match=r"mixture\[0\].weight is 0.0; it must be a positive number"):
        with_records("stage2", run, data__mixture=(dict(source="scenes", weight=0.0),))
    only = (dict(source="scenes:count=96", tasks=dict(text=1.0)),)
    plan = pipeline.packed_input(with_records("stage2", run, data__mixture=only)).rows.plan
    assert {example.task for example in plan.examples(0)} == {"text"}
