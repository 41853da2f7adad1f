"""Parts of splits are those of TFDS, and a key changes with the files."""

import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gnp.data.records import ArrayRecords, Record, Source, Subset, fingerprint, first_line
from gnp.errors import UserError


class Numbered:
    """So many examples, the i-th of which is of class i."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return Record(np.full((1, 1, 1), i, np.uint8), i, f"example {i}")

    @property
    def labels(self):
        return np.arange(self.size)


def source(**sizes: int) -> Source:
    splits = {name: Numbered(size) for name, size in sizes.items()}
    return Source("some_set", ("a",), (1, 1, 1), True, splits, "test", None, "/some/folder")


def bounds(size: int, text: str) -> tuple[int, int] | None:
    """The part of a split of so many examples, None if there is none."""
    try:
        (part,) = source(train=size).select(x=text).splits.values()
    except UserError:
        return None
    assert isinstance(part, Subset)
    return part.start, part.stop


def bounds_of_tfds(size: int, text: str) -> tuple[int, int] | None:
    info = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[size],
        num_bytes=0,
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name="x", data_dir="/x", split="train", filetype_suffix="array_record"
        ),
    )
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(text).to_absolute({"train": info})
    except ValueError:
        return None
    start, stop = part.from_ or 0, size if part.to is None else part.to
    return (start, stop) if start < stop else None


units = st.sampled_from(["", "%"])


@st.composite
def specs(draw):
    """A size and a part of it, mostly near the ends."""
    size = draw(st.integers(1, 2000))
    unit = draw(units)
    limit = 110 if unit else size + 2
    bound = st.none() | st.integers(-limit, limit)
    start, stop = draw(bound), draw(bound)
    assume((start, stop) != (None, None))  # TFDS has no "train[:]"
    text = ":".join("" if b is None else f"{b}{unit}" for b in (start, stop))
    # TFDS takes -1 % of 20 examples, which is rounded to none, for the beginning, not for the end.
    for b in (start, stop):
        assume(not (unit and b and b < 0 and round(b * size / 100) == 0))
    return size, f"train[{text}]"


@settings(deadline=None)
@given(specs())
def test_parts_are_those_of_tfds(spec):
    assert bounds(*spec) == bounds_of_tfds(*spec)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", (0, 250)),
        ("train[:]", (0, 250)),
        ("train[:90%]", (0, 225)),
        ("train[90%:]", (225, 250)),
        ("train[-10%:]", (225, 250)),
        ("train[:-10%]", (0, 225)),
        ("train[25%:75%]", (62, 188)),
        ("train[:1%]", (0, 2)),
        ("train[:100]", (0, 100)),
        ("train[-3:-1]", (247, 249)),
        ("train[10%:100]", (25, 100)),
    ],
)
def test_known_parts(text, expected):
    assert bounds(250, text) == expected


@settings(deadline=None)
@given(size=st.integers(1, 10**7), bound=st.integers(-100, 100), unit=units)
def test_what_ends_somewhere_and_what_begins_there_is_all(size, bound, unit):
    assume(unit or abs(bound) <= size)
    before = bounds(size, f"train[:{bound}{unit}]")
    after = bounds(size, f"train[{bound}{unit}:]")
    if bound == 0:
        assert (before, after) == (None, (0, size))
    elif before is None or after is None:
        assert (before or after) == (0, size)
    else:
        assert before[0] == 0 and before[1] == after[0] and after[1] == size


def test_parts_hold_the_examples_and_the_labels():
    original = source(train=100, test=5)
    parts = original.select(train="train[:90%]", validation="train[90%:]", test="test")
    assert parts.num_examples == {"train": 90, "validation": 10, "test": 5}
    assert [parts.splits["validation"][i].label for i in range(10)] == list(range(90, 100))
    np.testing.assert_array_equal(parts.splits["train"].labels, np.arange(90))
    np.testing.assert_array_equal(parts.splits["validation"].labels, np.arange(90, 100))
    assert (parts.name, parts.classes, parts.where) == ("some_set", ("a",), "/some/folder")
    assert original.num_examples == {"train": 100, "test": 5}


def test_a_part_of_a_part_is_a_part_of_the_whole():
    half = source(train=100).select(train="train[50%:]")
    (part,) = half.select(train="train[10:20]").splits.values()
    assert (part.split, part.start, part.stop) == ("train", 60, 70)
    assert part[0].label == 60
    with pytest.raises(UserError, match="has only 50 images"):
        half.select(train="train[:51]")


def test_labels_that_are_not_known_are_not_known_of_a_part():
    class Unknown:
        labels = None

        def __len__(self):
            return 4

    assert Subset(Unknown(), "train", 1, 3).labels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trian[:90%]",
            "'trian[:90%]', but some_set in /some/folder has no split 'trian'; there: ",
        ),
        ("train[:50]", "'train[:50]', but 'train' of some_set in /some/folder has only 40 images"),
        ("train[:101%]", "write a split"),
        ("train[-41:]", "has only 40 images"),
        ("train[50%:50%]", "holds none of the 40 images of 'train' of some_set in /some/folder"),
        ("train[50%:10%]", "holds none of the 40 images"),
        ("train[:1%]", "holds none of the 40 images"),
        ("train[:0]", "holds none of the 40 images"),
        ("train[40:]", "holds none of the 40 images"),
        ("empty", "holds none of the 0 images"),
        (
            "train[90%]",
            "write a split, or a part of one by examples or percent: train, train[:90%]",
        ),
        ("train[:90", "write a split"),
        ("train[::2]", "write a split"),
        ("train[:0.5]", "write a split"),
        ("train [:5]", "write a split"),
        ("train[:5]\n", "write a split"),
        ("train[:9999999999999]", "write a split"),
        ("", "write a split"),
    ],
)
def test_parts_that_cannot_be(text, message):
    with pytest.raises(UserError) as caught:
        source(train=40, test=3, empty=0).select(train="train", validation=text)
    assert str(caught.value).startswith(f"config.data.validation is {text!r}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_are_records():
    records = ArrayRecords(np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1), np.array([3, 5]), "x")
    assert (len(records), records[1].label, records[1].name) == (2, 5, "image 1 of x")
    np.testing.assert_array_equal(records[1].image, [[[4], [5]], [[6], [7]]])


def test_key_changes_when_a_file_does(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("12345")
    b.write_text("1")
    key = fingerprint([a, str(b)])
    assert fingerprint([a, b]) == key and len(key) == 16
    keys = {key, fingerprint([b, a]), fingerprint([a]), fingerprint([])}
    stat = a.stat()
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # touched
    keys.add(fingerprint([a, b]))
    a.write_text("123456")  # written, at the same time as before
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys.add(fingerprint([a, b]))
    (tmp_path / "inside").mkdir()
    a.rename(tmp_path / "inside" / "a")  # moved
    keys.add(fingerprint([tmp_path / "inside" / "a", b]))
    assert len(keys) == 7
    with pytest.raises(FileNotFoundError):
        fingerprint([a, b])


def test_key_of_a_link_is_that_of_its_file(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert fingerprint([tmp_path / "link"]) == fingerprint([tmp_path / "a"])


def test_key_of_a_name_that_is_not_utf_8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    with open(path, "w") as file:
        file.write("1")
    assert fingerprint([path]) != fingerprint([])


def test_first_line_of_an_error():
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
