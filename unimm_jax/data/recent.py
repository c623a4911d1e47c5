"""Values that were last used, within a bound."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


class Recent:
    """The values that were last used, up to `limit` bytes, or one that has more. Several threads may use it.

    A value that several threads ask for at a time is loaded once.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._futures: collections.OrderedDict[Any, concurrent.futures.Future[Any]] = collections.OrderedDict()
        self._sizes: dict[Any, int] = {}  # of those that are loaded
        self._total = 0

    def get(self, key: Any, load: Callable[[], tuple[Any, int]]) -> Any:
        """The value of a key; `load` gives it with its size in bytes."""
        with self._lock:
            future = self._futures.get(key)
            if is_first := future is None:
                future = self._futures[key] = concurrent.futures.Future()
            else:
                self._futures.move_to_end(key)
        if is_first:
            try:
                value, size = load()
            except BaseException as error:
                with self._lock:
                    del self._futures[key]
                future.set_exception(error)
                raise
            future.set_result(value)
            with self._lock:
                self._sizes[key] = size
                self._total += size
                for old in [k for k in self._futures if k in self._sizes and k != key]:
                    if self._total <= self.limit:
                        break
                    self._total -= self._sizes.pop(old)
                    del self._futures[old]
        return future.result()

    def drop(self, is_stale: Callable[[Any], bool]) -> None:
        """Forgets the loaded values of which `is_stale` is true."""
        with self._lock:
            for key in [key for key in self._sizes if is_stale(self._futures[key].result())]:
                self._total -= self._sizes.pop(key)
                del self._futures[key]

    def __getstate__(self) -> int:
        return self.limit

    def __setstate__(self, limit: int) -> None:
        Recent.__init__(self, limit)
