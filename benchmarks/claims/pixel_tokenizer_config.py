"""Config of the arms P and P2 of `semantic_tokenizer`: size `laptop-illume`'s tokenizer stage with a pixel loss.

"P" trains the encoder from scratch (VQGAN); "P2" has the frozen text-aligned encoder. Everything else is equal.
"""

from configs import common, pixel_decoder, tokenizer

SIZE = "laptop-illume"


def get_config(arm="P"):
    """Config of an arm, "P" or "P2"."""
    c = tokenizer.get_config(SIZE)
    c.objective = "pixel_tokenization"
    c.model.pixel_decoder = common.of_size(SIZE, pixel_decoder.SHAPES)
    if arm == "P":
        codebook = "quantizer/(codebook|count)"
        c.optimizer.rules = [(codebook, common.FROZEN), (f"(?!{codebook}).*", 1.0)]
        c.init_from = ()
    return c
