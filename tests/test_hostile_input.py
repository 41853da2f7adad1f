"""Whatever the bytes of a file are, its reader reads it or says in one line what is wrong.

Valid files are changed by Hypothesis, or replaced by anything; what sizes in headers, pipes, links
and names can do is tried one by one.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from gnp import config as gnp_config
from gnp import report
from gnp.analysis import measures, runs
from gnp.data import npz, open_source, resident
from gnp.data.augment import parse_augment
from gnp.data.decode import random_resized_crop, refusal, stored
from gnp.data.imagenet import prepare_imagenet, prepare_tiny_imagenet
from gnp.data.records import DamagedError, Source
from gnp.data.tfrecord import TFRecords
from gnp.errors import UserError, printable
from gnp.models import load_pretrained
from tests.analysis.test_measures import ROW
from tests.data import fake_archives
from tests.data.cifar_like import as_tfrecord, write_cifar, write_tfrecord
from tests.models.test_pretrained import random_variables, small, to_timm

SECONDS = 30  # that one input may take
MEMORY = 2**31  # bytes of address space that it may take beside what the process has


# --- Readers: a folder with valid files, and what reads them ------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
      write: makes a folder with valid files.
      read: reads them; its second argument is the file that was changed.
      files: a pattern of those to change.
      made: what reading makes in the folder, to be removed after it.
      heavy: whether one input takes so long that only a tenth of them is tried.
    """

    write: Callable[[pathlib.Path], object]
    read: Callable[[pathlib.Path, pathlib.Path], object]
    files: str = "*"
    made: tuple[str, ...] = ()
    heavy: bool = False


def texts(*examples: str):
    """Writes texts, a file each."""

    def write(folder):
        for i, text in enumerate(examples):
            (folder / f"{i}.txt").write_text(text)

    return write


def of_text(read):
    """A reader of a text in place of one of files."""
    return lambda _, changed: read(changed.read_bytes().decode(errors="surrogateescape"))


def override(text):
    field, _, value = text.partition("=")
    config = gnp_config.default()
    gnp_config.override(config, field, value)
    gnp_config.validate(config)


def arguments(text):
    gnp_config.arguments(text, gr="off", depth=12, lr=0.1, scan=False, drops=("50%",))


def from_json(text):
    gnp_config.validate(gnp_config.from_json(text, where="config.json"))


def decode_all(source):
    """Decodes every image in both ways."""
    assert isinstance(source, Source)
    try:
        for records in source.splits.values():
            for i in range(len(records)):
                stored(records[i], source.image_shape, same_size=source.same_size)
                random_resized_crop(records[i], np.random.default_rng(i), 4, source.image_shape[2])
    except DamagedError as error:
        raise refusal(str(error), skip_damaged=False) from None


def write_npz(folder):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 5, 5, 3), np.uint8), np.arange(4) % 2
    np.savez(folder / "stored.npz", train_images=images, train_labels=labels)
    np.savez_compressed(folder / "packed.npz", x_train=images / 255, y_train=labels)


def write_images(folder):
    """An image of each format, in two classes."""
    rng = np.random.default_rng(0)
    modes = {"jpg": "RGB", "png": "RGB", "gif": "P", "webp": "RGB", "tif": "RGB", "bmp": "RGB"}
    for i, (suffix, mode) in enumerate(modes.items()):
        path = folder / "train" / f"class{i % 2}" / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        exif = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}
        more = [Image.fromarray(pixels[::-1]).convert(mode)] if suffix == "gif" else []
        Image.fromarray(pixels).convert(mode).save(
            path,
            **(exif if suffix == "jpg" else {}),
            **({"save_all": True, "append_images": more} if more else {}),
            **({"compression": "tiff_lzw"} if suffix == "tif" else {}),
        )


def read_image(folder, changed):
    source = open_source("folder", str(folder), image_size=4)
    records = source.splits["train"]
    kept = [i for i, path in enumerate(records.paths) if path.endswith(changed.name)]
    records = dataclasses.replace(
        records, paths=[records.paths[i] for i in kept], labels=records.labels[kept]
    )
    decode_all(dataclasses.replace(source, splits={"train": records}))


