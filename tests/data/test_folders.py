"""Folders of images, in each layout: which files, of which class, and what is wrong with them."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnp.data import resident
from gnp.data.records import DamagedError
from gnp.data.sources import open_source
from gnp.errors import UserError


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def write(path: Path, grey: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """An image all of a grey, by which it can be known; the file is a PNG whatever its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("L", size, grey).convert(mode).save(file, "PNG")
    path.write_bytes(file.getvalue())
    return path


def write_classes(root: Path, classes=("a", "b", "c"), train: int = 4, val: int = 2) -> None:
    for k, name in enumerate(classes):
        for i in range(train):
            write(root / "train" / name / f"{i}.jpg", 10 * k + i)
        for i in range(val):
            write(root / "val" / name / f"{i}.jpg", 100 + 10 * k + i)


def found(source, split: str) -> dict[str, int]:
    """Path → label."""
    records = source.splits[split]
    assert records.labels.dtype == np.int32
    pairs = {}
    for i in range(len(records)):
        record = records[i]
        assert record.label == records.labels[i]
        assert Path(record.name).read_bytes() == record.image
        pairs[os.path.relpath(record.name, source.where)] = record.label
    assert len(pairs) == len(records)
    return pairs


def message_of(root, name="folder") -> str:
    with pytest.raises(UserError) as caught:
        open_source(name, str(root), image_size=8)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Class folders


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "VALIDATION"])
def test_class_folders_for_train_and_validation(root, val):
    write_classes(root)
    (root / "val").rename(root / val)
    source = open_source("folder", str(root))
    assert (source.name, source.classes, source.where) == ("folder", ("a", "b", "c"), str(root))
    assert (source.image_shape, source.num_classes) == ((8, 8, 3), 3)
    assert source.num_examples == {"train": 12, "validation": 6}
    assert source.test_split == "validation"
    expected = {f"train/{name}/{i}.jpg": k for k, name in enumerate("abc") for i in range(4)}
    assert found(source, "train") == expected
    expected = {f"{val}/{name}/{i}.jpg": k for k, name in enumerate("abc") for i in range(2)}
    assert found(source, "validation") == expected


def test_three_splits(root):
    write_classes(root)
    write(root / "test" / "b" / "0.jpg")
    source = open_source("folder", str(root))
    assert source.num_examples == {"train": 12, "validation": 6, "test": 1}
    assert (source.test_split, found(source, "test")) == ("test", {"test/b/0.jpg": 1})


def test_classes_alone_are_the_training_split(root):
    for name in ("cat", "dog"):
        for i in range(3):
            write(root / name / f"{i}.png")
    source = open_source("folder", str(root))
    assert (source.classes, source.test_split) == (("cat", "dog"), None)
    expected = {f"{name}/{i}.png": k for k, name in enumerate(("cat", "dog")) for i in range(3)}
    assert found(source, "train") == expected


def test_pixels_of_every_record_are_those_of_its_file(root):
    write_classes(root)
    source = open_source("folder", str(root))
    for name, split in resident.load(source).items():
        for i in range(len(split.labels)):
            record = source.splits[name][i]
            number = int(Path(record.name).stem) + 10 * record.label + 100 * (name != "train")
            assert (split.images[i] == number).all()
            assert split.labels[i] == record.label


def test_the_order_is_shuffled_once_and_for_all(root):
    write_classes(root, "abcdefghij", train=40, val=1)
    source = open_source("folder", str(root))
    records = source.splits["train"]
    part = source.select(train="train[:25%]").splits["train"]
    assert set(part.labels) == set(range(10))
    assert len(np.unique(records.labels[:40])) > 5
    again = open_source("folder", str(root)).splits["train"]
    assert records.paths == again.paths
    # Independent of where it is, and the very same ever.
    order = np.random.RandomState(0).permutation(400)
    paths = [f"train/{name}/{i}.jpg" for name in "abcdefghij" for i in sorted(range(40), key=str)]
    assert list(records.paths) == [paths[i] for i in order]


