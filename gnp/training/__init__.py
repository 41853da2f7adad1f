"""Training: from a configuration to a trained model in a work directory."""

from gnp.training.loop import train
from gnp.training.stopping import Interrupted

__all__ = ["Interrupted", "train"]
