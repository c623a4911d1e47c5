import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unimm_jax.models import attention as A
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.transformer import Linear, run_stack, stack


def _qkv(seed, b=2, t=5, s=7, n=3, h=4):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (b, t, n, h)),
        jax.random.normal(keys[1], (b, s, n, h)),
        jax.random.normal(keys[2], (b, s, n, h)),
    )


def test_policy_attention_with_everything_allowed_is_attention_but_for_eps():
    q, k, v = _qkv(0)
    plain = A.attention(q, k, v)
    assert jnp.allclose(A.policy_attention(q, k, v, jnp.ones((2, 5, 7)), eps=0.0), plain, atol=1e-5)
    assert jnp.allclose(A.policy_attention(q, k, v, jnp.ones((2, 5, 7)), eps=1e-6), plain, atol=1e-4)


def test_policy_attention_follows_lavits_formula():
    q, k, v = _qkv(1)
    allowed = jax.random.bernoulli(jax.random.key(5), 0.5, (2, 5, 7)).astype(jnp.float32).at[0, 0].set(0)
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.asarray(allowed)[:, None]
    probs = (weights + 1e-6 / 7) / (weights.sum(-1, keepdims=True) + 1e-6)
    expected = np.einsum("bnts,bsnh->btnh", probs, v)
    assert np.allclose(A.policy_attention(q, k, v, allowed), expected, atol=1e-5)
    # nothing allowed: uniform over all keys
    assert np.allclose(expected[0, 0], np.asarray(v)[0].mean(0), atol=1e-5)


def test_a_sink_bounds_the_masks_gradient():
    q, k, v = _qkv(2)
    none = jnp.zeros((2, 5, 7))
    grad = jax.grad(lambda m, sink, eps: A.policy_attention(q, k, v, m, eps, sink).sum())
    assert jnp.abs(grad(none, 0.0, 1e-6)).max() > 1e4
    assert jnp.abs(grad(none, 1.0, 0.0)).max() < 1e2


def test_a_sink_stands_any_scores():
    q, k, v = _qkv(4)
    for allowed in (jnp.zeros((2, 5, 7)), jnp.ones((2, 5, 7)).at[:, :, 2].set(0)):
        value, grad = jax.value_and_grad(
            lambda q, m: A.policy_attention(q * 300, k, v, m, 0.0, 1.0).sum(), argnums=(0, 1)
        )(q, allowed)
        assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grad)


def test_segment_mask_separates_examples_and_padding():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    mask = A.segment_mask(segments, segments, causal=True)[0]
    assert mask.tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False, False, True, True, False],
        [False] * 5,
    ]


def test_rotary_depends_on_relative_positions_only():
    q, k, _ = _qkv(3, t=1, s=1)
    table = A.rope_table(16, q.shape[-1], 1e4)
    turned = lambda x, at: A.apply_rope(x, A.rope_cos_sin(table, jnp.full((2, 1), at)))
    score = lambda a, b: jnp.einsum("btnh,bsnh->bn", turned(q, a), turned(k, b))
    assert jnp.allclose(score(3, 1), score(12, 10), atol=1e-4)
    assert not jnp.allclose(score(3, 1), score(3, 2), atol=1e-3)
    assert jnp.isnan(turned(q, 16)).all()  # beyond the table: not some other position's angles
    # first and second half of the head pair up (the Hugging Face convention)
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    found = A.apply_rope(x, A.rope_cos_sin(A.rope_table(2, 4, 1e4), jnp.ones((1, 1), jnp.int32)))[0, 0, 0]
    assert np.allclose(found, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


@pytest.fixture(scope="module")
def lm():

    c = LanguageConfig(width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48, scan=False)
    return LanguageModel(c, 20, 12, rngs=Keys(params=0))


def test_the_cache_gives_what_the_whole_sequence_gives(lm):
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)
    positions, segments = jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32)
    whole = lm(lm.embed(tokens), positions, segments)
    extend, cache = lm.incremental(2, 9)
    mask = jnp.broadcast_to(jnp.arange(5)[:, None] >= jnp.arange(9), (2, 5, 9))
    first, cache = extend(lm.embed(tokens[:, :5]), positions[:, :5], mask, cache, 0)
    found = [first]
    for t in range(5, 9):
        mask = jnp.broadcast_to(jnp.arange(9) <= t, (2, 1, 9))
        hidden, cache = extend(lm.embed(tokens[:, t : t + 1]), positions[:, t : t + 1], mask, cache, t)
        found.append(hidden)
    assert jnp.allclose(jnp.concatenate(found, 1), whole, atol=1e-5)


def test_gradients_of_scanned_kernels_have_the_dtype_of_activations():
    layers = stack(lambda r: Linear(8, (8,), axes=(None, None), rngs=r), 3, Keys(params=0))
    graph, kernels = nnx.split(layers)
    x = jax.random.normal(jax.random.key(1), (2, 4, 8), jnp.bfloat16)
    merge = lambda k: nnx.merge(graph, k)
    plain = lambda k, x: jax.lax.scan(lambda x, layer: (layer(x), None), x, merge(k))[0]
    ours = lambda k, x: run_stack(merge(k), x, lambda layer, x: layer(x), scan=True)
    grad = lambda run: jax.grad(lambda k: run(k, x).astype(jnp.float32).sum())
    for a, b in zip(*(jax.tree.leaves(jax.jit(grad(run))(kernels)) for run in (ours, plain)), strict=True):
        assert a.dtype == jnp.float32 and a.any()
        assert jnp.allclose(a, b, rtol=2**-7, atol=2**-7 * jnp.abs(b).max())  # the compiler may leave roundings out

    def gathered(run):
        scans = [e for e in jax.make_jaxpr(grad(run))(kernels).eqns if e.primitive.name == "scan"]
        return {str(v.aval.dtype) for e in scans for v in e.outvars if v.aval.shape == (3, 8, 8)}

    assert gathered(ours) == {"bfloat16"} and "float32" in gathered(plain)


