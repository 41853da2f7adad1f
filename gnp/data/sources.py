"""Data sets by name.

`digits` comes with the package, `ptb` is plain text, `npz` is a file of arrays, `folder`,
`imagenet` and `tiny_imagenet` are folders of images; any other name is one of TensorFlow Datasets.
"""

import dataclasses
import gzip
import importlib.resources

import numpy as np

from gnp.data.folders import open_folder
from gnp.data.npz import open_npz
from gnp.data.records import ArrayRecords, Source
from gnp.data.text import TextSource, open_ptb
from gnp.data.tfds import open_tfds
from gnp.errors import UserError

_FOLDERS = ("folder", "imagenet", "tiny_imagenet")
_OURS = ("digits", "npz", *_FOLDERS, "ptb")
_TFDS_EXAMPLES = ("cifar10", "cifar100", "imagenet2012")


def list_sources() -> list[str]:
    """Names that `open_source` knows: all of ours, and of TFDS's those that recipes use."""
    return [*_OURS, *_TFDS_EXAMPLES]


def holds(name: str) -> str:
    """What a data set holds: "images" or "tokens"."""
    return "tokens" if name == "ptb" else "images"


def open_source(
    name: str,
    data_dir: str | None = None,
    *,
    image_size: int | None = None,
    resize: int | None = None,
) -> Source | TextSource:
    """Finds a data set, and downloads it if it is not there and can be had.

    Args:
      name: one of `list_sources()`, or any image-classification data set of TFDS.
      data_dir: for a data set of TFDS, the folder of all of them (None: TFDS's own, which is
        `$TFDS_DATA_DIR` or `~/tensorflow_datasets`); for `npz` the file; for the others the data
        set's folder. `digits` needs none.
      image_size: the size that the images will be used at. Images that are larger, or differ in
        size, are kept at 8/7 of it: resized on the shorter side, of which the middle is kept.
      resize: the size that they are kept at instead, whatever theirs is.

    Raises:
      UserError: for an unknown name, and for data that are neither there nor to be had, or damaged;
        says where it looked and what to do.
    """
    if name == "ptb":
        return open_ptb(data_dir)
    if name == "digits":
        source = _digits()
    elif name == "npz":
        source = open_npz(data_dir)
    elif name in _FOLDERS:
        source = open_folder(name, data_dir)
    else:
        source = open_tfds(name, data_dir, list(_OURS))
    height, width, channels = source.image_shape
    square = 0 < height == width
    if resize is None and image_size is None:
        if square:
            return dataclasses.replace(source, same_size=True)
        sizes = f"have {height} × {width} pixels" if height else "differ in size"
        raise UserError(
            f"the images of {name} in {source.where} {sizes}: set config.data.image_size, such as "
            "224"
        )
    wanted = image_size or 0
    # Images that are smaller are resized in the step, if all of them are of this size.
    fits = height == wanted or (height < wanted and source.same_size)
    if resize is None and square and fits:
        return source
    kept = resize or round(wanted * 8 / 7)
    return dataclasses.replace(source, image_shape=(kept, kept, channels), same_size=False)


def _digits() -> Source:
    """1,797 scans of handwritten digits, 8 x 8 pixels, of which a fixed fifth is the test set.

    The test set of the UCI repository's "Optical Recognition of Handwritten Digits" (E. Alpaydin
    and C. Kaynak, 1998, CC BY 4.0), in the form in which scikit-learn distributes it: each line has
    64 pixels from 0 to 16 and the digit.
    """
    packed = importlib.resources.files(__package__).joinpath("digits.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.uint8)
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = table[:, -1].astype(np.int32)
    # NumPy guarantees that RandomState's numbers never change; those of its Generator may.
    test, train = np.split(np.random.RandomState(0).permutation(len(table)), [360])
    return Source(
        name="digits",
        classes=tuple("0123456789"),
        image_shape=(8, 8, 1),
        same_size=True,
        splits={
            split: ArrayRecords(images[indices], labels[indices], f"{split} of digits")
            for split, indices in (("train", train), ("test", test))
        },
        test_split="test",
        key=None,
        where="this package",
    )
