"""Texts without images in JSON Lines."""

from typing import Any

from unimm_jax.data.sources.files import RowSource, text_of


class TextSource(RowSource):
    """Rows {"text": text}."""

    evaluator = ""
    options = ()
    fields = ("text",)

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See `RowSource.parse`."""
        return [], {"text": text_of(row, ("text",))}
