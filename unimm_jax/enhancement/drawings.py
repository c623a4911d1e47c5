"""Drawings: images that the model generates for a share of the training captions, in blocks that a run can resume."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from unimm_jax import checkpoint as checkpoints
from unimm_jax import distributed, storage
from unimm_jax.data import transforms
from unimm_jax.data.records import Records
from unimm_jax.data.sources import source_number, split_sources
from unimm_jax.enhancement.files import HEADER, claim, digest_of, hashed, read_header
from unimm_jax.errors import DataError, InvalidRecordError
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.sampling import Sampling
from unimm_jax.progress import Progress

BLOCK = 256  # drawings per block; an interrupted run loses at most one block per process
MAX_TOKENS = 1000  # of a text; longer ones are not drawn
REMEDY = "draw images with python -m unimm_jax.self_enhance generate"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An image that was generated for a text.

    Attributes:
      index: of the drawing. record: index of the record in the training split. key: of the record.
      prompt: the text. text: its index among the texts of the record.
      image: path of the PNG, relative to the directory. seed: of the block that the drawing is in.
    """

    index: int
    record: int
    key: str
    prompt: str
    text: int
    image: str
    seed: int


@dataclasses.dataclass(frozen=True)
class DrawingSettings:
    """What is drawn.

    Attributes:
      share: of the records, from 0 to 1. samples: images per chosen record.
      guidance, temperature, top_k, top_p: see `Sampling`. seed: of the choice and of the images.
      decoder: from codes to pixels; the first one present if empty. batch: images at a time.
      source: only records of this source, or of the only one that has this format; all if empty.
    """

    share: float = 0.1
    samples: int = 1
    guidance: float = 1.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    decoder: str = ""
    batch: int = 64
    source: str = ""

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        return Sampling(self.guidance, self.temperature, self.top_k, self.top_p)


