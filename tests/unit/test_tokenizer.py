import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimm_jax.models.keys import Keys
from unimm_jax.models.tokenizer import ImageTokenizer, ImageTokenizerConfig
from unimm_jax.models.tokenizer.merger import Merger, compact
from unimm_jax.models.tokenizer.quantizer import Quantizer, cosine_kmeans, ema_update, l2_normalize, restart_dead
from unimm_jax.models.tokenizer.selector import (
    argmax_mask,
    bernoulli_mask,
    clip_mask_gradient,
    sample_mask,
    selection_noise,
    straight_through,
    top_k_mask,
)
from unimm_jax.models.vit import ViTConfig, patchify, unpatchify


def _merger(eps, sink):
    return Merger(32, 2, 64, 2, rngs=Keys(params=0), eps=eps, sink=sink, scan=False)


def _features_and_mask(seed=0, b=4, p=16):
    x = jax.random.normal(jax.random.key(seed), (b, p, 32))
    keep = jax.random.bernoulli(jax.random.key(seed + 1), 0.4, (b, p)).at[:, 3].set(True)
    return x, keep.at[0].set(True)  # the first image keeps everything


@pytest.mark.parametrize("scan", [False, True])
def test_dense_and_kept_rows_renderings_agree_with_a_sink(scan):
    merger = Merger(32, 2, 64, 2, rngs=Keys(params=0), eps=0.0, sink=1.0, scan=scan)
    x, keep = _features_and_mask()
    dense = merger.dense(x, keep.astype(jnp.float32))
    kept = merger.kept(x, keep, 16)
    index, valid = compact(keep, 16)
    rows = jnp.take_along_axis(dense, index[..., None], 1)
    assert jnp.abs(jnp.where(valid[..., None], rows - kept, 0)).max() < 1e-5


def test_the_gap_of_lavits_eps_is_small_where_something_is_dropped():
    merger = _merger(1e-6, 0.0)
    x, keep = _features_and_mask()
    index, valid = compact(keep, 16)
    rows = jnp.take_along_axis(merger.dense(x, keep.astype(jnp.float32)), index[..., None], 1)
    gap = jnp.abs(jnp.where(valid[..., None], rows - merger.kept(x, keep, 16), 0)).max((1, 2))
    assert gap[1:].max() < 1e-3


def test_kept_rows_do_not_depend_on_the_budget_or_on_dropped_rows_order():
    merger = _merger(0.0, 1.0)
    x, keep = _features_and_mask()
    keep = keep.at[0, 8:].set(False)
    a, b = merger.kept(x, keep, 12), merger.kept(x, keep, 16)
    n = int(keep.sum(-1).min())
    assert jnp.allclose(a[:, :n], b[:, :n], atol=1e-5)


def test_the_kept_stream_is_causal():
    merger = _merger(0.0, 1.0)
    x, keep = _features_and_mask()
    keep = keep.at[:].set(True)  # nothing dropped: no bidirectional path through cross-attention
    base = merger.dense(x, keep.astype(jnp.float32))
    later = merger.dense(x.at[:, 9].add(x[:, 3]), keep.astype(jnp.float32))
    assert jnp.allclose(base[:, :9], later[:, :9], atol=1e-6)
    assert not jnp.allclose(base[:, 9:], later[:, 9:], atol=1e-3)


def test_masks():
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (8, 16, 2)) * 2)
    hard = argmax_mask(log_probs)
    assert jnp.array_equal(hard, log_probs[..., 0] > log_probs[..., 1])
    nothing = jnp.stack([jnp.full((1, 16), -3.0).at[0, 5].set(-2.0), jnp.full((1, 16), -0.05)], -1)
    assert argmax_mask(nothing)[0].tolist() == [i == 5 for i in range(16)]
    assert (top_k_mask(log_probs, 5).sum(-1) == 5).all()
    assert jnp.array_equal(sample_mask(log_probs, jax.random.key(1), noise=0.0) > 0.5, hard)
    draws = jnp.stack([sample_mask(log_probs, jax.random.key(i)) for i in range(300)])
    assert jnp.abs(draws.mean(0) - jnp.exp(log_probs[..., 0])).max() < 0.12
    assert set(np.unique(np.round(np.asarray(draws), 6))) == {0.0, 1.0}


