"""Input: sources, transforms, records, packing and pipelines. Nothing here imports JAX."""
