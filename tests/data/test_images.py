"""Pictures of every kind as a tower reads them, and those that are refused."""

import io
import struct
import zlib

import numpy as np
import pytest

from minimind_jax.data import images
from minimind_jax.data.images import read_image
from minimind_jax.errors import UserError
from minimind_jax.model.config import TowerConfig

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

SIDE = 20
COLOURS = np.random.default_rng(0).integers(0, 256, (23, 37, 4)).astype(np.uint8)
COLOURS[:, :, 3] = np.where(np.arange(37) < 18, 0, 255)  # the left half is transparent


def tower(resample=2):
    return TowerConfig(16, 24, 2, 2, SIDE, 10, resample=resample)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rgb(array=COLOURS):
    return Image.fromarray(np.ascontiguousarray(array[:, :, :3]))


def resized(image, resample=2):
    return np.asarray(image.resize((SIDE, SIDE), resample))


def read(content, **changes):
    found = read_image(content, tower(**changes), "row 3")
    assert found.shape == (SIDE, SIDE, 3) and found.dtype == np.uint8
    return found


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_a_picture_is_resized_with_the_tower_s_filter(resample, tmp_path):
    content = encoded(rgb())
    np.testing.assert_array_equal(read(content, resample=resample), resized(rgb(), resample))
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(read(tmp_path / "a.png", resample=resample), resized(rgb(), resample))


def on_white():
    flat = COLOURS[:, :, :3].copy()
    flat[:, :18] = 255
    return flat


def palette_with_a_transparent_entry():
    indices = np.where(np.arange(37) < 18, 0, 1) * np.ones((23, 1), int)
    image = Image.fromarray(indices.astype(np.uint8), "L").convert("P")
    image.putpalette([9, 9, 9, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(rgb().convert("L")), np.repeat(np.asarray(rgb().convert("L"))[:, :, None], 3, axis=2)),
        (encoded(rgb().convert("1")), np.repeat(np.asarray(rgb().convert("1").convert("L"))[:, :, None], 3, axis=2)),
        (encoded(Image.fromarray(COLOURS)), on_white()),
        (encoded(Image.fromarray(COLOURS[:, :, 2:])), np.where(np.arange(37)[:, None] < 18, 255, COLOURS[:, :, 2:3])),
        (
            encoded(palette_with_a_transparent_entry(), transparency=0),
            np.where((np.arange(37) < 18)[None, :, None], 255, [200, 100, 50]) * np.ones((23, 1, 1), int),
        ),
        (
            encoded(Image.fromarray(COLOURS[:, :, 0].astype(np.uint16) * 257)),  # 16 bits of grey
            np.repeat(COLOURS[:, :, :1], 3, axis=2),
        ),
        (encoded(rgb(), "BMP"), COLOURS[:, :, :3]),
        (encoded(rgb(), "TIFF"), COLOURS[:, :, :3]),
        (encoded(rgb(), "WEBP", lossless=True), COLOURS[:, :, :3]),
    ],
    ids=["grey", "black and white", "RGBA", "LA", "palette", "16 bits", "BMP", "TIFF", "WebP"],
)
def test_every_mode_is_seen_in_its_colours(content, expected):
    expected = np.broadcast_to(expected, (23, 37, 3)).astype(np.uint8)
    np.testing.assert_array_equal(read(content), resized(Image.fromarray(expected)))


def test_cmyk_is_seen_in_its_colours():
    orange = Image.new("RGB", (40, 40), (240, 120, 20))
    for options in ({}, {"quality": 100}):
        found = read(encoded(orange.convert("CMYK"), "JPEG", **options))
        assert np.abs(found.astype(int) - [240, 120, 20]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_the_camera_was_held(orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that EXIF's number asks for, backwards
    upright = rgb()
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read(encoded(stored, exif=exif)), resized(upright))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_seen_and_that_is_said(form):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if form == "WEBP" else {}
    content, told = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options), []
    found = read_image(content, tower(), "row 3", told.append)
    np.testing.assert_array_equal(found, np.broadcast_to([255, 0, 0], (SIDE, SIDE, 3)))
    assert told == ["of animated pictures only the first is seen"]
    read_image(encoded(frames[0], form), tower(), "row 3", pytest.fail)


def test_of_a_scan_of_several_pages_the_first_is_seen_and_that_is_said():
    pages, told = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")], []
    found = read_image(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), tower(), "row 3", told.append)
    np.testing.assert_array_equal(found, np.broadcast_to([255, 0, 0], (SIDE, SIDE, 3)))
    assert told == ["of the pages of a TIFF file only the first is seen"]
    read_image(encoded(pages[0], "TIFF"), tower(), "row 3", pytest.fail)


def png_of_claimed_size(width, height):
    """A header that promises so many pixels over a few bytes of data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 1000))]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in (*chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture that is read"),
        (b"GIF89a", "not a picture that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that is read"),  # would start Ghostscript
        (encoded(rgb())[:900], "a damaged picture"),
        (encoded(rgb(), "JPEG")[:300], "not a picture that is read .* or a damaged one"),
        (encoded(rgb(), "JPEG")[:-200], "a damaged picture"),
        (png_of_claimed_size(60_000, 60_000), "too many pixels; at most 67,108,864"),  # Pillow refuses it
        (png_of_claimed_size(9_000, 9_000), r"a picture of 9,000 x 9,000 pixels; at most 67,108,864 .* shrink it"),
        (png_of_claimed_size(30, 30), "a damaged picture"),
        (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), r"numbers without a scale \(mode F\)"),
    ],
)
def test_what_is_no_sound_picture_is_refused_with_its_place(content, message):
    with pytest.raises(UserError, match=f"^row 3: .*{message}"):
        read(content)


def test_a_large_picture_is_refused_before_it_is_decoded(monkeypatch):
    content = encoded(rgb())
    monkeypatch.setattr(images, "MOST_PIXELS", 23 * 37 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="a picture of 37 x 23 pixels"):
        read(content)


def test_a_path_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"row 3: the picture .*none\.png cannot be read: No such file"):
        read(tmp_path / "none.png")
    with pytest.raises(UserError, match=r"row 3: the picture .* cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"too long; the base64 of a picture stands behind data:image/png") as error:
        read(tmp_path / ("iVBORw0K" * 9999))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not a picture .*, but an empty file; save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"not a picture .*, or a damaged one; save it as JPEG or PNG"),
        (encoded(rgb())[:900], "a damaged picture"),
        (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "numbers without a scale"),
    ],
)
def test_a_file_that_is_no_sound_picture_is_named(content, message, tmp_path):
    (tmp_path / "a b.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"^row 3: \S+a b\.png: .*{message}"):
        read(tmp_path / "a b.png")
    with pytest.raises(UserError, match=rf"^a b\.png:1: [^/]*{message}"):  # once
        read_image(tmp_path / "a b.png", tower(), "a b.png:1")


def test_pixels_are_those_of_transformers_processor():
    transformers = pytest.importorskip("transformers", minversion="5", reason="4.57 leaves transparency out")
    for resample in (2, 3):
        processor = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, resample=resample)
        for image in (rgb(), Image.fromarray(COLOURS), rgb().convert("CMYK"), palette_with_a_transparent_entry()):
            form = "TIFF" if image.mode == "CMYK" else "PNG"
            theirs = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
            ours = (read(encoded(image, form), resample=resample).astype(np.float32) / 255 - 0.5) / 0.5
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
