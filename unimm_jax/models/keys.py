"""Random keys for the initial values of parameters."""

import jax


class Keys:
    """Gives the keys fold_in(key, 0), fold_in(key, 1), ... in the order of the calls, as `nnx.Rngs` does.

    It counts in Python. `nnx.Rngs` counts with a variable, and under a trace every increment of that variable searches
    the whole trace, which makes tracing a large model several times slower (docs/performance.md).

    Args (constructor):
      params: a seed, or a key.
    """

    def __init__(self, params: int | jax.Array):
        self._key = jax.random.key(params) if isinstance(params, int) else params
        self._count = 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)
