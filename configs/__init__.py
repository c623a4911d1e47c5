"""One file per stage; `get_config(size)` returns its config. `unimm_jax.resolve` adds the defaults."""
