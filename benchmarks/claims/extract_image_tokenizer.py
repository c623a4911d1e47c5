"""Writes the image tokenizer of a trained pixel tokenizer as a checkpoint of the tokenizer stage.

python -m benchmarks.claims.extract_image_tokenizer --pixel_tokenizer=W --output=runs/P/tokenizer

All commands read the result like any other image tokenizer. The pixel decoder of the loss is left out.
"""

import argparse
import pathlib
import time


def extract(source: pathlib.Path, output: pathlib.Path) -> None:
    """Reads the newest checkpoint under `source` and writes its image tokenizer to `output`."""
    from benchmarks.claims import stages, train_pixel_tokenizer
    from benchmarks.claims.pixel_tokenization import image_tokenizer_config
    from unimm_jax.checkpoint import Checkpoints, read_meta, read_params
    from unimm_jax.inference.loading import stage_config

    began = time.perf_counter()
    train_pixel_tokenizer.register()
    meta, params = read_meta(source), read_params(source)
    config = image_tokenizer_config(stage_config(meta, source))
    params.pop("pixel_decoder")
    checkpoints = Checkpoints(output)
    checkpoints.save(meta["step"], {"params": params}, meta | {"config": config.to_json()})
    checkpoints.close()
    (output / "config.json").write_text(config.to_json())
    stages.write_done(output, time.perf_counter() - began)


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixel_tokenizer", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    process.prepare()
    process.run(lambda: extract(flags.pixel_tokenizer, flags.output))


if __name__ == "__main__":
    main()