def test_sampled_masks_have_the_keep_probabilities_and_depend_on_the_image_alone():
    images = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    noise = selection_noise(images, 16)
    assert noise.shape == (600, 16) and noise.dtype == np.float32 and 0 <= noise.min() < noise.max() < 1
    order = np.random.default_rng(1).permutation(600)
    assert np.array_equal(selection_noise(images[order], 16), noise[order])
    assert np.array_equal(selection_noise(images[7:8], 16), noise[7:8])
    keep = jax.random.uniform(jax.random.key(0), (16,))
    log_probs = jnp.broadcast_to(jnp.log(jnp.stack([keep, 1 - keep], -1)), (600, 16, 2))
    assert jnp.abs(bernoulli_mask(log_probs, noise).mean(0) - keep).max() < 0.08
    nothing = jnp.log(jnp.stack([keep, 1 - keep], -1) * 0 + jnp.array([1e-9, 1.0])).at[5, 0].set(-3.0)
    assert bernoulli_mask(nothing[None], jnp.full((1, 16), 0.99))[0].tolist() == [i == 5 for i in range(16)]


def test_straight_through_has_the_softmaxs_gradient():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 2))
    w = jax.random.normal(jax.random.key(1), (2, 4))
    found = jax.grad(lambda x: (straight_through(x) * w).sum())(logits)
    expected = jax.grad(lambda x: (jax.nn.softmax(x, -1)[..., 0] * w).sum())(logits)
    assert jnp.allclose(found, expected)
    clipped = jax.grad(lambda m: (clip_mask_gradient(m, 0.1) * w).sum())(jnp.ones((2, 4)))
    assert jnp.allclose(clipped, jnp.clip(w, -0.1, 0.1))


def test_quantizer_finds_the_nearest_row():
    q = Quantizer(16, 24, 8, rngs=Keys(params=0))
    z = q.project(jax.random.normal(jax.random.key(0), (5, 16)))
    assert jnp.allclose(jnp.linalg.norm(z, axis=-1), 1, atol=1e-5)
    distance = jnp.linalg.norm(z[:, None] - q.codebook[...][None], axis=-1)
    assert jnp.array_equal(q.lookup(z), distance.argmin(-1))


def test_simvqs_codes_are_a_frozen_sample_times_a_matrix():
    q = Quantizer(16, 4096, 8, rngs=Keys(params=0), kind="simvq")
    assert q.codebook[...].var() == pytest.approx(1 / 8, rel=0.05)  # N(0, 1/C)
    assert jnp.array_equal(q.vectors, q.codebook[...])  # the matrix starts as the identity
    q.code_map.kernel[...] = jax.random.normal(jax.random.key(1), (8, 8))
    vectors = q.codebook[...] @ q.code_map.kernel[...]
    assert jnp.allclose(q.vectors, vectors, atol=1e-5)
    z = q.project(jax.random.normal(jax.random.key(0), (5, 16)))
    ids = q.lookup(z)
    assert jnp.array_equal(ids, jnp.linalg.norm(z[:, None] - vectors[None], axis=-1).argmin(-1))
    assert jnp.allclose(q.rows(ids), vectors[ids], atol=1e-5)


def test_ema_moves_hit_codes_only_and_counts():
    book = l2_normalize(jax.random.normal(jax.random.key(0), (6, 4)))
    z = l2_normalize(jax.random.normal(jax.random.key(1), (10, 4)))
    ids = jnp.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 5])
    weight = jnp.ones(10).at[-1].set(0.0)
    new, count, hits = ema_update(book, jnp.ones(6), z, ids, weight, 0.9)
    assert hits.tolist() == [2, 3, 4, 0, 0, 0]
    assert jnp.array_equal(new[3:], book[3:])
    expected = l2_normalize(0.9 * book[1] + 0.1 * l2_normalize(z[2:5].mean(0)))
    assert jnp.allclose(new[1], expected, atol=1e-6)
    assert jnp.allclose(count, 0.9 + 0.1 * hits)
    revived, count = restart_dead(new, count, z, weight, 0.95, jax.random.key(0))
    assert (count[3:] == 1).all() and not jnp.allclose(revived[3:], new[3:])
    assert all((jnp.abs(z[:9] - row).sum(-1) < 1e-6).any() for row in revived[3:])


