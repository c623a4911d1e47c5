"""Networks. Flax NNX defines them; they know nothing of data, optimisers, meshes or checkpoints.

Shape letters, the same in every file: B batch, T sequence, D model width, N heads, K key/value heads, H head width,
F feed-forward width, V vocabulary, P patches, S kept tokens, C code width, L layers.
"""
