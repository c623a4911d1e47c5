"""Input: sources, transforms, packing and pipelines. Nothing in here imports JAX (workers must stay plain)."""
