"""Decoded images are Pillow's, crops are drawn as documented, and what is damaged is named."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from gnp.data import decode
from gnp.data.decode import random_resized_crop, readable, size_of, stored
from gnp.data.records import ArrayRecords, DamagedError, Record

pytestmark = pytest.mark.filterwarnings("ignore")  # what Pillow thinks of odd images


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def record(image, label=0) -> Record:
    return Record(image, label, "folder/some.jpg")


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture whose every place has a colour of its own."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    blue = 127 + 60 * np.sin(5 * math.pi * x / width) + 60 * np.cos(3 * math.pi * y / height)
    pixels = np.stack([red, green, blue], -1).round().astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixels_of(image: Image.Image, mode: str) -> np.ndarray:
    pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if mode == "L" else pixels


# Modes


def with_palette(**options) -> bytes:
    return encoded(smooth(9, 7).convert("P"), "PNG", **options)


FILES = {
    "1": encoded(smooth(9, 7, "1")),
    "L": encoded(smooth(9, 7, "L")),
    "LA": encoded(smooth(9, 7, "LA")),
    "P": with_palette(),
    "P, one transparent": with_palette(transparency=3),
    "P, all of some transparency": with_palette(transparency=bytes(range(256))),
    "P of a GIF": encoded(smooth(9, 7), "GIF"),
    "RGB": encoded(smooth(9, 7)),
    "RGB, transparent colour": encoded(smooth(9, 7), transparency=(0, 0, 127)),
    "RGBA": encoded(smooth(9, 7, "RGBA")),
    "RGB of a BMP": encoded(smooth(9, 7), "BMP"),
    "RGB of a TIFF": encoded(smooth(9, 7), "TIFF"),
    "RGB of a WebP": encoded(smooth(9, 7), "WEBP", lossless=True),
    "L of a JPEG": encoded(smooth(9, 7, "L"), "JPEG"),
    "YCbCr of a JPEG": encoded(smooth(9, 7), "JPEG"),
    "YCbCr of a TIFF": encoded(smooth(9, 7, "YCbCr"), "TIFF"),
    "CMYK of a JPEG": encoded(smooth(9, 7, "CMYK"), "JPEG"),
    "CMYK of a TIFF": encoded(smooth(9, 7, "CMYK"), "TIFF"),
    "progressive JPEG": encoded(smooth(9, 7), "JPEG", progressive=True),
}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("file", FILES)
def test_every_mode_is_pillows(file, channels, mode):
    expected = pixels_of(Image.open(io.BytesIO(FILES[file])), mode)
    box = stored(record(FILES[file]), (7, 9, channels), same_size=True)
    assert (box.shape, box.dtype) == ((7, 9, channels), np.uint8)
    np.testing.assert_array_equal(box, expected)
    crop = random_resized_crop(record(FILES[file]), np.random.default_rng(0), 4, channels)
    assert (crop.shape, crop.dtype) == ((4, 4, channels), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_lose_the_lower_eight(kind):
    deep = np.array([[0, 255, 256], [511, 40000, 65535]], np.uint16)
    for part in (deep, deep[:1, :2]):  # however dark
        file = encoded(Image.fromarray(part), kind)
        height, width = part.shape
        for channels in (1, 3):
            image = stored(record(file), (height, width, channels), same_size=True)
            np.testing.assert_array_equal(image, np.repeat(part[..., None] >> 8, channels, -1))


def test_thirty_two_bits_are_bytes_or_sixteen_bits():
    for values, expected in [([0, 7, 255], [0, 7, 255]), ([0, 256, 65535], [0, 1, 255])]:
        file = encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")
        image = stored(record(file), (1, 3, 1), same_size=True)
        np.testing.assert_array_equal(image[..., 0], [expected])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 65536]], np.int32), "its pixels go from 0 to 65536"),
        (np.array([[-1, 5]], np.int32), "its pixels go from -1 to 5"),
        (np.array([[0, 0.5]], np.float32), "its pixels are floating-point numbers, not bytes"),
    ],
)
def test_numbers_that_are_no_pixels(values, reason):
    file = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(DamagedError, match=f"^folder/some.jpg is damaged: {reason}$"):
        stored(record(file), (1, 2, 3), same_size=True)
    with pytest.raises(DamagedError, match=reason):
        random_resized_crop(record(file), np.random.default_rng(0), 2, 3)


def test_sizes_come_from_the_header(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for file in FILES.values():
        assert size_of(record(file)) == (7, 9)
    assert size_of(record(np.zeros((5, 6, 3), np.uint8))) == (5, 6)


# Upright


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth(24, 16)
    file = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert (upright.size == (16, 24)) == (orientation > 4)
    expected = np.asarray(upright)
    actual = stored(record(file), expected.shape, same_size=True)
    np.testing.assert_array_equal(actual, expected)
    # The whole, cropped and shrunk, is turned too: red rises to the right as long as it is upright.
    crop = random_resized_crop(record(file), np.random.default_rng(0), 8, 3, min_area=0.9)
    rises = crop.astype(int)[-1, -1] - crop[0, 0]
    whole = expected.astype(int)[-1, -1] - expected[0, 0]
    np.testing.assert_array_equal(np.sign(rises[:2]), np.sign(whole[:2]))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0\xff", b"Exif"]
)
def test_what_is_wrong_beside_the_pixels_does_no_harm(exif):
    image = smooth(16, 16)
    file = encoded(image, "JPEG", exif=exif)
    expected = np.asarray(Image.open(io.BytesIO(file)))
    actual = stored(record(file), (16, 16, 3), same_size=True)
    np.testing.assert_array_equal(actual, expected)


# Stored sizes


def middle(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side resized, middle kept, with Pillow's own operations."""
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_others_are_resized_and_the_middle_kept(width, height, size):
    image = smooth(width, height)
    actual = stored(record(encoded(image)), (size, size, 3), same_size=False)
    np.testing.assert_array_equal(actual, middle(image, size))
    array = stored(record(np.asarray(image)), (size, size, 3), same_size=False)
    np.testing.assert_array_equal(array, actual)