class Drawings:
    """The drawings in a directory that `draw` wrote.

    Attributes:
      header: what they were drawn from. identity: a digest of the header.

    Raises (constructor):
      DataError: there are none.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = storage.path(path)
        self.header = read_header(self.path, REMEDY)
        if "blocks" not in self.header or "drawings" not in self.header:
            raise DataError(f"{self.path / HEADER} is not of drawings; {REMEDY}")
        self.identity = digest_of(self.header)

    def __len__(self) -> int:
        return int(self.header["drawings"])

    def complete(self) -> list[int]:
        """Numbers of the blocks that are complete."""
        return _complete(self.path, range(self.header["blocks"]))

    def block(self, number: int) -> list[Drawing]:
        """The drawings of a complete block.

        Raises:
          DataError: its file is damaged.
        """
        file = _block_file(self.path, number)
        try:
            return [Drawing(**json.loads(line)) for line in storage.read(file).decode().splitlines()]
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error}); remove it and {REMEDY}") from None

    def encoded(self, drawing: Drawing) -> bytes:
        """The PNG of a drawing.

        Raises:
          DataError: it is missing.
        """
        try:
            return storage.read(self.path / drawing.image)
        except FileNotFoundError:
            file = _block_file(self.path, drawing.index // self.header["block"])
            raise DataError(f"{self.path / drawing.image} is missing; remove {file} and {REMEDY}") from None

    def image(self, drawing: Drawing) -> np.ndarray:
        """The pixels of a drawing, uint8 [H, W, 3].

        Raises:
          DataError: the image is missing or damaged.
        """
        try:
            return np.asarray(transforms.decode_image(self.encoded(drawing)))
        except InvalidRecordError as error:
            raise DataError(f"{self.path / drawing.image} is damaged ({error})") from None


def _block_file(folder: pathlib.Path, block: int) -> pathlib.Path:
    return folder / "blocks" / f"{block:06d}.jsonl"


def _complete(folder: pathlib.Path, blocks: Sequence[int]) -> list[int]:
    """Those of some blocks that are complete."""
    names = storage.children(folder / "blocks")
    return [block for block in blocks if _block_file(folder, block).name in names]


def draw(checkpoint: str, records: str, output: str, settings: DrawingSettings, tensor: int = 1) -> None:
    """Draws images for a share of the captions and prompts of the training split.

    Blocks of `BLOCK` drawings are split over the processes; an interrupted run resumes with the missing blocks. Does
    nothing if all are there.

    Args:
      checkpoint: workdir or step directory of a language stage. records: directory that `pretokenize` wrote.
      output: directory for the drawings. tensor: local devices over which the language model is split.

    Raises:
      CheckpointError: no such model, or no decoder beside it.
      DataError: no records, none with captions, or drawings of another run in `output`.
      StartupError: processes do not see the same `output`.
    """
    _ = settings.sampling  # raises for wrong settings before anything is loaded
    stored = Records.open(storage.path(records))
    number = source_number(settings.source, split_sources(stored.header["sources"])) if settings.source else None
    if settings.source and number is None:
        raise DataError(
            f"the records in {records} have no source {settings.source!r}; theirs are {stored.header['sources']}"
        )
    chosen, unusable = select(stored, settings.share, settings.seed, number)
    if not chosen:
        raise DataError(
            f"none of the {len(stored)} records in {records} was chosen; raise --share, or give records with captions"
        )
    if unusable and jax.process_index() == 0:
        print(
            f"drawings: {unusable} chosen records have no caption or prompt of at most {MAX_TOKENS} tokens", flush=True
        )
    generator = Generator(load_model(checkpoint, tensor), settings.batch)
    decoder = generator.decoder_name(settings.decoder)
    model = generator.model
    used = dataclasses.asdict(settings) | {"decoder": decoder}
    if not generator.decoders[decoder][0].size_unit:
        del used["batch"]  # only the noise of a diffusion decoder depends on it
    identity = dict(
        checkpoint=_digest(storage.path(checkpoint)),
        step=model.step,
        decoder=_digest(storage.at(model.workdir, model.config.companions[decoder])),
        records=contents_of(stored),
        settings=used,
    )
    draw_blocks(generator, stored, chosen, storage.path(output), settings, identity)


def draw_blocks(
    generator: Generator,
    stored: Records,
    chosen: Sequence[tuple[int, int]],
    folder: pathlib.Path,
    settings: DrawingSettings,
    identity: dict[str, Any],
) -> None:
    """Draws the missing blocks of this process; see `draw`.

    The tokens of a drawing are a function of the seed and its index, whatever the batch and the number of processes.

    Args:
      chosen: (record, index of the text) of each text; see `select`. identity: of what the drawings depend on.
    """
    distributed.check_shared(folder, "output")
    count = len(chosen) * settings.samples
    blocks = -(-count // BLOCK)
    claim(folder, identity | dict(drawings=count, block=BLOCK, blocks=blocks), "drawings")
    (folder / "blocks").mkdir(exist_ok=True)
    mine = [b for b in range(blocks) if b % jax.process_count() == jax.process_index()]
    missing = sorted(set(mine) - set(_complete(folder, mine)))
    progress = Progress(sum(min(BLOCK, count - b * BLOCK) for b in missing), "drawings", every=1)
    for block in missing:
        seed = int(np.random.SeedSequence([settings.seed, block]).generate_state(1)[0] >> 1)
        drawings = []
        for index in range(block * BLOCK, min((block + 1) * BLOCK, count)):
            record, text = chosen[index // settings.samples]
            item, name = stored[record], f"images/{block:06d}/{index:08d}.png"
            drawings.append(Drawing(index, record, item.key, item.texts[text], text, name, seed))
        ids = generator.generate_image_tokens([drawing.prompt for drawing in drawings], settings.sampling, seed)
        images = generator.decode(*generator.codes(ids), settings.decoder, seed)
        spool = storage.Spool(folder)
        (spool.folder / f"images/{block:06d}").mkdir(parents=True, exist_ok=True)
        for drawing, image in zip(drawings, images, strict=True):
            (spool.folder / drawing.image).write_bytes(transforms.encode_png(image))
        spool.close()
        lines = [json.dumps(dataclasses.asdict(drawing)) for drawing in drawings]
        storage.write_whole(_block_file(folder, block), "".join(f"{line}\n" for line in lines).encode())
        progress.add(len(drawings))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"drawings {folder.name}")
    if jax.process_index() == 0:
        print(f"drawings: {count} images for {len(chosen)} texts are in {folder}", flush=True)


def select(stored: Records, share: float, seed: int, source: int | None = None) -> tuple[list[tuple[int, int]], int]:
    """Chooses records to draw for, and one text of each.

    A record is chosen by a hash of (seed, record), its caption or prompt by another one.

    Args:
      source: number of the source of the records; None is all.

    Returns:
      (record, index of the text among its texts) of each text, and the number of chosen records that have no caption
      or prompt of at most `MAX_TOKENS` tokens.
    """
    order = hashed(seed, np.arange(len(stored)))
    wanted = (order >> np.uint64(11)) * 2.0**-53 < share
    records = np.flatnonzero(wanted if source is None else wanted & (np.asarray(stored.source) == source))
    found = []
    for record, pick in zip(records.tolist(), hashed(seed + 1, order[records]).tolist(), strict=True):
        outline, counts = stored.outline(record), stored.texts[record]
        if texts := [text for text in outline.captions + outline.prompts if counts[text] <= MAX_TOKENS]:
            found.append((record, texts[pick % len(texts)]))
    return found, len(records) - len(found)


def _digest(checkpoint: pathlib.Path) -> str:
    """The digest of the files of a checkpoint."""
    step = checkpoints.find(checkpoint)
    return str(json.loads((step / checkpoints.DIGESTS).read_text())["self"])[:16]


def contents_of(stored: Records) -> str:
    """The digest of the contents of records; "" where an old version wrote none."""
    return str(stored.header.get("contents", ""))
