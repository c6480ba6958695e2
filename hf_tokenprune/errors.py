"""The errors of this package, for `except tp.errors.ConfigError:`. They live beside the code that travels to the Hub."""

from .modeling.errors import ConfigError, TokenPruneError, TrainingError, UnsupportedInputError, UnsupportedModelError

__all__ = ["ConfigError", "TokenPruneError", "TrainingError", "UnsupportedInputError", "UnsupportedModelError"]