def write_tables(folder):
    """Tiny-ImageNet and ImageNet without what is in the images."""
    for name in ("n01", "n02"):
        for root in ("tiny", "large"):
            (folder / root / "train" / name).mkdir(parents=True)
            (folder / root / "train" / name / "a.JPEG").write_bytes(b"")
    for root in ("tiny", "large"):
        (folder / root / "val").mkdir()
        for i in range(3):
            (folder / root / "val" / f"val_{i}.JPEG").write_bytes(b"")
    rows = [f"val_{i}.JPEG\tn0{i % 2 + 1}\t0\t0\t62\t57\n" for i in range(3)]
    (folder / "tiny" / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "tiny" / "wnids.txt").write_text("n02\nn01\n")
    (folder / "tiny" / "words.txt").write_text("n01\tfish, tench\nn02\tdog\n")
    rows = [f"val_{i},n0{i % 2 + 1} 1 2 3 4\n" for i in range(3)]
    (folder / "large" / "LOC_val_solution.csv").write_text("ImageId,Pred\n" + "".join(rows))


def read_tables(folder, _):
    open_source("tiny_imagenet", str(folder / "tiny"), image_size=64)
    open_source("imagenet", str(folder / "large"), image_size=64)


def read_cifar(folder, _):
    decode_all(open_source("cifar10", str(folder)))


def write_as_tfrecord(folder):
    write_cifar(folder, 3, 2)
    as_tfrecord(folder / "cifar10" / "3.0.2")


def write_with_contents(folder):
    """A TFRecord data set, and beside it its first record."""
    write_as_tfrecord(folder)
    path = next(folder.glob("cifar10/3.0.2/*train*"))
    (folder / "record").write_bytes(TFRecords([path])[0])


def read_contents(folder, changed):
    """Reads the data set with the record, whose checksum is right whatever it is."""
    path = next(folder.glob("cifar10/3.0.2/*train*"))
    write_tfrecord(path, [changed.read_bytes()] * 3)
    read_cifar(folder, changed)


def write_text(folder):
    for name in ("train", "valid", "test"):
        (folder / f"ptb.{name}.txt").write_text(" the fish <unk> \n a dog of N years \n" * 3)


def read_tiny_zip(folder, changed):
    prepare_tiny_imagenet(folder, fake_archives.archive_of(changed.read_bytes(), changed.name))


def read_imagenet_archives(folder, _):
    known = fake_archives.IMAGENET
    prepare_imagenet(
        folder,
        type(known)(*(dataclasses.replace(each, size=None, md5=None) for each in known)),
    )


def write_cache(folder):
    """Images, and what they were decoded to."""
    for i in range(3):
        path = folder / "images" / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 5, 3), 40 * i, np.uint8)).save(path)
    read_cache(folder, None)


def read_cache(folder, _):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        resident.load(open_source("folder", str(folder / "images"), resize=5))


FIELDS = small("vit_ti") | {"depth": 1, "patch_size": 8}


def write_weights(folder):
    variables = random_variables("vit_ti", 16, **FIELDS)
    save_file(to_timm("vit_ti", variables), folder / "weights.safetensors")


def read_weights(_, changed):
    load_pretrained("vit_ti", changed, image_size=16, **FIELDS)


CONFIG = {
    "seed": 0,
    "epochs": 2.0,
    "model": {"name": "vit_ti", "width": 8},
    "data": {"name": "cifar10", "batch_size": 4},
    "lr": {"base": 0.001, "schedule": "cosine", "warmup": "1ep"},
    "gr": {"policy": "zero", "radius": 0.1, "ratio": 1.0, "warmup": None},
}
RESULT = {
    "steps": 8,
    "epochs": 2.0,
    "wall_time": 3.5,
    "train": {"loss": 1.0, "error": 0.5},
    "test": {"loss": 1.0, "error": 0.5},
    "num_params": 100,
    "devices": "1 cpu",
    "command": "python -m gnp.train",
}
ROWS = [
    {"step": 4 * i, "epoch": float(i), "wall_time": i, "split": split, "loss": 2 / i}
    for i in (1, 2)
    for split in ("train", "test")
]


def write_run(folder, rows=ROWS):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "result.json").write_text(json.dumps(RESULT))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_run(folder, _):
    run = runs.load(folder)
    assert isinstance(run.final("test", "loss"), float) and run.gr_warmup >= 0


def draw_run(folder, _):
    report.write(folder)