def test_a_size_that_is_not_square():
    image = smooth(40, 20)
    actual = stored(record(encoded(image)), (10, 30, 3), same_size=False)
    expected = image.resize((30, 15), Image.Resampling.BILINEAR).crop((0, 2, 30, 12))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (2, 999), (1, 1), (3000, 7)])
def test_extreme_sizes(size):
    for kind in ("PNG", "JPEG"):
        file = encoded(smooth(*size), kind)
        assert stored(record(file), (32, 32, 3), same_size=False).shape == (32, 32, 3)
        for seed in range(20):
            crop = random_resized_crop(record(file), np.random.default_rng(seed), 16, 3)
            assert crop.shape == (16, 16, 3)


def test_arrays_of_the_size_are_as_they_are():
    image = np.asarray(smooth(8, 6))
    assert (stored(record(image), (6, 8, 3), same_size=True) == image).all()
    grey = image[..., :1]
    assert (stored(record(grey), (6, 8, 1), same_size=True) == grey).all()


# Reduced scale


@pytest.fixture
def decoded_sizes(monkeypatch):
    """The sizes at which files are decoded."""
    sizes, load = [], ImageFile.ImageFile.load

    def spy(self):
        if self.tile:
            sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spy)
    return sizes


@pytest.mark.parametrize(
    ("size", "kept", "reduced"),
    [
        ((800, 600), 64, (100, 75)),
        ((800, 600), 100, (200, 150)),
        ((801, 601), 64, (101, 76)),
        ((800, 600), 400, (800, 600)),
        ((40, 30), 64, (40, 30)),
    ],
)
def test_large_jpegs_are_decoded_at_a_reduced_scale(decoded_sizes, size, kept, reduced):
    jpeg = encoded(smooth(*size), "JPEG")
    actual = stored(record(jpeg), (kept, kept, 3), same_size=False)
    assert decoded_sizes == [reduced]
    difference = np.abs(actual.astype(int) - middle(Image.open(io.BytesIO(jpeg)), kept))
    assert difference.mean() < 1.5 and difference.max() < 16


def test_a_jpeg_that_need_not_be_resized_is_whole(decoded_sizes):
    stored(record(encoded(smooth(64, 48), "JPEG")), (48, 64, 3), same_size=True)
    assert decoded_sizes == [(64, 48)]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_large_jpegs_are_those_of_the_whole(decoded_sizes, mode, channels):
    image = smooth(1200, 900, mode)
    jpeg, whole = (record(encoded(image, kind, **o)) for kind, o in SAME_IN_BOTH)
    reduced = 0
    for seed in range(30):
        decoded_sizes.clear()
        actual, expected = (
            random_resized_crop(file, np.random.default_rng(seed), 32, channels)
            for file in (jpeg, whole)
        )
        small, full = decoded_sizes
        assert full == (1200, 900)
        reduced += small != full
        difference = np.abs(actual.astype(int) - expected)
        assert difference.mean() < 2 and difference.max() < 24
    assert reduced == 30


SAME_IN_BOTH = (("JPEG", {"quality": 95}), ("TIFF", {}))