def test_kmeans_finds_separated_directions():
    centres = jnp.eye(4)
    noise = 0.05 * jax.random.normal(jax.random.key(0), (200, 4))
    z = l2_normalize(centres[jnp.arange(200) % 4] + noise)
    means, hits = cosine_kmeans(z, z[:4])
    assert hits.tolist() == [50.0] * 4
    assert jnp.allclose(means, centres, atol=0.05)


@pytest.mark.parametrize("selection", ["argmax", "sample", "top_k", "all"])
@pytest.mark.parametrize("positions", ["order", "grid"])
def test_every_selection_encodes_and_decodes(selection, positions):
    vit = ViTConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, scan=False)
    config = ImageTokenizerConfig(
        heads=2, mlp_width=64, merger_depth=1, decoder_depth=1, codes=16, code_width=8,
        selection=selection, top_k=5, positions=positions, scan=False,
    )  # fmt: skip
    tokenizer = ImageTokenizer(vit, config, rngs=Keys(params=0))
    noise = config.noise(np.zeros((3, 32, 32, 3), np.uint8), 16)
    assert (noise is None) == (selection != "sample")
    keep, codes = tokenizer.encode(jax.random.normal(jax.random.key(0), (3, 32, 32, 3)), noise)
    assert keep.shape == codes.shape == (3, 16) and (keep.sum(-1) >= 1).all()
    assert {"all": (keep.sum(-1) == 16).all(), "top_k": (keep.sum(-1) == 5).all()}.get(selection, True)
    features = tokenizer.decode(codes, keep)
    assert features.shape == (3, 16, 32)
    # what dropped patches hold is not read
    other = tokenizer.decode(jnp.where(keep, codes, (codes + 1) % 16), keep)
    assert jnp.allclose(features, other, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("quantizer", ["ema", "simvq"])
def test_a_bidirectional_tokenizer_keeps_and_reads_all_patches(quantizer, scan):
    vit = ViTConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, scan=False)
    config = ImageTokenizerConfig(
        architecture="bidirectional", quantizer=quantizer, heads=2, mlp_width=64, merger_depth=1, decoder_depth=1,
        codes=16, code_width=8, selection="all", scan=scan,
    )  # fmt: skip
    tokenizer = ImageTokenizer(vit, config, rngs=Keys(params=0))
    assert tokenizer.selector is None and tokenizer.merger is None
    images = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    keep, codes = tokenizer.encode(images)
    assert keep.all() and codes.shape == (3, 16)
    features = tokenizer.decode(codes, keep)
    assert features.shape == (3, 16, 32)
    for x in (features, tokenizer.features(images)):  # both have mean 0 and variance 1
        assert jnp.abs(x.mean(-1)).max() < 1e-5 and jnp.abs(x.var(-1) - 1).max() < 1e-2
    # the last patch reaches the first position, before and after the quantizer, and equal codes differ by position
    x = tokenizer.features(images)
    changed = tokenizer.project(x.at[:, -1].add(jnp.roll(x[:, -1], 1, -1)), keep)
    assert not jnp.array_equal(changed[:, 0], tokenizer.project(x, keep)[:, 0])
    other = tokenizer.decode(codes.at[:, -1].add(1) % 16, keep)
    assert not jnp.array_equal(features[:, 0], other[:, 0])
    same = tokenizer.decode(jnp.zeros_like(codes), keep)
    assert not jnp.allclose(same[:, 0], same[:, 1], atol=1e-2)


def test_order_positions_forget_where_a_token_stood():
    vit = ViTConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, scan=False)
    config = ImageTokenizerConfig(
        heads=2, mlp_width=64, merger_depth=1, decoder_depth=1, codes=16, code_width=8, scan=False
    )
    tokenizer = ImageTokenizer(vit, config, rngs=Keys(params=0))
    keep = jnp.zeros((2, 16), bool).at[0, jnp.array([2, 9])].set(True).at[1, jnp.array([5, 6])].set(True)
    codes = jnp.zeros((2, 16), jnp.int32).at[0, jnp.array([2, 9])].set(jnp.array([3, 4]))
    codes = codes.at[1, jnp.array([5, 6])].set(jnp.array([3, 4]))
    found = tokenizer.decode(codes, keep)
    assert jnp.allclose(found[0], found[1], atol=1e-5)


def test_patchify_is_undone():
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    assert jnp.array_equal(unpatchify(patchify(x, 4), 4), x)
    assert patchify(x, 4).shape == (2, 9, 48)
