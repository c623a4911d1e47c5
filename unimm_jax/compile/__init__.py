"""Ahead-of-time compilation for TPU topologies, and what chips can do."""
