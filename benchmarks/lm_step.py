"""Train step of a LLaMA-shaped language model of 20 million parameters against `transformers` in PyTorch.

python -m benchmarks.lm_step

float32, both on all cores: forward, loss, gradient and AdamW of 4 rows of 256 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

from benchmarks import timing
from unimm_jax import main as process
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.objectives.language_modeling import chunked_cross_entropy

WORDS, ROWS, LENGTH = 8064, 4, 256
SHAPE = LanguageConfig(width=384, layers=8, heads=6, kv_heads=6, head_width=64, mlp_width=1024, scan=False)


def ours(tokens: np.ndarray):
    """A function that trains one step."""
    model = LanguageModel(SHAPE, WORDS, 128, rngs=nnx.Rngs(params=0))
    graph, params = nnx.split(model)
    tx = optax.adamw(1e-4)
    segments = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)

    def step(params, opt, tokens):
        def loss_of(params):
            m = nnx.merge(graph, params)
            hidden = m(m.embed(tokens), positions, segments)
            return chunked_cross_entropy(hidden[:, :-1], m.head(), tokens[:, 1:], WORDS, 0).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    run = jax.jit(step, donate_argnums=(0, 1))
    state = [params, tx.init(params)]

    def once():
        *state[:], loss = run(*state, jnp.asarray(tokens))
        loss.block_until_ready()

    print(f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f} million parameters")
    return once


def theirs(tokens: np.ndarray, compiled: bool):
    """The same in PyTorch."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 128,
        hidden_size=SHAPE.width,
        intermediate_size=SHAPE.mlp_width,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.tensor(tokens)

    def once():
        optimizer.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return once


if __name__ == "__main__":
    process.prepare_process()
    ids = np.random.default_rng(0).integers(0, WORDS, (ROWS, LENGTH))
    peers = {"transformers, eager": theirs(ids, False), "transformers, compiled": theirs(ids, True)}
    timing.compare("LM train step, 20M, float32", ours(ids), peers)
