"""Everything of a training run that is not the step: small objects with few hooks, called in a fixed order."""

from ardist.training.callbacks.base import Callback

__all__ = ["Callback"]
