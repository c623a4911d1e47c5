"""Faults at random moments of training: does the run end with the same bits? See `__main__.py`."""