def write_measures(folder):
    for step in (5, 10):
        measures.append(folder, ROW | {"step": step})


def read_measures(folder, _):
    for row in measures.load(folder):
        assert type(row["step"]) is int and all(type(x) is float for x in row["eigenvalues"])


READERS = {
    "override": Reader(
        texts("gr.radius=0.05", "model.depths=2,2,6", "data.augment=pad_crop:4,flip", "seed=3"),
        of_text(override),
    ),
    "arguments": Reader(
        texts("gr=zero,depth=2,lr=1e-3,scan=true", "drops=10%"), of_text(arguments)
    ),
    "from_json": Reader(texts(gnp_config.default().to_json()), of_text(from_json)),
    "duration": Reader(texts("40ep", "2.5%", "500st"), of_text(gnp_config.parse_duration)),
    "augment": Reader(
        texts("heavy", "random_resized_crop:0.3,flip,mixup:0.2,label_smoothing:0.1"),
        of_text(parse_augment),
    ),
    "npz": Reader(write_npz, lambda _, path: open_source("npz", str(path), image_size=5)),
    "image": Reader(write_images, read_image, "train/*/*"),
    "tables": Reader(write_tables, read_tables, "tiny/**/*.txt"),
    "table_of_kaggle": Reader(write_tables, read_tables, "large/*.csv"),
    "tfrecord": Reader(write_as_tfrecord, read_cifar, "cifar10/3.0.2/*tfrecord*"),
    "record": Reader(write_with_contents, read_contents, "record"),
    "array_record": Reader(
        functools.partial(write_cifar, num_train=3, num_test=2),
        read_cifar,
        "cifar10/3.0.2/*array_record*",
    ),
    "tfds_metadata": Reader(
        functools.partial(write_cifar, num_train=3, num_test=2),
        read_cifar,
        "cifar10/3.0.2/*.[jt]*[nt]",
    ),
    "sharpness": Reader(write_measures, read_measures, "sharpness.jsonl"),
    "text": Reader(write_text, lambda folder, _: open_source("ptb", str(folder))),
    "zip": Reader(
        fake_archives.write_tiny_imagenet, read_tiny_zip, "*.zip", made=("tiny-imagenet-200",)
    ),
    "tar": Reader(
        fake_archives.write_imagenet_archives,
        read_imagenet_archives,
        "ILSVRC*",
        made=("train", "val"),
    ),
    "cache": Reader(write_cache, read_cache, "cache/gnp/*/*/*"),
    "safetensors": Reader(write_weights, read_weights),
    "run": Reader(write_run, read_run, "*.json*"),
    "report": Reader(functools.partial(write_run, rows=[]), draw_run, "*.json"),
    "figures": Reader(write_run, draw_run, "*.json*", heavy=True),
}


# --- Changed files ------------------------------------------------------------------------------

TOKENS = [
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"1e300", b"1e-320", b"9" * 400, b"null", b"true"),
    *(b"[]", b"{}", b'"', b'"x"', b"[" * 3000, b",", b":", b"=", b"\n", b"\r", b"\t", b" ", b"\0"),
    *(b"\x1b[31m", "\u202e".encode(), "\ud800".encode(errors="surrogatepass"), b"\\ud800", b"\xff"),
    *(b"<script>", b"../", b"/", b"|O", b"PK\x01\x02", b"%", b"{0.__class__}"),
]
NUMBERS = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
PACKED = [
    struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
    for number in NUMBERS
    for form in ("<H", "<I", ">I", "<Q", ">Q")
]


