import io
import logging

import numpy as np
import pytest
from helpers import write_tfds
from PIL import Image

from unimm_jax.data import scenes, sources, transforms
from unimm_jax.data.sources.folder import FolderSource
from unimm_jax.data.sources.scenes import SceneSource
from unimm_jax.errors import DataError, InvalidRecordError


def _bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _rgb(size=(32, 24), colour=(200, 40, 40)):
    return Image.new("RGB", size, colour)


def test_ordinary_and_odd_images_become_rgb():
    cmyk = transforms.to_pixels(_bytes(_rgb().convert("CMYK"), "JPEG"), 16)
    assert np.abs(cmyk.astype(int).mean((0, 1)) - (200, 40, 40)).max() < 8
    deep = Image.fromarray(np.full((16, 16), 40000, np.uint16))
    assert np.abs(transforms.to_pixels(_bytes(deep), 16).astype(int) - 40000 // 257).max() <= 1
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (transforms.to_pixels(_bytes(clear), 16) == 255).all()
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    assert np.abs(transforms.to_pixels(_bytes(half), 16).astype(int) - 127).max() <= 1
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (transforms.to_pixels(_bytes(palette, transparency=0), 16) == 255).all()
    frames = _bytes(_rgb((16, 16)), "GIF", save_all=True, append_images=[_rgb((16, 16), (0, 0, 255))])
    assert np.abs(transforms.to_pixels(frames, 16).astype(int).mean((0, 1)) - (200, 40, 40)).max() < 8
    grey = Image.new("L", (16, 16), 90)
    assert (transforms.to_pixels(_bytes(grey), 16) == 90).all()
    turned = Image.new("RGB", (32, 16), "white")
    turned.paste((0, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: what was left comes to the top
    upright = transforms.decode_image(_bytes(turned, "JPEG", exif=exif, quality=95))
    assert upright.size == (16, 32)
    assert np.asarray(upright)[:12].mean() < 30 < 220 < np.asarray(upright)[20:].mean()


def _outcome(data):
    """Pixels, or why not."""
    try:
        return np.asarray(transforms.decode_image(data))
    except InvalidRecordError as error:
        return str(error)


def test_simplejpeg_and_pillow_give_the_same_pixels(monkeypatch):
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((53, 37))
    exif = Image.Exif()
    files = []
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        files.append(_bytes(image, "JPEG", exif=exif))
    for options in ({"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"keep_rgb": True}, {"quality": 5}):
        files.append(_bytes(image, "JPEG", **options))
    files += [_bytes(image.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    for at in noise.integers(2, len(files[0]), 100):  # damaged: read alike or refused alike
        files.append(files[0][:at] + bytes([noise.integers(256)]) + files[0][at + 1 :])
    assert transforms.simplejpeg is not None, "the tests need the extra [jpeg]"
    decode, calls, decoded = transforms.simplejpeg.decode_jpeg, [], []
    monkeypatch.setattr(transforms.simplejpeg, "decode_jpeg", lambda data: calls.append(data) or decode(data))
    fast = [_outcome(data) for data in files]
    assert set(files[:13]) <= set(calls) and not set(files[13:15]) & set(calls)
    monkeypatch.setattr(transforms, "simplejpeg", None)
    for data, pixels in zip(files, fast):
        plain = _outcome(data)
        assert type(plain) is type(pixels) and np.array_equal(plain, pixels)
        decoded.append(not isinstance(plain, str))
    assert all(decoded[:15]) and sum(decoded) > 15


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_bytes(Image.new("RGB", (1, 1))), "too small"),
        (_bytes(Image.new("L", (20000, 9))), "elongated"),
        (_bytes(_rgb(), "JPEG")[:300], "not a readable"),
        (b"", "not a readable"),
        (b"hello", "not a readable"),
    ],
)
def test_unusable_images_say_why(data, reason):
    with pytest.raises(InvalidRecordError, match=reason):
        transforms.decode_image(data)


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        (tmp_path / f"good{i}.png").write_bytes(_bytes(_rgb(colour=(i * 40, 10, 10))))
        (tmp_path / f"good{i}.txt").write_text(f"image {i}\nanother caption\n")
    (tmp_path / "lonely.png").write_bytes(_bytes(_rgb()))
    (tmp_path / "cut.jpg").write_bytes(_bytes(_rgb((64, 64)), "JPEG")[:200])
    (tmp_path / "cut.txt").write_text("cut off")
    (tmp_path / "latin.png").write_bytes(_bytes(_rgb()))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "blank.png").write_bytes(_bytes(_rgb()))
    (tmp_path / "blank.txt").write_text("  \n")
    return tmp_path


def test_bad_records_are_named_once_counted_and_skipped(folder, caplog):
    images = sources.DecodedDataset(sources.open_source(str(folder), held_out=0.0), 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = [images[i] for i in range(len(images))]
    assert len(images) == 8 and len(images.invalid) == 4
    assert all(item.pixels[0].shape == (16, 16, 3) and item.record.captions for item in found)
    text = "\n".join(r.getMessage() for r in caplog.records)
    for name, reason in (("lonely", "no caption"), ("cut.jpg", "readable"), ("latin", "UTF-8"), ("blank", "empty")):
        assert sum(name in line and reason in line for line in text.splitlines()) == 1
        assert any(name in images.source.key(i) and reason in why for i, why in images.invalid.items())
    again = sources.DecodedDataset(sources.open_source(str(folder), held_out=0.0), 16)
    assert [again[i].record.key for i in range(8)] == [item.record.key for item in found]


def test_a_source_with_nothing_usable_stops_with_the_reasons(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        sources.open_source(str(tmp_path))
    (tmp_path / "a.png").write_bytes(_bytes(_rgb()))
    (tmp_path / "b.png").write_bytes(b"nothing")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=r"no usable record among 2: .*1 × no caption file.*"):
        sources.DecodedDataset(sources.open_source(str(tmp_path)), 16)


def test_sources_are_checked_when_opened(tmp_path):
    with pytest.raises(DataError, match="neither an existing directory nor one of scenes"):
        sources.open_source(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no option 'colour'"):
        sources.open_source("scenes:colour=3")
    assert len(sources.open_source("scenes:count=7,jitter=9")) == 7


def test_a_tfds_directory_reads_like_the_folder_it_was_made_from(folder, tmp_path_factory):
    good = [FolderSource(str(folder))[i] for i in range(2, 6)]
    builder = write_tfds(tmp_path_factory.mktemp("tfds"), [(r.images[0], r.captions[0]) for r in good])
    source = sources.open_source(str(builder.data_path), held_out=0.0)
    images = sources.DecodedDataset(source, 16)
    found = {images[i].record.captions[0]: images[i].pixels[0] for i in range(4)}
    expected = {r.captions[0]: transforms.to_pixels(r.images[0], 16) for r in good}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[k], expected[k]) for k in found)
    half = [sources.open_source(str(builder.data_path), split, held_out=0.5) for split in ("train", "test")]
    assert sum(map(len, half)) == 4  # without a test split of its own, records are held out by the hash of their key


def test_a_crop_keeps_the_aspect_ratio_and_skips_images_that_would_lose_too_much(tmp_path, caplog):
    wide = np.full((40, 48, 3), 255, np.uint8)
    wide[:, 4:44] = (np.arange(40 * 40 * 3).reshape(40, 40, 3) // 7 % 256).astype(np.uint8)
    square = np.asarray(Image.fromarray(wide[:, 4:44]).resize((16, 16), Image.Resampling.BICUBIC))
    for image in (_bytes(Image.fromarray(wide)), wide):
        assert np.array_equal(transforms.to_pixels(image, 16, "crop", max_crop=0.2), square)
        assert not np.array_equal(transforms.to_pixels(image, 16), square)
    tall = np.asarray(Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90))
    turned = Image.fromarray(wide[:, 4:44]).transpose(Image.Transpose.ROTATE_90).resize((16, 16), 3)
    assert np.array_equal(transforms.to_pixels(tall, 16, "crop"), np.asarray(turned))
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    source = sources.open_source(f"folder:{tmp_path}", held_out=0.0)
    images = sources.DecodedDataset(source, 16, fit="crop", max_crop=0.2)
    assert [images.load(i) is None for i in range(2)] == [False, True]
    assert np.array_equal(images[1].pixels[0], square)  # the next usable record
    assert "80 × 40 pixels would lose 50%, more than max_crop=0.2" in images.invalid[1]
    assert all(x is not None for x in map(sources.DecodedDataset(source, 16).load, range(2)))


def test_scenes_are_a_source():
    source = SceneSource("test", count=5)
    images = sources.DecodedDataset(source, 64)
    scene = scenes.draw_scene(0, "test", 3)
    assert np.array_equal(images[3].pixels[0], scenes.render(scene))
    record = images[3].record
    assert [*record.captions, *record.prompts] == scenes.captions(scene) and len(record.captions) == 1


def test_a_dangling_link_is_named_and_skipped(folder, caplog):
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "gone.txt").write_text("gone")
    images = sources.DecodedDataset(sources.open_source(str(folder), held_out=0.0), 16)
    found = [images[i].record.key for i in range(len(images))]
    assert len(found) == 9 and "gone.png" not in found
    assert sum("gone.png: it is a symbolic link to a missing file" in r.getMessage() for r in caplog.records) == 1


def test_held_out_records_are_a_function_of_their_keys(folder):
    both = {s: sources.open_source(f"folder:{folder}", s, 0.5) for s in ("train", "test")}
    keys = {s: {source.key(i) for i in range(len(source))} for s, source in both.items()}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 8
    assert keys["train"] and keys["test"]
    (folder / "more.png").write_bytes(_bytes(_rgb()))  # a new record moves no other to another split
    again = sources.open_source(f"folder:{folder}", "test", 0.5)
    assert keys["test"] <= {again.key(i) for i in range(len(again))} <= keys["test"] | {"more.png"}
    with pytest.raises(DataError, match="none of them in its test split"):
        sources.open_source(f"folder:{folder}", "test", 0.0)


def test_fingerprints_follow_the_contents(folder):
    source = sources.open_source(str(folder), held_out=0.0)
    before = source.fingerprint()
    assert sources.open_source(str(folder), held_out=0.0).fingerprint() == before
    file = folder / "good1.png"
    data = file.read_bytes()
    file.write_bytes(data[:-20] + bytes(20))  # the same size and name
    assert source.fingerprint() != before
    file.write_bytes(data)
    (folder / "good1.txt").write_text("image 9\nanother caption\n")
    assert source.fingerprint() != before
    scenes_of = lambda text: sources.open_source(text).fingerprint()
    assert scenes_of("scenes:count=7") == scenes_of("scenes:count=7") != scenes_of("scenes:count=8")
