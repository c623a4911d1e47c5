"""Running trained models: loading, sampling, generation, pretokenization."""