@st.composite
def changed(draw, content: bytes) -> bytes:
    """A file that was damaged in a few places, or anything else in its place."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        size = len(content)
        near = st.integers(0, min(size, 120))
        place = draw(st.one_of(near, near.map(lambda x, size=size: size - x), st.integers(0, size)))
        before, after = content[:place], content[place:]
        change = draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "drop", "copy"]))
        if change == "flip":
            after = bytes(after[:1].translate(_FLIPPED[draw(st.integers(0, 7))])) + after[1:]
        elif change == "cut":
            after = b""
        elif change in ("insert", "overwrite"):
            new = draw(st.sampled_from(TOKENS + PACKED) | st.binary(min_size=1, max_size=8))
            after = new + after[len(new) if change == "overwrite" else 0 :]
        elif change == "drop":
            after = after[draw(st.integers(1, 16)) :]
        else:  # as a size in place of another
            start, length = draw(st.integers(0, size)), draw(st.integers(1, 16))
            after = content[start : start + length] + after[length:]
        content = before + after
    return content


_FLIPPED = [bytes(byte ^ 1 << bit for byte in range(256)) for bit in range(8)]


class TooLongError(BaseException):
    """Not an Exception, which readers may take for one of the file."""


@contextlib.contextmanager
def limits():
    """Ends what takes too long, and refuses what takes too much memory."""

    def too_long(*_):
        raise TooLongError(f"more than {SECONDS} s")

    old_handler = signal.signal(signal.SIGALRM, too_long)
    old_limit = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, old_limit[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, old_limit)


def complaint(read, *args) -> str | None:
    """What a reader says of its input, None if it reads it."""
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(*args)
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 5000
        assert "MemoryError" not in message
        return message
    return None


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 5 if reader.heavy else 50) for name, reader in READERS.items()),
        *(
            pytest.param(name, 100 if reader.heavy else 1000, marks=pytest.mark.soak)
            for name, reader in READERS.items()
        ),
    ],
)
def test_changed_files_are_read_or_refused_in_a_line(name, count, tmp_path):
    reader = READERS[name]
    reader.write(tmp_path)
    contents = {
        path: path.read_bytes() for path in sorted(tmp_path.glob(reader.files)) if path.is_file()
    }
    for path in contents:
        assert complaint(reader.read, tmp_path, path) is None
        for made in reader.made:
            shutil.rmtree(tmp_path / made, ignore_errors=True)
    inputs = st.sampled_from(list(contents)).flatmap(
        lambda path: st.tuples(st.just(path), changed(contents[path]))
    )
    refused = 0

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def fuzz(change):
        nonlocal refused
        path, content = change
        path.write_bytes(content)
        try:
            refused += complaint(reader.read, tmp_path, path) is not None
        finally:
            path.write_bytes(contents[path])
            for made in reader.made:
                shutil.rmtree(tmp_path / made, ignore_errors=True)

    fuzz()
    assert refused or name == "cache"  # which is made anew


# --- Sizes that are not there -------------------------------------------------------------------


def masked(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def npz_of_many(folder):
    """Arrays of 2^40 bytes, by their header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**30, 2**4, 2**4, 4)}
    )
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
        archive.writestr("labels.npy", header.getvalue() + bytes(100))
    open_source("npz", str(folder / "a.npz"), image_size=16)


def npz_of_another_compression(folder):
    """100 MB in a few hundred bytes, which its reader would unpack at once."""
    array = io.BytesIO()
    np.save(array, np.zeros(100_000_000, np.uint8))
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("images.npy", array.getvalue())
    del array
    tracemalloc.reset_peak()
    open_source("npz", str(folder / "a.npz"), image_size=16)


def npz_beyond_memory(folder):
    """200 MB, honestly told, where there is less memory."""
    np.savez_compressed(folder / "a.npz", images=np.zeros(200_000_000, np.uint8))
    tracemalloc.reset_peak()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npz, "host_memory", lambda: 10**8)
        open_source("npz", str(folder / "a.npz"), image_size=16)


def image_of_many(suffix):
    """An image of 60,000 × 60,000 pixels, by its header."""

    def read(folder):
        write_images(folder)
        path = next(folder.glob(f"train/*/*.{suffix}"))
        content, size = path.read_bytes(), 60_000
        for form in ("<HH", ">HH", "<ii", ">ii"):
            for old in ((12, 9), (9, 12)):
                content = content.replace(struct.pack(form, *old), struct.pack(form, size, size))
        if suffix == "png":
            content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
        path.write_bytes(content)
        read_image(folder, path)

    return read


def tfrecord_of_many(folder):
    write_as_tfrecord(folder)
    length = struct.pack("<Q", 2**62)
    path = next(folder.glob("cifar10/3.0.2/*train*"))
    path.write_bytes(length + masked(length) + bytes(100))
    read_cifar(folder, path)


def classes_without_end(folder):
    write_cifar(folder, 3, 2)
    path = folder / "cifar10" / "3.0.2" / "features.json"
    path.write_text(path.read_text().replace('"numClasses": "10"', '"numClasses": "1099511627776"'))
    (path.parent / "label.labels.txt").unlink(missing_ok=True)
    read_cifar(folder, path)


