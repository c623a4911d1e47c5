"""One file a stage; `get_config(size)` gives its ConfigDict."""