def test_which_files_and_folders_count(root):
    write_classes(root, val=0)
    wanted = ["x.JPEG", "x.Jpg", "x.png", "x.PNG", "x.bmp", "x.gif", "x.tif", "x.TIFF", "x.webp"]
    wanted += ["deep/er/x.jpg", "Grüße 世界.jpg", "with space.jpg", "two.dots.jpg"]
    for name in wanted:
        write(root / "train" / "a" / name)
    other = [".hidden.jpg", "._x.jpg", "x.txt", "x.jpg.bak", "jpg", "x.npy", "Thumbs.db"]
    for name in [*other, ".hidden/x.jpg", "deep/.thumbnails/x.jpg"]:
        write(root / "train" / "a" / name)
    write(root / "train" / ".git" / "x.jpg")
    write(root / "train" / "readme.jpg")
    write(root / ".cache" / "x.jpg")
    source = open_source("folder", str(root))
    assert source.classes == ("a", "b", "c")
    actual = {path for path, label in found(source, "train").items() if label == 0}
    expected = {f"train/a/{name}" for name in [*wanted, *(f"{i}.jpg" for i in range(4))]}
    assert actual == expected


def test_linked_folders_and_files_are_followed(root, tmp_path):
    write_classes(root, val=0)
    elsewhere = tmp_path / "elsewhere"
    for i in range(2):
        write(elsewhere / f"{i}.jpg", 7)
    (root / "train" / "d").symlink_to(elsewhere, target_is_directory=True)
    (root / "train" / "a" / "link.jpg").symlink_to(elsewhere / "0.jpg")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    source = open_source("folder", str(tmp_path / "link"))
    assert source.classes == ("a", "b", "c", "d")
    pairs = found(source, "train")
    assert pairs["train/d/1.jpg"] == 3 and pairs["train/a/link.jpg"] == 0 and len(pairs) == 15


def test_names_that_are_not_utf_8(root):
    write_classes(root, val=0)
    path = os.fsdecode(os.fsencode(root) + b"/train/a/\xff\xe4.jpg")
    write(Path(path), 77)
    source = open_source("folder", str(root))
    assert path in [source.splits["train"][i].name for i in range(13)]
    images = resident.load(source)["train"].images
    assert (images == 77).any()


def test_names_are_sorted_as_text_and_unicode_is_kept(root):
    for name in ("10", "9", "B", "a", "Ä", "猫"):
        write(root / name / "x.jpg")
    assert open_source("folder", str(root)).classes == ("10", "9", "B", "a", "Ä", "猫")


def test_tilde_is_the_home_folder(root, monkeypatch):
    write_classes(root)
    monkeypatch.setenv("HOME", str(root.parent))
    assert open_source("folder", "~/data").where == str(root)


def test_records_can_be_pickled_and_are_small(root):
    write_classes(root)
    records = open_source("folder", str(root)).select(train="train[:50%]").splits["train"]
    packed = pickle.dumps(records)
    copy = pickle.loads(packed)
    assert [copy[i] for i in range(6)] == [records[i] for i in range(6)]
    assert len(packed) < 2000


def test_a_file_that_goes_away_is_damaged(root):
    write_classes(root)
    records = open_source("folder", str(root)).splits["train"]
    path = Path(records[3].name)
    path.unlink()
    with pytest.raises(DamagedError, match=f"^{path} cannot be read: No such file or directory$"):
        records[3]


# Sizes


def test_images_that_differ_in_size_need_one(root):
    write_classes(root)
    write(root / "train" / "a" / "other.jpg", size=(16, 12))
    with pytest.raises(UserError) as caught:
        open_source("folder", str(root))
    assert str(caught.value) == (
        f"the images of folder in {root} differ in size: set config.data.image_size, such as 224"
    )
    source = open_source("folder", str(root), image_size=14)
    assert (source.image_shape, source.same_size) == ((16, 16, 3), False)
    assert resident.load(source)["train"].images.shape == (13, 16, 16, 3)


def test_sizes_are_looked_up_without_decoding(root, monkeypatch):
    write_classes(root)
    monkeypatch.setattr(Image.Image, "load", None)
    assert open_source("folder", str(root)).image_shape == (8, 8, 3)


def test_a_damaged_file_does_not_count_for_the_size(root):
    write_classes(root)
    (root / "train" / "a" / "0.jpg").write_bytes(b"")
    assert open_source("folder", str(root)).image_shape == (8, 8, 3)


# Tiny-ImageNet


