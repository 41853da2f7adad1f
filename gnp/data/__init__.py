"""Data sets by name, augmentation, and batches."""

from gnp.data.augment import parse_augment
from gnp.data.records import Source
from gnp.data.sources import holds, list_sources, open_source
from gnp.data.text import TextSource

__all__ = [
    "Source",
    "TextSource",
    "holds",
    "list_sources",
    "open_source",
    "parse_augment",
]
