"""LaVIT's selector, merger and quantizer: ours on the kept rows against a plain PyTorch version on all rows.

python -m benchmarks.tokenizer_forward

The published width (1,408; 12 merger blocks), 256 patches per image, of which 85 are kept and at most 96 computed. On a
CPU 4 images in float32, on a GPU 64 in bfloat16. The peer is `image_tokenizer_unimm.py` of exported models, whose
merger computes every row, as LaVIT's code does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import timing
from unimm_jax.interop import image_tokenizer_unimm as peer
from unimm_jax.models.keys import Keys
from unimm_jax.models.tokenizer import ImageTokenizerConfig
from unimm_jax.models.tokenizer.merger import Merger
from unimm_jax.models.tokenizer.quantizer import Quantizer
from unimm_jax.models.tokenizer.selector import Selector

WIDTH, PATCHES, KEPT, MAX_TOKENS = 1408, 256, 85, 96
SHAPE = ImageTokenizerConfig()


class Parts(nnx.Module):
    """What turns encoder features into codes."""

    def __init__(self, shape: ImageTokenizerConfig, width: int, rngs: Keys):
        self.selector = Selector(width, rngs=rngs)
        self.merger = Merger(width, shape.heads, shape.mlp_width, shape.merger_depth, rngs=rngs, scan=False)
        self.quantizer = Quantizer(width, shape.codes, shape.code_width, rngs=rngs)


def peer_settings(shape: ImageTokenizerConfig) -> dict[str, Any]:
    """The settings of the modules of `image_tokenizer_unimm`."""
    names = ("heads", "mlp_width", "merger_depth", "eps", "sink", "codes", "code_width", "quantizer")
    return {name: getattr(shape, name) for name in names}


def main(images: int, dtype: str, width: int = WIDTH, shape: ImageTokenizerConfig = SHAPE, rounds: int = 5) -> None:
    """Prints the comparison."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((images, PATCHES, width)).astype(np.float32)
    keep = np.zeros((images, PATCHES), bool)
    for row in keep:
        row[rng.choice(PATCHES, KEPT, replace=False)] = True
    graph, params = nnx.split(Parts(shape, width, Keys(params=0)))
    params = jax.tree.map(lambda w: w.astype(dtype), params)

    @jax.jit
    def encode(params: Any, x: jax.Array, keep: jax.Array) -> Any:
        m = nnx.merge(graph, params)
        log_probs = m.selector(x)
        rows = m.merger.kept(x, keep, MAX_TOKENS)
        return log_probs, m.quantizer.lookup(m.quantizer.project(rows))

    t, device = peer_settings(shape), timing.peer_device()
    parts = (peer.Selector(width), peer.Merger(width, t), peer.Quantizer(width, t))
    selector, merger, quantizer = (part.to(device, getattr(torch, dtype)) for part in parts)
    x, mask = torch.tensor(features, device=device).to(getattr(torch, dtype)), torch.tensor(keep, device=device)

    def theirs() -> None:
        with torch.no_grad():
            selector(x)
            quantizer(merger.dense(x, mask))

    given, kept = jnp.asarray(features, dtype), jnp.asarray(keep)
    title = f"LaVIT selector, merger, quantizer, {dtype}"

    def ours() -> None:
        jax.block_until_ready(encode(params, given, kept))

    timing.compare(title, ours, {"PyTorch, all 256 rows": timing.waited(theirs)}, rounds)


if __name__ == "__main__":
    if timing.prepare():
        main(64, "bfloat16")
    else:
        main(4, "float32")