def write_tiny(root: Path, num_classes: int = 4) -> list[str]:
    classes = [f"n{number:08d}" for number in range(1000, 1000 + num_classes)]
    lines = []
    for k, name in enumerate(classes):
        for i in range(3):
            file = root / "train" / name / "images" / f"{name}_{i}.JPEG"
            write(file, 10 * k + i, (64, 64), "L" if i == 2 else "RGB")
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    for i in range(2 * num_classes):
        write(root / "val" / "images" / f"val_{i}.JPEG", 100 + i, (64, 64))
        lines.append(f"val_{i}.JPEG\t{classes[-1 - i % num_classes]}\t0\t32\t44\t62\n")
        write(root / "test" / "images" / f"test_{i}.JPEG", 200, (64, 64))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in reversed(classes)))
    words = [f"{name}\tthing {name}, other name\n" for name in classes[:-1]]
    (root / "words.txt").write_text("n00000001\tentity\n" + "".join(words))
    return classes


@pytest.mark.parametrize("around", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(root, around, caplog):
    classes = write_tiny(root / around)
    source = open_source("tiny_imagenet", str(root))
    assert source.classes == (*(f"thing {name}" for name in classes[:-1]), classes[-1])
    assert source.num_examples == {"train": 12, "validation": 8}
    assert (source.test_split, source.same_size) == ("validation", True)
    assert (source.image_shape, source.where) == ((64, 64, 3), str(root / around))
    loaded = resident.load(source)
    for image, label in zip(loaded["validation"].images, loaded["validation"].labels, strict=True):
        assert label == 3 - (image[0, 0, 0] - 100) % 4
        assert (image == image[0, 0, 0]).all()
    np.testing.assert_array_equal(loaded["train"].images[:, 0, 0, 0] // 10, loaded["train"].labels)
    (warning,) = caplog.records
    assert warning.getMessage() == f"tiny_imagenet has 4 classes in {root / around}, not 200"


def test_tiny_imagenet_of_all_classes_is_not_warned_of(root, caplog):
    for k in range(200):
        write(root / "train" / f"n{k:08d}" / "images" / "x.JPEG", size=(64, 64))
    source = open_source("tiny_imagenet", str(root))
    assert source.num_examples == {"train": 200} and not caplog.records


def test_an_image_of_another_size_is_damaged_in_tiny_imagenet(root):
    classes = write_tiny(root)
    path = write(root / "train" / classes[0] / "images" / "x.JPEG", size=(64, 64))
    source = open_source("tiny_imagenet", str(root))
    write(path, size=(64, 32))
    with pytest.raises(UserError) as caught:
        resident.load(source)
    assert str(caught.value).startswith(
        f"{path} is damaged: it has 64 × 32 pixels, not 64 × 64; mend or remove it, or set "
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "n00001000 n99999999\nn88888888",
            "/train/n88888888 is missing, which wnids.txt lists (2 of 3",
        )
    ],
)
def test_tiny_imagenet_that_is_not_whole(root, content, reason):
    write_tiny(root)
    (root / "wnids.txt").write_text(content)
    message = message_of(root, "tiny_imagenet")
    assert message == f"{root}{reason} are): unpack the archive again"
    (root / "wnids.txt").write_bytes(b"\xff")
    assert message_of(root, "tiny_imagenet").startswith(f"cannot read {root}/wnids.txt: ")


# Files of labels


SYNSETS = ("n01440764", "n01443537", "n02085620")


def write_flat(root: Path, num_val: int = 6) -> list[int]:
    """Training images in folders, those of validation in one, and the classes of these."""
    write_classes(root, SYNSETS, val=0)
    for i in range(num_val):
        write(root / "val" / f"ILSVRC2012_val_{i + 1:08d}.JPEG", 100 + i)
    return [(i * i + 1) % 3 for i in range(num_val)]


def val_labels(names, classes):
    return "".join(f"{name} {c}\n" for name, c in zip(names, classes, strict=True))


def val_labels_with_tabs(names, classes):
    return "\ufeff" + val_labels(names, classes).replace(" ", "\t").replace("\n", "\r\n")


def kaggle(names, classes):
    lines = [
        f"{Path(name).stem},{c} 85 1 499 272 {c} 1 2 3 4 \n"
        for name, c in zip(names, classes, strict=True)
    ]
    return "ImageId,PredictionString\n" + "".join(reversed(lines))


def in_order(names, classes):
    return "".join(f"{c}\n" for c in classes)