def test_a_crop_never_has_less_pixels_than_are_asked_for(monkeypatch):
    """The box of the reduced image still holds size x size pixels, if that of the whole does."""
    boxes, resize = [], Image.Image.resize

    def spy(self, size, resample, box):
        boxes.append(box)
        return resize(self, size, resample, box=box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    file = record(encoded(smooth(1201, 899), "JPEG"))
    for seed in range(60):
        random_resized_crop(file, np.random.default_rng(seed), 224, 3, min_area=0.25)
    sides = np.array(boxes)[:, 2:] - np.array(boxes)[:, :2]
    assert sides.min() >= 223.99
    assert np.median(sides) < 700


# The crop


def drawn_box(monkeypatch, width, height, seed, **options):
    """The box of a crop, from the colours of a picture whose colours are the places."""
    seen, resize = [], Image.Image.resize

    def spy(self, size, resample, box):
        seen.append((self.size, box))
        return resize(self, size, resample, box=box)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", spy)
        random_resized_crop(
            record(np.zeros((height, width, 1), np.uint8)),
            np.random.default_rng(seed),
            4,
            1,
            **options,
        )
    (((wide, high), box),) = seen
    assert (wide, high) == (width, height)
    return box


@pytest.mark.parametrize("min_area", [0.08, 0.5])
def test_area_and_ratio_are_spread_as_documented(monkeypatch, min_area):
    width = height = 200
    shares, logs, free = [], [], []
    for seed in range(1200):
        left, top, right, below = drawn_box(monkeypatch, width, height, seed, min_area=min_area)
        assert 0 <= left < right <= width and 0 <= top < below <= height
        share = (right - left) * (below - top) / (width * height)
        ratio = (right - left) / (below - top)
        assert share <= 1 and 3 / 4 - 1e-9 <= ratio <= 4 / 3 + 1e-9
        if share < 0.7:  # no side was cut
            assert share >= min_area
            shares.append((share - min_area) / (0.7 - min_area))
            logs.append(math.log(ratio) / math.log(4 / 3))
            free.append([left / (width - right + left), top / (height - below + top)])
    # Each is uniform; so are its deciles.
    for values, low, high in (
        (shares, 0, 1),
        (logs, -1, 1),
        (np.array(free)[:, 0], 0, 1),
        (np.array(free)[:, 1], 0, 1),
    ):
        deciles = np.quantile(values, np.arange(0.1, 1, 0.1))
        np.testing.assert_allclose(
            (deciles - low) / (high - low), np.arange(0.1, 1, 0.1), atol=0.06
        )


def test_a_crop_holds_what_its_box_holds(monkeypatch):
    image = smooth(300, 200)
    for seed in range(10):
        box = drawn_box(monkeypatch, 300, 200, seed)
        expected = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR, box=box))
        actual = random_resized_crop(record(encoded(image)), np.random.default_rng(seed), 20, 3)
        np.testing.assert_array_equal(actual, expected)


def test_all_of_it_is_the_least_area_of_one(monkeypatch):
    for seed in range(20):
        left, top, right, below = drawn_box(monkeypatch, 60, 60, seed, min_area=1.0)
        # One side is whole; the other is shorter, by the root of the ratio.
        assert max(right - left, below - top) == pytest.approx(60)
        assert min(right - left, below - top) >= 60 * math.sqrt(3 / 4) - 1e-6