def safetensors_of_many(folder):
    header = json.dumps(
        {"head.bias": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    read_weights(folder, folder / "w.safetensors")


def safetensors_header_of_many(folder):
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", 2**60) + bytes(64))
    read_weights(folder, folder / "w.safetensors")


def zip_of_another_compression(folder):
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("tiny-imagenet-200/words.txt", "n01\n")
    tracemalloc.reset_peak()  # writing it takes memory
    read_tiny_zip(folder, folder / "tiny-imagenet-200.zip")


def tar_that_goes_round(folder):
    """After a class a file whose size is below 0, so that the next header is the same again."""
    fake_archives.write_imagenet_archives(folder)
    path = folder / "ILSVRC2012_img_train.tar"
    name = f"{fake_archives.CLASSES[0]}.tar"
    header = bytearray(tarfile.TarInfo(name).tobuf())
    header[124:136] = (2 ** (8 * 12) - 512).to_bytes(12, "big")  # -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    class_tar = fake_archives.tar_of({"a.JPEG": fake_archives.jpeg(0)})
    content = fake_archives.tar_of({name: class_tar})[: 512 + len(class_tar)]
    path.write_bytes(content + header + bytes(1024))
    read_imagenet_archives(folder, None)


def brackets(file):
    def read(folder):
        write_run(folder)
        text = "[" * 100_000
        (folder / file).write_text(text if file == "config.json" else text + "\n" + text)
        draw_run(folder, None)

    return read


def pipe(*parts):
    """A pipe that nobody writes to, in place of a file."""
    *_, name = parts

    def read(folder):
        write_images(folder)
        write_text(folder)
        write_run(folder)
        path = folder.joinpath(*parts)
        path.unlink()
        os.mkfifo(path)
        if name.endswith("txt"):
            open_source("ptb", str(folder))
        elif "json" in name:
            runs.load(folder)
        else:
            read_image(folder, path)

    return read


def device(folder):
    """An image without an end."""
    write_images(folder)
    path = folder / "train" / "class0" / "0.jpg"
    path.unlink()
    path.symlink_to("/dev/zero")
    read_image(folder, path)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (npz_of_many, "the header of images.npy tells of 1.1 TB"),
        (npz_of_another_compression, "compressed as NumPy does not"),
        (npz_beyond_memory, "200.0 MB, more than there is memory"),
        (image_of_many("jpg"), "exceeds limit"),
        (image_of_many("png"), "exceeds limit"),
        (image_of_many("gif"), "exceeds limit"),
        (image_of_many("bmp"), "exceeds limit"),
        (tfrecord_of_many, "cut off"),
        (classes_without_end, "no data set of images"),
        (safetensors_of_many, "not a whole safetensors file"),
        (safetensors_header_of_many, "not a whole safetensors file"),
        (zip_of_another_compression, "which the genuine file does not"),
        (tar_that_goes_round, "is damaged"),
        (brackets("config.json"), "not valid JSON"),
        (brackets("metrics.jsonl"), "line 1 is not valid JSON"),
        (pipe("train", "class0", "0.jpg"), "no plain file"),
        (pipe("ptb.valid.txt"), "no plain file"),
        (pipe("metrics.jsonl"), "no plain file"),
        (pipe("result.json"), "no plain file"),
        (device, "no plain file"),
    ],
)
def test_what_a_header_claims_takes_neither_memory_nor_time(read, expected, tmp_path):
    tracemalloc.start()
    try:
        message = complaint(read, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert message is not None and expected in message


HUGE = 10**400  # which no float holds


@pytest.mark.parametrize("text", ["[" * 100_000, json.dumps({"epochs": HUGE}), '{"lr": 1}', "[]"])
def test_json_that_is_no_configuration(text):
    message = complaint(from_json, text)
    assert message is not None and message.startswith("config")


@pytest.mark.parametrize(
    "value",
    [HUGE, 1e308, -1e308, 5e-324, "x", [1], {"loss": {}}, True],
    ids=lambda value: repr(value)[:10],
)
def test_a_report_of_values_that_no_run_writes(value, tmp_path):
    write_run(tmp_path, [row | {"loss": value, "wall_time": value} for row in ROWS] + ROWS)
    result = dict.fromkeys([*RESULT, "validation"], value) | {"train": {"loss": value}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    for section in ("gr", "model", "epochs", "seed"):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {section: value}))
        assert complaint(draw_run, tmp_path, None) is None