@pytest.mark.parametrize("place", ["val", ""])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("val_labels.txt", val_labels),
        ("val_labels.txt", val_labels_with_tabs),
        ("val_annotations.txt", val_labels_with_tabs),
        ("LOC_val_solution.csv", kaggle),
        ("imagenet_2012_validation_synset_labels.txt", in_order),
        ("val_labels.txt", in_order),
    ],
)
def test_imagenet_with_each_file_of_labels(root, place, file, content):
    labels = write_flat(root)
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(6)]
    (root / place / file).write_text(content(names, [SYNSETS[label] for label in labels]))
    write(root / "test" / "ILSVRC2012_test_00000001.JPEG")  # whose class nobody knows
    source = open_source("imagenet", str(root))
    expected = {f"val/{name}": label for name, label in zip(names, labels, strict=True)}
    assert found(source, "validation") == expected
    assert (source.test_split, set(source.splits)) == ("validation", {"train", "validation"})


def test_a_test_set_may_have_labels_of_its_own(root):
    write_classes(root)
    for i in range(3):
        write(root / "test" / f"{i}.jpg")
    (root / "test" / "val_labels.txt").write_text("0.jpg c\n1.jpg a\n2.jpg b\n")
    source = open_source("folder", str(root))
    assert found(source, "test") == {"test/0.jpg": 2, "test/1.jpg": 0, "test/2.jpg": 1}


def test_order_is_that_of_the_file_names_not_of_the_folders(root):
    write_classes(root, SYNSETS, val=0)
    for i, folder in enumerate(["z", "y", "x"]):
        write(root / "val" / folder / f"{i}.JPEG")
    (root / "val_labels.txt").write_text("".join(f"{c}\n" for c in SYNSETS))
    expected = {"val/z/0.JPEG": 0, "val/y/1.JPEG": 1, "val/x/2.JPEG": 2}
    assert found(open_source("imagenet", str(root)), "validation") == expected


def test_labels_with_spaces_inside(root):
    write_classes(root, ("golden retriever", "tabby, cat"), val=0)
    for i in range(2):
        write(root / "val" / f"my pet {i}.jpg")
    file = root / "val_labels.txt"
    for text in (
        "my pet 0.jpg\tgolden retriever\t1\nmy pet 1.jpg\ttabby, cat\n".replace("\t1", ""),
        "my pet 0.jpg,golden retriever\nmy pet 1.jpg,tabby, cat\n",
        "golden retriever\ntabby, cat\n",
    ):
        file.write_text(text)
        source = open_source("folder", str(root))
        assert found(source, "validation") == {"val/my pet 0.jpg": 0, "val/my pet 1.jpg": 1}


def test_imagenet_is_found_inside(root, caplog):
    write_classes(root / "ILSVRC2012", SYNSETS)
    source = open_source("imagenet", str(root))
    assert source.where == str(root / "ILSVRC2012")
    assert [record.getMessage() for record in caplog.records] == [
        f"imagenet has 3 classes in {root}/ILSVRC2012, not 1000"
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "x.jpg n01440764\n",
            "does not say which class {root}/val/ILSVRC2012_val_00000001.JPEG is",
        ),
        ("x.jpg n01440764\n", "is (6 such images)"),
        ("", "has 0 lines for 6 images"),
        ("n01440764\n" * 5, "has 5 lines for 6 images"),
        ("n01440764\n" * 7, "has 7 lines for 6 images"),
        ("n0144\n" * 6, "names the class 'n0144', of which there are no training images (their "),
        (
            "".join(f"ILSVRC2012_val_0000000{i}.JPEG n9 1 2\n" for i in range(1, 7)),
            "names the class 'n9', of which there are no training images (their folders are "
            "n01440764, n01443537, n02085620, …)",
        ),
        (b"\xff\xfe\xff", "'utf-8' codec can't decode"),
    ],
)
def test_files_of_labels_that_do_not_fit(root, content, told):
    write_flat(root)
    file = root / "val_labels.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(root)
    assert str(file) in message and told.format(root=root) in message


def test_a_corrected_label_is_not_taken_from_the_cache(root):
    labels = write_flat(root)
    file = root / "val_labels.txt"
    for shift in (0, 1):
        labels = [(label + shift) % 3 for label in labels]
        file.write_text("".join(f"{SYNSETS[label]}\n" for label in labels))
        split = resident.load(open_source("folder", str(root)))["validation"]
        assert [labels[image[0, 0, 0] - 100] for image in split.images] == split.labels.tolist()