def test_a_crop_is_a_function_of_the_generator():
    file = record(encoded(smooth(64, 48), "JPEG"))
    one, again, other = (
        random_resized_crop(file, np.random.default_rng(seed), 16, 3) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    # Whatever the image, as many numbers are drawn.
    rngs = [np.random.default_rng(0) for _ in range(2)]
    random_resized_crop(file, rngs[0], 16, 3)
    random_resized_crop(record(np.zeros((1, 900, 3), np.uint8)), rngs[1], 16, 3)
    assert rngs[0].random() == rngs[1].random()


# Damage


def png_header(width: int, height: int) -> bytes:
    """A PNG image that claims to be of a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100)))


JPEG, PNG = encoded(smooth(64, 64), "JPEG"), encoded(smooth(64, 64))

DAMAGED = {
    "empty": (b"", "it is empty"),
    "foreign": (b"something else", "it is no image that Pillow can read"),
    "web page": (b"<!doctype html><html></html>\n" * 99, "it is no image that Pillow can read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "it is no image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "runcated"),
    "a JPEG without its end": (JPEG[:-40], "truncated"),
    "a JPEG's header": (JPEG[:200], ""),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "a PNG of another header": (PNG[:20] + b"?" + PNG[21:], ""),
    "half a GIF": (encoded(smooth(64, 64), "GIF")[:500], ""),
    "half a WebP": (encoded(smooth(64, 64), "WEBP")[:60], ""),
    "half a TIFF": (encoded(smooth(64, 64), "TIFF")[:500], ""),
    "zeros": (bytes(1000), "it is no image that Pillow can read"),
    "no width": (png_header(0, 5), ""),
    "no height": (png_header(5, 0), ""),
    "a bomb": (png_header(60_000, 60_000), "decompression bomb"),
    "a larger one": (png_header(2**31 - 1, 2**31 - 1), ""),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named_in_one_line(damage):
    content, reason = DAMAGED[damage]
    for use in (
        lambda: stored(record(content), (64, 64, 3), same_size=True),
        lambda: stored(record(content), (8, 8, 3), same_size=False),
        lambda: random_resized_crop(record(content), np.random.default_rng(0), 8, 3),
    ):
        with pytest.raises(DamagedError) as caught:
            use()
        message = str(caught.value)
        assert message.startswith("folder/some.jpg is damaged: ") and len(message) > 30
        assert reason in message and "\n" not in message and "BytesIO" not in message


@settings(deadline=None, max_examples=60)
@given(
    file=st.sampled_from(sorted(FILES)),
    place=st.floats(0, 1, exclude_max=True),
    content=st.binary(max_size=6),
)
def test_whatever_is_changed_in_a_file_nothing_else_is_raised(file, place, content):
    start = int(place * len(FILES[file]))
    changed = FILES[file][:start] + content + FILES[file][start + len(content) + 1 :]
    message = ""
    try:
        image = stored(record(changed), (8, 8, 3), same_size=False)
        assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    except DamagedError as error:
        message = str(error)
    assert "\n" not in message


def test_another_size_is_damage_where_all_are_of_one():
    with pytest.raises(DamagedError, match=r"^folder/some.jpg is damaged: it has 64 × 32 pixels, "):
        stored(record(encoded(smooth(64, 32))), (64, 64, 3), same_size=True)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 2, 3), np.uint8), r"it is uint8\[2, 2, 3\], not uint8\[height, width, 1\]"),
        (np.zeros((2, 2, 1), np.uint16), r"it is uint16\[2, 2, 1\], not uint8"),
        (np.zeros((2, 2), np.uint8), r"it is uint8\[2, 2\], not uint8"),
        (np.zeros((3, 2, 1), np.uint8), "it has 2 × 3 pixels, not 2 × 2"),
    ],
)
def test_arrays_that_are_not_what_they_should_be(array, reason):
    with pytest.raises(DamagedError, match=reason):
        stored(record(array), (2, 2, 1), same_size=True)


# In its place another


class Some:
    """Examples of which some cannot be decoded, others not even read."""

    labels = None

    def __init__(self, kinds):
        self.kinds = kinds

    def __len__(self):
        return len(self.kinds)

    def __getitem__(self, i):
        if self.kinds[i] == "unreadable":
            raise DamagedError(f"{i} is unreadable")
        return Record(b"" if self.kinds[i] == "damaged" else PNG, i, f"{i}")


def decoder(one: Record) -> np.ndarray:
    return stored(one, (64, 64, 3), same_size=True)


def test_a_readable_example_is_itself():
    image, label, problem = readable(Some(["good"] * 3), 1, decoder, skip_damaged=False)
    np.testing.assert_array_equal(image, smooth(64, 64))
    assert (label, problem) == (1, None)


@pytest.mark.parametrize("kind", ["damaged", "unreadable"])
def test_the_next_one_stands_for_a_damaged_one(kind):
    records = Some(["good", kind, kind, "good", kind])
    with pytest.raises(DamagedError, match=r"^1 is"):
        readable(records, 1, decoder, skip_damaged=False)
    for i, label, named in ((1, ~3, "1 is"), (2, ~3, "2 is"), (4, ~0, "4 is")):
        image, actual, problem = readable(records, i, decoder, skip_damaged=True)
        assert image.shape == (64, 64, 3)
        assert actual == label and actual < 0 and problem.startswith(named)
    assert readable(records, 3, decoder, skip_damaged=True)[1:] == (3, None)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["damaged"], "0 is damaged: it is empty"),
        (["damaged"] * 3, "0 is damaged: it is empty, and so are the 2 after it"),
        (["damaged"] * 50 + ["good"], "0 is damaged: it is empty, and so are the 49 after it"),
    ],
)
def test_data_that_are_all_damaged_are_given_up(kinds, message):
    with pytest.raises(DamagedError) as caught:
        readable(Some(kinds), 0, decoder, skip_damaged=True)
    assert str(caught.value) == message


def test_forty_nine_in_a_row_are_left_out():
    records = Some(["damaged"] * 49 + ["good"])
    assert readable(records, 0, decoder, skip_damaged=True)[1] == ~49


def test_other_errors_are_not_taken_for_damage():
    def decoder(_):
        raise ZeroDivisionError

    records = ArrayRecords(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2, np.int32), "x")
    with pytest.raises(ZeroDivisionError):
        readable(records, 0, decoder, skip_damaged=True)
    assert decode._MAX_DAMAGED == 50
