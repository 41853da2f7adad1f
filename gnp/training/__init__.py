"""Training: from a configuration to a trained model in a work directory."""

from gnp.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]
