"""Forward pass and train step of a ViT-B/16 encoder against `transformers`' ViT in PyTorch.

python -m benchmarks.vit

float32, 4 pictures of 224 pixels; the train step is forward, a mean-square loss, gradient and AdamW.
"""

import jax
import numpy as np
import optax
import torch
import transformers
from flax import nnx

from benchmarks import timing
from unimm_jax import main as process
from unimm_jax.models.vit import ViT, ViTConfig

SHAPE = ViTConfig(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072, biases="qkv", scan=False)


def main() -> None:
    """Prints both comparisons."""
    images = np.random.default_rng(0).standard_normal((4, 224, 224, 3)).astype(np.float32)
    graph, params = nnx.split(ViT(SHAPE, rngs=nnx.Rngs(params=0)))
    forward = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    tx = optax.adamw(1e-4)

    def step(params, opt, x):
        loss, grads = jax.value_and_grad(lambda p: (nnx.merge(graph, p)(x) ** 2).mean())(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    train = jax.jit(step, donate_argnums=(0, 1))
    config = transformers.ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    peer = transformers.ViTModel(config, add_pooling_layer=False)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()

    def theirs():
        with torch.no_grad():
            peer(x)

    timing.compare(
        "ViT-B/16 forward, float32", lambda: forward(params, images).block_until_ready(), {"transformers": theirs}
    )
    state = [params, tx.init(params)]
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4)

    def ours_train():
        *state[:], loss = train(*state, images)
        loss.block_until_ready()

    def theirs_train():
        optimizer.zero_grad()
        (peer(x).last_hidden_state ** 2).mean().backward()
        optimizer.step()

    timing.compare("ViT-B/16 train step, float32", ours_train, {"transformers": theirs_train}, rounds=5)


if __name__ == "__main__":
    process.prepare_process()
    main()
