"""unimm_jax: pretraining of unified image-and-text language models in JAX.

One decoder-only language model reads images as continuous features and writes them as codes of a learned visual
vocabulary. The README gives a reading order for the code.
"""

__version__ = "0.2.0"