# What is wrong


def nothing(root):
    root.rmdir()
    return f"cannot read the folder {root}: No such file or directory"


def file(root):
    root.rmdir()
    root.write_text("")
    return f"cannot read the folder {root}: Not a directory"


def empty(root):
    return f"{root} has no folders: folder wants one for each class, with its images inside"


def only_files(root):
    write(root / "x.jpg")
    return f"{root} has no folders: folder wants one for each class, with its images inside"


def empty_train(root):
    write_classes(root)
    (root / "train").rename(root / "old")
    write(root / "train" / "x.jpg")
    return f"{root}/train has no folders: folder wants one for each class, with its images inside"


def no_train(root):
    write(root / "val" / "a" / "x.jpg")
    write(root / "test" / "a" / "x.jpg")
    return f"{root} has no folder 'train' beside "


def empty_class(root):
    write_classes(root)
    (root / "train" / "aa").mkdir()
    return f"{root}/train/aa has no images (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp); "


def two_empty_classes(root):
    write_classes(root)
    (root / "train" / "aa").mkdir()
    (root / "train" / "notes").mkdir()
    (root / "train" / "notes" / "x.txt").write_text("")
    return "remove it if it is no class (2 such folders)"


def all_empty(root):
    (root / "train" / "a").mkdir(parents=True)
    return f"{root}/train has no images (.bmp"


def foreign_class(root):
    write_classes(root)
    write(root / "val" / "x" / "0.jpg")
    return (
        f"{root}/val/x is no class of the training images (their folders are a, b, c, …): remove "
        "it, or add it to them"
    )


def empty_validation(root):
    write_classes(root, val=0)
    (root / "val").mkdir()
    return f"{root}/val has no images (.bmp"


def empty_validation_classes(root):
    write_classes(root, val=0)
    (root / "val" / "a").mkdir(parents=True)
    return f"{root}/val has no images (.bmp"


def two_of_a_kind(root):
    write_classes(root)
    write(root / "valid" / "a" / "0.jpg")
    return f"{root}/val and {root}/valid are one split: keep one"


def unknown_classes(root):
    write_classes(root, val=0)
    write(root / "val" / "0.jpg")
    return (
        f"the classes of the images in {root}/val are not known: sort them into folders named as "
        "those of the training images, or put val_annotations.txt or val_labels.txt there, with "
        "lines 'FILE CLASS'"
    )


@pytest.mark.parametrize(
    "prepare",
    [
        nothing,
        file,
        empty,
        only_files,
        empty_train,
        no_train,
        empty_class,
        two_empty_classes,
        all_empty,
        foreign_class,
        empty_validation,
        empty_validation_classes,
        two_of_a_kind,
        unknown_classes,
    ],
)
def test_what_is_wrong_is_said(root, prepare):
    told = prepare(root)
    assert told in message_of(root)


@pytest.mark.parametrize("name", ["folder", "imagenet", "tiny_imagenet"])
def test_without_a_folder(name):
    with pytest.raises(UserError, match=rf"config.data.data_dir is not set: for {name} it is the "):
        open_source(name)
    with pytest.raises(UserError, match=r"config.data.data_dir is not set"):
        open_source(name, "")


@pytest.mark.parametrize("call", ["scandir", "walk"])
def test_folders_that_may_not_be_read(root, monkeypatch, call):
    write_classes(root)
    real = getattr(os, call)

    def refuse(path, *args, onerror=None, **kwargs):
        if Path(path).name == ("train" if call == "scandir" else "b"):
            error = PermissionError(13, "Permission denied", str(path))
            if call == "scandir":
                raise error
            onerror(error)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    culprit = root / "train" / ("" if call == "scandir" else "b")
    assert message_of(root) == f"cannot read the folder {culprit}: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", ["", "train", "train/{}", "val_labels.txt", "train/{}/0.jpg"])
def test_what_may_not_be_read(root, place):
    write_flat(root)
    (root / "val_labels.txt").write_text("n01440764\n" * 6)
    path = root / place.format(SYNSETS[1])
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        if path.suffix == ".jpg":
            source = open_source("folder", str(root))
            with pytest.raises(UserError, match=f"{path} cannot be read: Permission denied"):
                resident.load(source)
        else:
            assert str(path) in message_of(root)
    finally:
        path.chmod(mode)
