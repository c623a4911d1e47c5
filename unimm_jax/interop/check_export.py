"""Opens an exported directory without JAX and compares it with numbers that JAX computed.

python unimm_jax/interop/check_export.py EXPORTED EXPECTED.npz
"""

import sys


def main(folder: str, expected: str) -> None:
    """Prints the largest difference of logits, relative to the largest logit, and whether codes and ids are equal."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    wanted = np.load(expected)
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = language(torch.tensor(wanted["ids"])).logits.numpy()
    gap = np.abs(found - wanted["logits"]).max() / max(1.0, np.abs(wanted["logits"]).max())
    print(f"language model: largest difference of logits {gap:.1e}")
    if "images" in wanted:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        keep, codes = model.tokenize(torch.tensor(wanted["images"]))
        same = bool((keep.numpy() == wanted["keep"]).all() and (codes[keep].numpy() == wanted["codes"]).all())
        print(f"image tokenizer: keep masks and codes {'equal' if same else 'DIFFER'}")
    if "jax" in sys.modules:
        raise RuntimeError("JAX was imported")


if __name__ == "__main__":
    main(*sys.argv[1:3])
