"""Generation with a key/value cache against `transformers` generate in PyTorch, the same weights' shape, greedy.

python -m benchmarks.generation

Prompts of 32 tokens, 64 new tokens, batches of 1 and 16. On a processor float32, the `laptop` language model and one of
20 million parameters; on a GPU bfloat16 and 1.1 billion parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import lm_step, timing
from configs import common
from unimm_jax.generate import Sampling, pick
from unimm_jax.models.language import LanguageConfig, LanguageModel

PROMPT, NEW = 32, 64
# name: language model, ids
CPU = {
    "laptop": (LanguageConfig(**common.language("laptop")), 1024),
    "20M": (
        LanguageConfig(width=384, layers=8, heads=6, kv_heads=6, head_width=64, mlp_width=1024, scan=False),
        8192,
    ),
}
GPU = {"1.1B": (lm_step.GPU.shape, lm_step.GPU.words)}


def ours(shape: LanguageConfig, words: int, tokens: np.ndarray, dtype: str):
    """Prefill, then one token after another in a scan, as `generate.Generator` does."""
    batch = len(tokens)
    graph, params = nnx.split(LanguageModel(shape, words - 128, 128, rngs=nnx.Rngs(params=0)))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    greedy = Sampling(temperature=0)
    keys = jax.random.split(jax.random.key(0), batch)

    @jax.jit
    def generate(params, tokens):
        m = nnx.merge(graph, params)
        slots = jnp.arange(PROMPT + NEW)
        extend, cache = m.incremental(batch, PROMPT + NEW, dtype)
        causal = jnp.broadcast_to(jnp.arange(PROMPT)[:, None] >= slots, (batch, PROMPT, PROMPT + NEW))
        positions = jnp.broadcast_to(jnp.arange(PROMPT), (batch, PROMPT))
        hidden, cache = extend(m.embed(tokens, dtype), positions, causal, cache, 0)

        head = m.head(dtype).T  # as products read it

        def body(carry, index):
            hidden, cache = carry
            token = pick(jnp.einsum("nd,dv->nv", hidden, head), keys, greedy)
            at = PROMPT + index
            mask = jnp.broadcast_to(slots <= at, (batch, 1, PROMPT + NEW))
            x, cache = extend(m.embed(token[:, None], dtype), jnp.full((batch, 1), at), mask, cache, at)
            return (x[:, 0], cache), token

        return jax.lax.scan(body, (hidden[:, -1], cache), jnp.arange(NEW))[1].T

    return lambda: generate(params, tokens).block_until_ready()


def theirs(shape: LanguageConfig, words: int, tokens: np.ndarray, dtype: str):
    """The same by `generate`."""
    model = lm_step.peer_model(shape, words, eos_token_id=None, pad_token_id=0)
    model.eval().to(timing.peer_device(), getattr(torch, dtype))
    ids = torch.tensor(tokens, device=timing.peer_device())
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, attention_mask=torch.ones_like(ids))

    def once():
        with torch.no_grad():
            assert model.generate(ids, **options).shape[1] == PROMPT + NEW

    return timing.waited(once)


def main(shapes: dict[str, tuple[LanguageConfig, int]], dtype: str, rounds: int = 5) -> None:
    """Prints the comparison of each shape at both batches."""
    for name, (shape, words) in shapes.items():
        for rows in (1, 16):
            prompt = np.random.default_rng(0).integers(0, words, (rows, PROMPT))
            peers = {"transformers generate": theirs(shape, words, prompt, dtype)}
            title = f"{NEW} new tokens, {name}, batch {rows}, {dtype}"
            timing.compare(title, ours(shape, words, prompt, dtype), peers, rounds)


if __name__ == "__main__":
    if timing.prepare():
        main(GPU, "bfloat16")
    else:
        main(CPU, "float32")
