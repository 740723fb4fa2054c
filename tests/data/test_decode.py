"""Every kind of picture that turns up in a set: what it decodes to, or why it does not."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import ExifTags, Image

from dense2conv.data.decode import BadImage, decode, prepared
from dense2conv.shapes import InputError

_ORIENTATION = 0x0112


def photograph(height=40, width=60, seed=0):
    """Smooth colours, which survive JPEG."""
    y, x = np.mgrid[:height, :width] / max(height, width, 2)
    phase = np.random.default_rng(seed).uniform(0, 6, (3, 1, 1))
    planes = 128 + 100 * np.sin(3 * x + 5 * y + phase)
    return planes.transpose(1, 2, 0).astype(np.uint8)


def encoded(pixels, kind="JPEG", mode=None, **options):
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def png(header, lines, *others):
    """A PNG of that header, and those lines behind a byte for each one's filter."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, content)
        for kind, content in [
            (b"IHDR", header),
            *others,
            (b"IDAT", zlib.compress(lines)),
            (b"IEND", b""),
        ]
    )


def png_of_size(width, height, *others):
    """A PNG of that size by its header, in a hundred bytes."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"", *others)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (1, 1), (17, 3), (64, 64)])
def test_jpeg_has_pillows_bits(subsampling, height, width):
    for quality in (10, 90):
        data = encoded(photograph(height, width), quality=quality, subsampling=subsampling)
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_pictures_come_back_exactly(kind):
    pixels = photograph()
    assert np.array_equal(decode(encoded(pixels, kind)), pixels)


def test_webp_and_gif_come_back_nearly():
    for kind in ("WEBP", "GIF"):
        error = np.abs(decode(encoded(photograph(), kind)).astype(int) - photograph())
        assert error.mean() < 15


def test_grey_has_three_equal_channels():
    grey = photograph()[..., 0]
    for kind in ("PNG", "JPEG"):
        pixels = decode(encoded(grey, kind))
        assert pixels.shape == (40, 60, 3)
        assert np.abs(pixels.astype(int) - grey[..., None]).max() < 6
        assert (pixels == pixels[..., :1]).all()


def test_cmyk_is_the_picture_not_its_negative():
    error = np.abs(
        decode(encoded(photograph(), mode="CMYK", quality=95)).astype(int) - photograph()
    )
    assert error.mean() < 5


def test_sixteen_bits_become_eight_and_are_not_clipped():
    levels = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(encoded(levels, kind))[..., 0], levels >> 8)


def test_palettes_and_transparency():
    pixels = photograph()
    paletted = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decode(encoded(np.asarray(pixels), "PNG", mode="RGBA")), pixels)
    file = io.BytesIO()
    paletted.save(file, "PNG", transparency=0)
    assert np.array_equal(decode(file.getvalue()), np.asarray(paletted.convert("RGB")))


def test_an_animation_is_its_first_frame():
    frames = [Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    pixels = decode(file.getvalue())
    assert pixels.shape == (8, 9, 3)
    assert (pixels == 10).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_so_it_is_of_other_animations_and_of_pages(kind):
    frames = [Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode(file.getvalue()).astype(int) - 10).max() < 3


def test_sixteen_bits_of_colour_become_eight():
    levels = np.linspace(0, 65535, 4 * 5 * 3).astype(">u2").reshape(4, 5, 3)
    lines = b"".join(b"\0" + row.tobytes() for row in levels)
    data = png(struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0), lines)
    assert np.array_equal(decode(data), levels >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_upright(orientation, kind):
    upright = photograph()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    pixels = decode(encoded(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 3


_JPEG, _PNG = encoded(photograph()), encoded(photograph(), "PNG")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "is empty"),
        (b"not a picture", "is no picture of a known format"),
        (b"\xff\xd8", "is no picture of a known format"),
        (encoded(photograph(200, 300))[:-500], "truncated"),
        (_PNG[: len(_PNG) // 2], "cannot be decoded"),
        (_PNG[:60] + bytes(40) + _PNG[100:], "cannot be decoded"),
        (png_of_size(20_000, 20_000), "too large"),
        (png_of_size(2**31 - 1, 2**31 - 1), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a known format"),
        (encoded(np.zeros((4, 4), np.float32), "TIFF"), "floating-point"),
    ],
    ids="empty text two-bytes half-jpeg half-png holed-png huge-png bomb postscript float".split(),
)
def test_what_is_no_picture_says_why(data, named):
    with pytest.raises(BadImage, match=named):
        decode(data)


def test_a_bomb_of_any_kind_is_refused_by_its_header():
    sides, huge = struct.pack("<HH", 61, 67), struct.pack("<HH", 60_000, 60_000)
    gif = encoded(photograph(67, 61), "GIF").replace(sides, huge)
    bmp = bytearray(encoded(photograph(67, 61), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    for data in (gif, bytes(bmp), b"P6 60000 60000 255\n"):
        with pytest.raises(BadImage, match="too large"):
            decode(data)


def test_a_text_that_unpacks_to_a_gigabyte_is_not_unpacked():
    text = b"Comment\0\0" + zlib.compress(bytes(100_000_000))
    with pytest.raises(BadImage, match="Decompressed data too large"):
        decode(png_of_size(4, 4, (b"zTXt", text)))


def test_a_huge_jpeg_is_refused_by_its_header():
    data = bytearray(_JPEG)
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(BadImage, match="too large"):
        decode(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on tags that make no sense
def test_no_byte_string_escapes_as_another_error():
    generator = np.random.default_rng(0)
    for data in (_JPEG, _PNG, encoded(photograph(), "GIF"), encoded(photograph(), "TIFF")):
        for _ in range(40):
            broken = bytearray(data)
            for place in generator.integers(0, len(data), 8):
                broken[place] = generator.integers(256)
            try:
                pixels = decode(bytes(broken))
            except BadImage:
                continue
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3


def test_resizing_averages_and_keeps_the_shape():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, ::2] = 255  # finest stripes: any sampling without averaging shows them
    small = prepared(pixels, 8, 3)
    assert small.shape == (8, 16, 3)
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() < 12
    assert prepared(photograph(30, 50), 0, 1).shape == (30, 50, 1)
    assert prepared(photograph(1, 1), 8, 3).shape == (8, 8, 3)


def test_grey_is_pillows_luma():
    pixels = photograph()
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(prepared(pixels, 0, 1)[..., 0], expected)


def test_a_line_is_not_enlarged_to_a_gigabyte():
    with pytest.raises(BadImage, match="1×20000 pixels is too narrow"):
        prepared(np.zeros((1, 20_000, 3), np.uint8), 64, 3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt simplejpeg"):
        decode(_JPEG)


def _astronaut(height=480, width=512):
    photograph = np.asarray(Image.open(Path(skimage.data.__file__).parent / "astronaut.png"))
    return np.asarray(Image.fromarray(photograph).resize((width, height), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("resize", "height", "width"),
    [(0, 480, 512), (121, 480, 512), (120, 240, 256), (60, 120, 128), (30, 60, 64), (8, 60, 64)],
)
def test_a_large_jpeg_comes_at_a_fraction_that_is_twice_as_large_as_asked_for(
    resize, height, width
):
    data = encoded(_astronaut(), quality=90)
    found = decode(data, resize)
    assert found.shape == (height, width, 3)
    if height == 480:
        assert np.array_equal(found, decode(data))


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("resize", [36, 72])
def test_a_fraction_is_nearly_the_whole_picture_when_resized(resize, subsampling):
    data = encoded(_astronaut(), quality=92, subsampling=subsampling)
    whole, found = (prepared(decode(data, r), resize, 3).astype(float) for r in (0, resize))
    assert whole.shape == found.shape
    psnr = 10 * np.log10(255**2 / np.square(whole - found).mean())
    assert 36 < psnr < 60, psnr
    spectra = [np.abs(np.fft.fft2(p.mean(2) - p.mean())) ** 2 for p in (whole, found)]
    frequency = np.hypot(np.fft.fftfreq(whole.shape[0])[:, None], np.fft.fftfreq(whole.shape[1]))
    kept = [spectrum[(frequency > 0.2) & (frequency < 0.4)].sum() for spectrum in spectra]
    assert 0.9 < kept[1] / kept[0] < 1.02


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_large_turned_photograph_is_upright_too(orientation):
    pixels = _astronaut()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(pixels, quality=95, exif=exif.tobytes())
    upright = np.rot90(pixels, {3: 2, 6: 3}[orientation])
    found = prepared(decode(data, 36), 36, 3)
    expected = prepared(np.ascontiguousarray(upright), 36, 3)
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 3


def test_a_fraction_of_odd_sizes_is_rounded_up():
    for height, width in [(479, 333), (401, 397)]:
        found = decode(encoded(_astronaut(height, width)), 20)
        assert found.shape[:2] == (-(-height // 8), -(-width // 8))
