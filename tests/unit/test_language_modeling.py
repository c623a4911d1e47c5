import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import opened, with_records

from unimm_jax import text_tokenizer
from unimm_jax.errors import DataError
from unimm_jax.objectives.language_modeling import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [0, 4, 7, 50])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (2, 10, 8)), jax.random.normal(keys[1], (32, 8))
    targets = jax.random.randint(keys[2], (2, 10), 0, 30)
    weights = jnp.arange(20).reshape(2, 10)

    def plain(hidden, head):
        logits = jnp.where(jnp.arange(32) < 30, hidden @ head.T, -jnp.inf)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    chunked = lambda hidden, head: chunked_cross_entropy(hidden, head, targets, 30, chunk)
    assert jnp.allclose(chunked(hidden, head), plain(hidden, head), atol=1e-5)
    grad = lambda f: jax.grad(lambda h, w: (f(h, w) * weights).sum(), argnums=(0, 1))(hidden, head)
    for found, expected in zip(grad(chunked), grad(plain), strict=True):
        assert jnp.allclose(found, expected, atol=1e-4)
    assert (grad(chunked)[1][30:] == 0).all()  # padded rows never win and never train


def test_a_trained_text_tokenizer_travels_and_reads_back(tmp_path):
    words = ["two red circles", "a blue square left of a cross", "how many?"]
    tokenizer = text_tokenizer.train(words, 320)
    again = text_tokenizer.TextTokenizer(tokenizer.payload)
    assert again.fingerprint == tokenizer.fingerprint and again.num_rows == tokenizer.num_rows <= 320
    for sentence in [*words, "unseen wörds, 日本"]:
        assert tokenizer.decode(again.encode(sentence)) == sentence
    assert tokenizer.eos not in tokenizer.encode("two red circles") and len({again.bos, again.eos, again.pad}) == 3
    (tmp_path / "tokenizer.json").write_text(tokenizer.payload["model"])
    assert text_tokenizer.load(str(tmp_path)).encode("two red circles") == tokenizer.encode("two red circles")
    with pytest.raises(DataError, match="no text tokenizer"):
        text_tokenizer.load(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        text_tokenizer.load(str(tmp_path / "broken.json"))


STAGES = ("encoder", "selector", "tokenizer", "pixel_decoder", "unet_decoder", "stage1", "stage3")


@pytest.mark.parametrize("stage", STAGES)
def test_a_batchs_shapes_are_known_without_data(run, stage):
    config = with_records(stage, run)
    data, objective = opened(config)
    batch = next(data.iterate())
    shapes = type(objective).batch_spec(config, data.size())
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == shapes


def test_the_formula_of_a_steps_operations_is_what_its_program_counts(run):
    """The LM stage's formula against the products in the program of loss and gradient, attention there counted in full
    and not causal."""
    config = with_records("stage3", run)
    _, objective = opened(config)
    shapes = type(objective).batch_spec(config)
    batch = {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in shapes.items()}
    formula = objective.step_flops(batch)
    counted = super(type(objective), objective).step_flops(batch)
    m, (b, t) = config.model["language"], shapes["tokens"][0]
    half = 3 * b * t * m.layers * 4 * m.heads * m.head_width * t / 2
    assert np.isclose(formula + half, counted, rtol=0.03), (formula, half, counted)
