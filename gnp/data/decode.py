"""From an encoded image to pixels of the size that is asked for, on the host."""

import contextlib
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from gnp.data.records import DamagedError, Record, Records, first_line
from gnp.errors import UserError

# Of images that are longer, in relation to their width, only the middle is resized.
_LONGEST = 256

# So many damaged examples in a row are not left out any more: the data are wrong as a whole.
_MAX_DAMAGED = 50

# Not all that Pillow knows: for some it runs other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")

# What Pillow thinks of an image that it can read is no news: broken EXIF, odd palettes, its size.
warnings.filterwarnings("ignore", module=r"PIL\.")


def stored(record: Record, shape: tuple[int, int, int], *, same_size: bool) -> np.ndarray:
    """The image at its stored size.

    Args:
      record: the example.
      shape: (height, width, channels) to have.
      same_size: whether an image of another size is damaged. Otherwise it is resized, so that it
        covers the shape (bilinearly, antialiased), and its middle is kept.

    Returns:
      uint8[height, width, channels].

    Raises:
      DamagedError: if the image cannot be decoded, or is of another size.
    """
    height, width, channels = shape

    def covering(size: tuple[int, int]) -> tuple[int, int]:
        scale = max(width / size[0], height / size[1])
        return max(round(size[0] * scale), width), max(round(size[1] * scale), height)

    try:
        image = _open(record, channels)
        if image.size != (width, height):
            if same_size:
                raise ValueError(
                    f"it has {image.width} × {image.height} pixels, not {width} × {height}"
                )
            image = _middle(image, _LONGEST * max(width / height, height / width))
            size = covering(image.size)
            image, whole = _decoded(image, channels, size)
            image = image.resize(size, Image.Resampling.BILINEAR, box=(0, 0, *whole))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return _pixels(_as_mode(image, channels))
    except Exception as error:  # each codec has errors of its own
        raise _damaged(record, error) from error


def random_resized_crop(
    record: Record,
    rng: np.random.RandomState | np.random.Generator,
    size: int,
    channels: int,
    *,
    min_area: float = 0.08,
) -> np.ndarray:
    """A random part of the image, resized to `size` × `size` pixels (Szegedy et al., 2015).

    The same draw as `gnp.data.augment.random_resized_crop`, from the whole image, of which a JPEG
    is decoded at 1/2, 1/4 or 1/8 of its resolution where that still holds enough pixels.

    Returns:
      uint8[size, size, channels].

    Raises:
      DamagedError: if the image cannot be decoded.
    """
    try:
        image = _open(record, channels)
        width, height = image.size
        area = width * height * (min_area + (1 - min_area) * rng.random())
        ratio = math.exp((2 * rng.random() - 1) * math.log(4 / 3))
        across, down = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
        left, top = rng.random() * (width - across), rng.random() * (height - down)
        enough = math.ceil(width * size / across), math.ceil(height * size / down)
        image, whole = _decoded(image, channels, enough)
        x, y = whole[0] / width, whole[1] / height
        right, below = min((left + across) * x, whole[0]), min((top + down) * y, whole[1])
        box = (left * x, top * y, right, below)
        return _pixels(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    except Exception as error:
        raise _damaged(record, error) from error


def readable(
    records: Records,
    i: int,
    decode: Callable[[Record], np.ndarray],
    *,
    skip_damaged: bool,
) -> tuple[np.ndarray, int, str | None]:
    """Example `i` decoded, or the next one that can be.

    Returns:
      The image, its label and None; if example `i` is damaged, the image of the next one that is
      not, the complement of that one's label, −1 − label, and what is wrong with example `i`.

    Raises:
      DamagedError: if it is damaged and is not to be left out, or if many in a row are.
    """
    problem, tries = None, min(_MAX_DAMAGED, len(records))
    for k in range(tries):
        try:
            record = records[(i + k) % len(records)]
            image = decode(record)
        except DamagedError as error:
            if not skip_damaged:
                raise
            problem = problem or str(error)
            continue
        return image, ~record.label if problem else record.label, problem
    raise DamagedError(
        f"{problem}, and so are the {tries - 1} after it" if tries > 1 else str(problem)
    )


def refusal(damaged: str, *, skip_damaged: bool) -> UserError:
    """The error for a damaged example that is not left out, or is one of too many."""
    if skip_damaged:
        return UserError(f"{damaged}: that is too much to leave out")
    return UserError(
        f"{damaged}; mend or remove it, or set config.data.on_damaged=skip to leave such out"
    )


def size_of(record: Record) -> tuple[int, int]:
    """(height, width) of an image, if it is an encoded one from its header."""
    if isinstance(record.image, np.ndarray):
        return record.image.shape[0], record.image.shape[1]
    with Image.open(io.BytesIO(record.image), formats=_FORMATS) as image:
        return image.height, image.width


def _open(record: Record, channels: int) -> Image.Image:
    """The image, not decoded yet if it need not be turned upright."""
    if isinstance(record.image, np.ndarray):
        pixels = record.image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise ValueError(
                f"it is {pixels.dtype}{list(pixels.shape)}, not uint8[height, width, {channels}]"
            )
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image: Image.Image = Image.open(io.BytesIO(record.image), formats=_FORMATS)
    turned = False
    if "exif" in image.info or image.format == "TIFF":
        with contextlib.suppress(Exception):  # what cannot be read there harms no pixels
            turned = image.getexif().get(0x0112, 1) != 1  # the orientation
    return ImageOps.exif_transpose(image) if turned else image


def _middle(image: Image.Image, ratio: float) -> Image.Image:
    """The image, or the middle of one whose sides differ by more than a ratio."""
    across = min(image.width, math.ceil(image.height * ratio))
    down = min(image.height, math.ceil(image.width * ratio))
    if (across, down) == image.size:
        return image
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down))


def _decoded(
    image: Image.Image, channels: int, size: tuple[int, int]
) -> tuple[Image.Image, tuple[float, float]]:
    """The image, a JPEG at a reduced resolution if that still has `size`, the width and height.

    Returns:
      It, and its own width and height in its pixels; its last ones may be filling.
    """
    drafted = image.draft(image.mode, size)
    image = _as_mode(image, channels)
    return image, drafted[1][2:] if drafted else image.size


def _as_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image in grey, RGB or RGBA; one of 16 bits loses the lower 8."""
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if not 0 <= deep.min() <= deep.max() < 2**16:
            raise ValueError(f"its pixels go from {deep.min()} to {deep.max()}")
        bytes_only = image.mode == "I" and deep.max() < 256  # written as 32 bits
        image = Image.fromarray((deep if bytes_only else deep >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, not bytes")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _damaged(record: Record, error: Exception) -> DamagedError:
    reason = first_line(error)
    if "cannot identify image file" in reason:
        reason = "it is empty" if not record.image else "it is no image that Pillow can read"
    return DamagedError(f"{record.name} is damaged: {reason}")
