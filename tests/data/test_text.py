"""Text: the vocabulary, contiguous streams, and every word predicted exactly once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp import data
from gnp.data.text import TextEvalBatches, TextTrainBatches
from gnp.errors import UserError


def write(folder, train, valid="a\nb\n", test="b\na\n"):
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"ptb.{split}.txt").write_text(text)
    return data.open_source("ptb", str(folder))


def test_words_are_numbered_by_frequency_and_lines_end(tmp_path):
    source = write(tmp_path, " b a b \n c a b\n", valid="a b\nc\n", test="c\nb\n")
    assert source.vocabulary == ("b", "<eos>", "a", "c")
    np.testing.assert_array_equal(source.words["train"], [0, 2, 0, 1, 3, 2, 0, 1])
    np.testing.assert_array_equal(source.words["validation"], [2, 0, 1, 3, 1])
    assert source.words["train"].dtype == np.int32
    assert (source.num_classes, source.holds, source.unit) == (4, "tokens", "word")
    assert source.num_examples == {"train": 8, "validation": 5, "test": 4}
    assert data.holds("ptb") == "tokens" and data.holds("digits") == "images"


def test_a_word_without_a_number_is_unk(tmp_path):
    source = write(tmp_path, "a <unk>\nb\n", valid="z\na\n")
    unknown = source.vocabulary.index("<unk>")
    assert source.words["validation"][0] == unknown


def damaged(folder):
    (folder / "ptb.test.txt").unlink()


def not_text(folder):
    (folder / "ptb.test.txt").write_bytes(b"\xff\xfe\xff")


def empty(folder):
    (folder / "ptb.valid.txt").write_text("")


def foreign(folder):
    (folder / "ptb.valid.txt").write_text("a\nb zebra\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            damaged,
            "ptb.test.txt: No such file or directory; config.data.data_dir must be the folder",
        ),
        (not_text, "ptb.test.txt is not a UTF-8 text"),
        (empty, "ptb.valid.txt is empty"),
        (foreign, "ptb.valid.txt, line 2: 'zebra' is not in ptb.train.txt, and neither is <unk>"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, change, message):
    write(tmp_path, "a b\nb\n")
    change(tmp_path)
    with pytest.raises(UserError) as error:
        data.open_source("ptb", str(tmp_path))
    assert message in str(error.value)


def test_without_a_folder():
    with pytest.raises(UserError, match=r"set config.data.data_dir to the folder with ptb.train"):
        data.open_source("ptb")


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 60), st.integers(1, 7), st.integers(1, 6), st.integers(0, 50))
def test_streams_go_on_where_they_were(num_words, batch_size, length, step):
    """Successive batches of a stream are the text itself, round and round."""
    batches = TextTrainBatches(num_words, batch_size, length)
    words = {"word": jnp.arange(num_words, dtype=jnp.int32)}
    order = np.asarray(batches.order(jnp.int32(step), 3))
    read = [batches.batch(words, position, jnp.int32(0)) for position in order]
    inputs = np.concatenate([b["input"] for b in read], axis=1)
    labels = np.concatenate([b["label"] for b in read], axis=1)
    assert inputs.shape == (batch_size, 3 * length)
    starts = [stream * num_words // batch_size + step * length for stream in range(batch_size)]
    expected = (np.array(starts)[:, None] + np.arange(3 * length)) % num_words
    np.testing.assert_array_equal(inputs, expected)
    np.testing.assert_array_equal(labels, (expected + 1) % num_words)


def test_every_word_once_an_epoch():
    batches = TextTrainBatches(num_examples=24, batch_size=2, sequence_length=3)
    words = {"word": jnp.arange(24, dtype=jnp.int32)}
    steps = 24 // batches.examples_per_step
    for first in (0, steps):
        read = [batches.batch(words, p, jnp.int32(0)) for p in batches.order(first, steps)]
        seen = np.concatenate([np.ravel(b["label"]) for b in read])
        assert sorted(seen) == list(range(24))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 80), st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
def test_every_word_but_the_first_is_evaluated_once(num_words, num_streams, length, filling):
    batches = TextEvalBatches(num_words, num_streams, length, num_streams + filling)
    words = {"word": jnp.arange(num_words, dtype=jnp.int32)}
    every = [jax.tree.map(np.asarray, batches.batch(words, i)) for i in range(batches.num_batches)]
    together = {key: np.concatenate([b[key] for b in every], axis=1) for key in every[0]}
    real = together["weight"] == 1
    assert sorted(together["label"][real]) == list(range(1, num_words))
    assert batches.num_examples == num_words - 1
    np.testing.assert_array_equal(together["input"][real] + 1, together["label"][real])
    for stream, kept in zip(together["input"], real, strict=True):  # in order, and nothing between
        np.testing.assert_array_equal(np.diff(stream[kept]), 1)
        assert not kept[np.flatnonzero(~kept).min(initial=len(kept)) :].any()
