"""Config of the arms P and P2 of `semantic_tokenizer`: size `laptop-illume`'s tokenizer stage with a pixel loss.

"P" trains the encoder from scratch (VQGAN); "P2" has the frozen text-aligned encoder. Each has two stages: "P_start"
and "P2_start" train without codes, for as many steps as the encoder stage; "P" and "P2" continue with codes. Everything
else is equal.
"""

from configs import common, encoder, pixel_decoder, tokenizer

SIZE = "laptop-illume"
CODEBOOK = "quantizer/(codebook|count)"


def get_config(kind="P"):
    """Config of "P", "P2", "P_start" or "P2_start"."""
    arm, _, start = kind.partition("_")
    c = tokenizer.get_config(SIZE)
    c.objective = "pixel_tokenization"
    c.model.pixel_decoder = common.of_size(SIZE, pixel_decoder.SHAPES)
    if arm == "P":
        c.optimizer.rules = [(CODEBOOK, common.FROZEN), (f"(?!{CODEBOOK}).*", 1.0)]
    if start:
        c.loss.phase = "selector"
        c.train.steps = encoder.get_config(SIZE).train.steps
        if arm == "P":
            c.init_from = ()
    else:
        c.init_from = (dict(checkpoint="../pixel_start", rename=[(f"(?!{CODEBOOK})", "")]),)
    return c
