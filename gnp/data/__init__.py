"""Data sets by name, augmentation, and batches."""

from gnp.data.augment import parse_augment
from gnp.data.sources import Source, Split, list_sources, open_source

__all__ = ["Source", "Split", "list_sources", "open_source", "parse_augment"]
