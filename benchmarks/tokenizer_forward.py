"""LaVIT's selector, merger and quantizer: ours on kept rows against a plain PyTorch rendering that computes all rows.

python -m benchmarks.tokenizer_forward

The published width (1,408; 12 merger blocks), 256 patches a picture, 85 of them kept, static budget 96: on a processor
4 pictures in float32, on a GPU 64 in bfloat16. The peer is the exported model's own `modeling_unimm.py`, whose merger
computes every row as the reference's does.
"""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import timing
from unimm_jax.models.tokenizer import TokenizerConfig
from unimm_jax.models.tokenizer.merger import Merger
from unimm_jax.models.tokenizer.quantizer import Quantizer
from unimm_jax.models.tokenizer.selector import Selector

WIDTH, PATCHES, KEPT, BUDGET = 1408, 256, 85, 96
SHAPE = TokenizerConfig()


class Parts(nnx.Module):
    """What stands between encoder and codes."""

    def __init__(self, shape: TokenizerConfig, width: int, rngs: nnx.Rngs):
        self.selector = Selector(width, rngs=rngs)
        self.merger = Merger(width, shape.heads, shape.mlp_width, shape.merger_depth, rngs=rngs, scan=False)
        self.quantizer = Quantizer(width, shape.codes, shape.code_width, rngs=rngs)


def peer_module():
    """The exported model's file, as a module."""
    file = pathlib.Path(__file__).parent.parent / "unimm_jax" / "interop" / "modeling_unimm.py"
    spec = importlib.util.spec_from_file_location("modeling_unimm", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks it up there
    spec.loader.exec_module(module)
    return module


def peer_settings(shape: TokenizerConfig) -> dict:
    """The settings that its modules take."""
    names = ("heads", "mlp_width", "merger_depth", "eps", "sink", "codes", "code_width")
    return {name: getattr(shape, name) for name in names}


def main(pictures: int, dtype: str, width: int = WIDTH, shape: TokenizerConfig = SHAPE, rounds: int = 5) -> None:
    """Prints the comparison."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((pictures, PATCHES, width)).astype(np.float32)
    keep = np.zeros((pictures, PATCHES), bool)
    for row in keep:
        row[rng.choice(PATCHES, KEPT, replace=False)] = True
    graph, params = nnx.split(Parts(shape, width, nnx.Rngs(params=0)))
    params = jax.tree.map(lambda w: w.astype(dtype), params)

    @jax.jit
    def encode(params, x, keep):
        m = nnx.merge(graph, params)
        log_probs = m.selector(x)
        rows = m.merger.kept(x, keep, BUDGET)
        return log_probs, m.quantizer.lookup(m.quantizer.project(rows))

    peer, t, device = peer_module(), peer_settings(shape), timing.peer_device()
    parts = (peer.Selector(width), peer.Merger(width, t), peer.Quantizer(width, t))
    selector, merger, quantizer = (part.to(device, getattr(torch, dtype)) for part in parts)
    x, mask = torch.tensor(features, device=device).to(getattr(torch, dtype)), torch.tensor(keep, device=device)

    def theirs():
        with torch.no_grad():
            selector(x)
            quantizer(merger.dense(x, mask))

    given, kept = jnp.asarray(features, dtype), jnp.asarray(keep)
    ours = lambda: jax.block_until_ready(encode(params, given, kept))
    title = f"LaVIT selector, merger, quantizer, {dtype}"
    timing.compare(title, ours, {"PyTorch, all 256 rows": timing.waited(theirs)}, rounds)


if __name__ == "__main__":
    if timing.prepare():
        main(64, "bfloat16")
    else:
        main(4, "float32")