@pytest.mark.parametrize("shape", [(), (0,), (5, 1)])
def test_a_head_that_is_no_list_of_classes(shape, tmp_path):
    tensors = to_timm("vit_ti", random_variables("vit_ti", 16, **FIELDS))
    save_file(tensors | {"head.bias": np.zeros(shape, np.float32)}, tmp_path / "w.safetensors")
    message = complaint(read_weights, tmp_path, tmp_path / "w.safetensors")
    assert message is not None and "head.bias has the shape" in message


@pytest.mark.parametrize("name", ["pos_embed", "head.weight", "patch_embed.proj.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 12), (0, 0, 0, 0)])
def test_a_tensor_of_another_rank_or_without_values(name, shape, tmp_path):
    fields = FIELDS | {"pool": "mean"}
    tensors = to_timm("vit_ti", random_variables("vit_ti", 16, **fields))
    path = tmp_path / "w.safetensors"
    save_file(tensors | {name: np.zeros(shape, np.float32)}, path)
    load = functools.partial(load_pretrained, image_size=16, num_classes=7, **fields)
    message = complaint(load, "vit_ti", path)
    assert message is not None and " has the shape " in message


# --- Names and paths ----------------------------------------------------------------------------


def test_no_module_is_imported_because_a_data_set_names_it(tmp_path, monkeypatch):
    write_cifar(tmp_path / "data", 3, 2)
    (tmp_path / "hostile_features.py").write_text("import os; os.environ['HOSTILE'] = 'ran'")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "data" / "cifar10" / "3.0.2" / "features.json"
    name = "tensorflow_datasets.core.features.image_feature.Image"
    path.write_text(path.read_text().replace(name, "hostile_features.Image"))
    message = complaint(read_cifar, tmp_path / "data", None)
    assert message is not None and "'hostile_features.Image'" in message
    assert "HOSTILE" not in os.environ and "hostile_features" not in sys.modules


def test_a_data_set_has_no_files_outside_of_its_folder(tmp_path):
    write_cifar(tmp_path, 3, 2)
    folder = tmp_path / "cifar10" / "3.0.2"
    for path in folder.glob("*array_record*"):
        path.rename(tmp_path / path.name)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"{DATASET}-', '"../../{DATASET}-'))
    message = complaint(read_cifar, tmp_path, None)
    assert message is not None and "is outside of it" in message


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../a", "a\nb", "\x1b[31ma", "C:a", "a\\b"])
def test_archives_write_only_into_their_folder(name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"tiny-imagenet-200/{name}" if name[0] != "/" else name, "x")
    message = complaint(read_tiny_zip, folder, path)
    assert message is not None and "which the genuine file does not" in message
    assert [p.name for p in tmp_path.rglob("*")] == ["data", path.name]


def test_names_do_not_garble_a_message(tmp_path):
    name = "a\nerror: all is well\x1b[2J\u202eb"
    save_file({name: np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    message = complaint(read_weights, tmp_path, tmp_path / "w.safetensors")
    assert message is None or "\n" not in message
    np.savez(tmp_path / "a.npz", **{name: np.zeros(3)})
    message = complaint(open_source, "npz", str(tmp_path / "a.npz"))
    assert message is not None and r"a\nerror: all is well\x1b[2J\u202eb" in message
    hostile = DamagedError(f"{tmp_path}/{name}.jpg is damaged")
    assert str(hostile).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5 × 10 – ‖θ‖ … ü 日本", "1.5 × 10 – ‖θ‖ … ü 日本"),
        ("a\r\n\tb\0", r"a\r\n\tb\x00"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\udcff\u2028\u202e", r"\udcff\u2028\u202e"),
    ],
)
def test_text_is_made_printable(text, expected):
    assert printable(text) == str(UserError(text)) == expected


def test_a_message_has_an_end():
    message = str(UserError(f"{'x' * 10**6}; set it to none"))
    assert len(message) < 5000 and message.endswith("; set it to none")


def test_a_report_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", rows=[])
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "run" / "report.html").symlink_to(tmp_path / "precious")
    report.write(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "as it was"
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
