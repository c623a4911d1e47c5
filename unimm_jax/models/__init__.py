"""Networks as Flax NNX modules. They do not depend on data, optimizers or checkpoints.

Shape letters, the same in every file: B batch, T sequence, D model width, N heads, K key/value heads, H head width,
F feed-forward width, V vocabulary, P patches, S kept tokens, C code width, L layers.
"""
