"""Config of the arms P and P2 of `semantic_tokenizer`: size `laptop-illume`'s tokenizer stage with a pixel loss.

"P" trains the encoder, too (VQGAN). It starts from "encoder", the same model trained from scratch without codes, for as
many steps as the encoder stage. "P2" has the frozen text-aligned encoder. Everything else is equal.
"""

from configs import common, encoder, pixel_decoder, tokenizer

SIZE = "laptop-illume"
CODEBOOK = "quantizer/(codebook|count)"


def get_config(arm="P"):
    """Config of an arm, "P" or "P2", or of the stage before "P", "encoder"."""
    c = tokenizer.get_config(SIZE)
    c.objective = "pixel_tokenization"
    c.model.pixel_decoder = common.of_size(SIZE, pixel_decoder.SHAPES)
    if arm != "P2":
        c.optimizer.rules = [(CODEBOOK, common.FROZEN), (f"(?!{CODEBOOK}).*", 1.0)]
        c.init_from = (dict(checkpoint="../pixel_encoder", rename=[(f"(?!{CODEBOOK})", "")]),)
    if arm == "encoder":
        c.loss.phase = "selector"
        c.train.steps = encoder.get_config(SIZE).train.steps
        c.init_from = ()
    return c
