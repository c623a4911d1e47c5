"""Lines that show how far a long command is, its speed and its ETA."""

import time


def duration(seconds: float) -> str:
    """A time as M:SS, from an hour on as H:MM:SS: `duration(4000)` is `1:06:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Prints speed and ETA.

    Args (constructor):
      total: number of items. name: what they are. every: number of batches between two lines.
    """

    def __init__(self, total: int, name: str = "records", every: int = 10):
        self.total, self.name, self.every = total, name, every
        self.done, self.batches, self.began = 0, 0, time.perf_counter()

    def add(self, records: int) -> None:
        """Counts the records of a batch."""
        self.done, self.batches = self.done + records, self.batches + 1
        if self.batches % self.every == 0:
            speed = self.done / (time.perf_counter() - self.began)
            left = (self.total - self.done) / speed
            print(f"{self.name}  {self.done}/{self.total}  {speed:.0f}/s  ETA {duration(left)}", flush=True)
