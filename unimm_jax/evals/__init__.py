"""Benchmarks, one file each: the official format read, the official rule applied."""
