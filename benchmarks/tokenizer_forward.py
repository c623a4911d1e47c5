"""LaVIT's selector, merger and quantizer: ours on kept rows against a plain PyTorch rendering that computes all rows.

python -m benchmarks.tokenizer_forward

float32, the published width (1,408; 12 merger blocks), 4 pictures of 256 patches, 85 of them kept, static budget 96.
The peer is the exported model's own `modeling_unimm.py`, whose merger is the reference's dense one.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import timing
from unimm_jax import main as process
from unimm_jax.models.tokenizer import TokenizerConfig
from unimm_jax.models.tokenizer.merger import Merger
from unimm_jax.models.tokenizer.quantizer import Quantizer
from unimm_jax.models.tokenizer.selector import Selector

WIDTH, PATCHES, KEPT, BUDGET, PICTURES = 1408, 256, 85, 96, 4
SHAPE = TokenizerConfig()


class Parts(nnx.Module):
    """What stands between encoder and codes."""

    def __init__(self, rngs: nnx.Rngs):
        t = SHAPE
        self.selector = Selector(WIDTH, rngs=rngs)
        self.merger = Merger(WIDTH, t.heads, t.mlp_width, t.merger_depth, rngs=rngs, scan=False)
        self.quantizer = Quantizer(WIDTH, t.codes, t.code_width, rngs=rngs)


def main() -> None:
    """Prints the comparison."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((PICTURES, PATCHES, WIDTH)).astype(np.float32)
    keep = np.zeros((PICTURES, PATCHES), bool)
    for row in keep:
        row[rng.choice(PATCHES, KEPT, replace=False)] = True
    graph, params = nnx.split(Parts(nnx.Rngs(params=0)))

    @jax.jit
    def encode(params, x, keep):
        m = nnx.merge(graph, params)
        log_probs = m.selector(x)
        rows = m.merger.kept(x, keep, BUDGET)
        return log_probs, m.quantizer.lookup(m.quantizer.project(rows))

    file = pathlib.Path(__file__).parent.parent / "unimm_jax" / "interop" / "modeling_unimm.py"
    spec = importlib.util.spec_from_file_location("modeling_unimm", file)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    t = {k: getattr(SHAPE, k) for k in ("heads", "mlp_width", "merger_depth", "eps", "sink", "codes", "code_width")}
    selector, merger, quantizer = peer.Selector(WIDTH), peer.Merger(WIDTH, t), peer.Quantizer(WIDTH, t)
    x, mask = torch.tensor(features), torch.tensor(keep)

    def theirs():
        with torch.no_grad():
            selector(x)
            quantizer(merger.dense(x, mask))

    ours = lambda: jax.block_until_ready(encode(params, jnp.asarray(features), jnp.asarray(keep)))
    timing.compare("LaVIT selector, merger, quantizer, float32", ours, {"PyTorch, all 256 rows": theirs}, rounds=5)


if __name__ == "__main__":
    process.prepare_process()
    main()