def test_scanned_and_unrolled_layers_are_the_same_tree_and_function(lm):
    import dataclasses

    from flax import nnx

    scanned = LanguageModel(dataclasses.replace(lm.config, scan=True, remat="full"), 20, 12, rngs=Keys(params=0))
    shapes = lambda m: jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(m, nnx.Param)))
    assert shapes(scanned) == shapes(lm)
    x, ones = jax.random.normal(jax.random.key(1), (1, 6, 32)), jnp.ones((1, 6), jnp.int32)
    assert jnp.allclose(scanned(x, jnp.arange(6)[None], ones), lm(x, jnp.arange(6)[None], ones), atol=1e-5)


@pytest.mark.parametrize("length", [64, 150])
def test_blocks_of_queries_read_what_jaxs_own_attention_reads(length):
    keys = jax.random.split(jax.random.key(1), 4)
    q = jax.random.normal(keys[0], (2, length, 4, 8))
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[1:3])
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, length)), -1))
    mask = A.segment_mask(segments, segments, causal=True)[:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def of(attend):
        value, back = jax.vjp(attend, q, k, v)
        return [value, *back(jnp.cos(q))]

    wanted = of(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask))
    for a, b in zip(of(A.causal_attention(segments)), wanted, strict=True):
        assert jnp.allclose(a, b, atol=1e-5), jnp.abs(a - b).max()


@pytest.mark.parametrize("heads, groups, width", [(4, 1, 128), (4, 2, 32)])
def test_splash_attention_is_attention(heads, groups, width):
    """The TPU kernel's own program, interpreted: values and gradients, packed rows, grouped queries, narrow heads."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 128, heads, width))
    k, v = (jax.random.normal(key, (2, 128, heads // groups, width)) for key in keys[1:3])
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 32, axis=1))
    real = (segments > 0)[..., None, None]
    out = jax.random.normal(keys[3], q.shape) * real

    def of(attend):
        value, back = jax.vjp(lambda *qkv: jnp.where(real, attend(*qkv), 0), q, k, v)
        return [value, *back(out)]

    plain = of(A.causal_attention(segments))
    for found, wanted in zip(of(lambda *x: A.splash_attention(*x, segments, interpret=True)), plain, strict=True):
        assert jnp.allclose(found, wanted, atol=1e-4), jnp.abs(found - wanted).max()


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_no_remat_policy_changes_a_gradient(remat):
    config = LanguageConfig(width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32)
    segments, positions = jnp.ones((1, 6), int), jnp.arange(6)[None]
    tokens = jnp.asarray([[1, 5, 21, 22, 3, 0]])

    def grads(**changes):
        lm = LanguageModel(dataclasses.replace(config, **changes), 20, 12, rngs=Keys(params=0))
        graph, params = nnx.split(lm)
        loss = lambda p: (lambda m: (m(m.embed(tokens), positions, segments) ** 2).sum())(nnx.merge(graph, p))
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for scan in (True, False):
        for a, b in zip(grads(remat=remat, scan=scan), grads(remat="none", scan=scan), strict=True):
            assert jnp.allclose(a, b, atol=1e-5)


def test_the_door_chooses_by_what_the_mesh_is_made_of(monkeypatch):
    taken = []
    monkeypatch.setattr(A, "splash_attention", lambda q, k, v, s: taken.append("splash") or q)
    monkeypatch.setattr(A, "cudnn_attention", lambda q, k, v, m: taken.append("cudnn") or q)
    monkeypatch.setattr(A, "attention", lambda q, k, v, m: taken.append("xla") or q)
    q = jnp.zeros((1, 128, 2, 8), jnp.bfloat16)
    cases = [("tpu", q), ("tpu", q[:, :60]), ("gpu", q), ("gpu", q.astype(jnp.float32)), ("cpu", q)]
    cases += [("gpu", q[:, :63]), ("gpu", q[:, :64, :, :4])]  # an odd row, a narrow head
    for where, x in cases:
        monkeypatch.setattr(A, "platform", lambda where=where: where)
        A.causal_attention(jnp.ones(x.shape[:2], int))(x, x, x)
    assert taken == ["splash", "xla", "cudnn", "xla", "xla", "xla", "xla", "xla", "xla"]  # 128 queries are two blocks


def test_cudnn_attention_is_attention_and_becomes_cudnns_kernels(monkeypatch):
    """Without a GPU: the program for CUDA holds cuDNN's kernels; the same call through XLA gives plain attention."""
    q, k, v = (x.astype(jnp.bfloat16) for x in _qkv(0, t=8, s=8, h=8))
    k, v = k[:, :, :1], v[:, :, :1]  # grouped queries
    mask = A.segment_mask(*[jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2], [1] * 8])] * 2, causal=True)

    def of(attend):
        value, back = jax.vjp(lambda *qkv: attend(*qkv, mask), q, k, v)
        return [value, *back(jnp.cos(q))]

    with monkeypatch.context() as patched:  # the version of a library that this machine lacks
        patched.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
        program = jax.jit(lambda: of(A.cudnn_attention)).trace().lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in program and "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in program

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **given: plain(*x, **given))
    for found, wanted in zip(of(A.cudnn_attention), of(A.attention), strict=True):
        assert jnp.allclose(found, wanted, atol=0.05), jnp.abs(found - wanted).max()
