"""Text for language models: words by number, and batches of contiguous streams.

A text is a circle of N words. A batch of B streams reads it side by side, from B places that are
N/B words apart, `sequence_length` words a step; the next step goes on where this one ends, so that
the model's state can be carried from step to step.
"""

import collections
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gnp.data.pipeline import Batch
from gnp.data.records import plain
from gnp.errors import UserError

_FILES = {"train": "train", "validation": "valid", "test": "test"}  # split → as in the file's name


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A text, in words by number.

    Attributes:
      name: as `list_sources` has it.
      vocabulary: the words; a word's number is its place here.
      words: of each split, int32[N].
    """

    name: str
    vocabulary: tuple[str, ...]
    words: dict[str, np.ndarray]

    holds = "tokens"
    unit = "word"

    @property
    def num_classes(self) -> int:
        """The number of words in the vocabulary."""
        return len(self.vocabulary)

    @property
    def num_examples(self) -> dict[str, int]:
        """The number of words in each split."""
        return {split: len(words) for split, words in self.words.items()}


def open_ptb(data_dir: str | None) -> TextSource:
    """Reads the Penn TreeBank as T. Mikolov prepared it: a sentence a line, words by spaces.

    Each line ends in the word `<eos>`. The vocabulary is that of the training text, the most
    frequent word first; a word that is not in it is `<unk>`, if the training text has that.

    Args:
      data_dir: the folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt.

    Raises:
      UserError: if a file is missing, empty, no UTF-8 text, or has a word without a number.
    """
    where = "the folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt"
    if data_dir is None:
        raise UserError(
            f"the text of ptb is licensed and does not come with gnp: set config.data.data_dir to "
            f"{where}"
        )
    texts = {}
    for split, name in _FILES.items():
        path = Path(data_dir).expanduser() / f"ptb.{name}.txt"
        try:
            text = Path(plain(path)).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; config.data.data_dir must be {where}"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a UTF-8 text") from None
        texts[split] = [[*line.split(), "<eos>"] for line in text.removesuffix("\n").split("\n")]
        if not text.strip():
            raise UserError(f"{path} is empty")

    counts = collections.Counter(word for line in texts["train"] for word in line)
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
    numbers = {word: i for i, word in enumerate(vocabulary)}
    unknown = numbers.get("<unk>")
    words = {}
    for split, lines in texts.items():
        found = [numbers.get(word, unknown) for line in lines for word in line]
        if None in found:
            number, word = next(
                (i, word) for i, line in enumerate(lines, 1) for word in line if word not in numbers
            )
            raise UserError(
                f"ptb.{_FILES[split]}.txt, line {number}: {word!r} is not in ptb.train.txt, and "
                "neither is <unk> to stand for it"
            )
        words[split] = np.array(found, np.int32)
    return TextSource("ptb", tuple(vocabulary), words)


@dataclasses.dataclass(frozen=True)
class TextTrainBatches:
    """Batches of a text that streams go round again and again.

    Each word is predicted once in an epoch of N / (B · T) steps, and no remainder is dropped.

    Attributes:
      num_examples: N, the words of the text.
      batch_size: B, the streams.
      sequence_length: T, the words of a stream in a step.
    """

    num_examples: int
    batch_size: int
    sequence_length: int

    @property
    def examples_per_step(self) -> int:
        """The words that a step learns from."""
        return self.batch_size * self.sequence_length

    def order(self, first_step: jax.Array, num_steps: int) -> jax.Array:
        """How far the streams have come before each of `num_steps` steps, int32[num_steps]."""
        return (first_step + jnp.arange(num_steps)) * self.sequence_length % self.num_examples

    def batch(self, data: Batch, position: jax.Array, step: jax.Array) -> Batch:
        """The words at a position of `order`, int32[B, T], and as labels those after them."""
        del step
        streams = np.arange(self.batch_size, dtype=np.int64) * self.num_examples // self.batch_size
        ahead = position + jnp.arange(self.sequence_length + 1)
        places = (jnp.asarray(streams, jnp.int32)[:, None] + ahead) % self.num_examples
        words = data["word"][places]
        return {"input": words[:, :-1], "label": words[:, 1:]}


@dataclasses.dataclass(frozen=True)
class TextEvalBatches:
    """Batches of a text in which every word but the first is predicted exactly once.

    The streams begin with an empty state, and what they have less than the others is filled up
    with words of weight 0.

    Attributes:
      num_words: N, the words of the text.
      num_streams: how many pieces it is read in.
      sequence_length: T.
      batch_size: rows of a batch; those beyond `num_streams` have weight 0.
    """

    num_words: int
    num_streams: int
    sequence_length: int
    batch_size: int

    @property
    def num_examples(self) -> int:
        """The words that are predicted."""
        return self.num_words - 1

    @property
    def num_batches(self) -> int:
        """The steps in which the streams are at their ends."""
        return -(-self._stream_length // self.sequence_length)

    @property
    def _stream_length(self) -> int:
        return -(-self.num_examples // self.num_streams)

    def batch(self, data: Batch, i: jax.Array) -> Batch:
        """Batch `i`: words and labels int32[B, T], "weight" float32[B, T]."""
        offset = i * self.sequence_length + jnp.arange(self.sequence_length)
        stream = jnp.arange(self.batch_size)[:, None]
        place = stream * self._stream_length + offset
        real = (stream < self.num_streams) & (offset < self._stream_length)
        real &= place < self.num_examples
        place = jnp.where(real, place, 0)
        return {
            "input": data["word"][place],
            "label": data["word"][place + 1],
            "weight": real.astype(jnp.float32),
        }
