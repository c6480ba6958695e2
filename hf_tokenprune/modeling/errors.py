"""Everything this package raises on purpose. Each class also inherits the built-in error a caller would expect.

TokenPruneError
├── UnsupportedModelError   (ValueError)    this model, head or attention set-up cannot be packed
├── UnsupportedInputError   (ValueError)    this call asks for something a packed model cannot return
├── ConfigError             (ValueError)    a setting, or a saved `config.token_pruning`, makes no sense
└── TrainingError           (RuntimeError)  the callback cannot do its work in this Trainer
"""


class TokenPruneError(Exception):
    """Base class of all errors raised by this package."""


class UnsupportedModelError(TokenPruneError, ValueError):
    """The model, its head or its attention set-up cannot be packed."""


class UnsupportedInputError(TokenPruneError, ValueError):
    """A forward call asks for something that a packed model cannot return."""


class ConfigError(TokenPruneError, ValueError):
    """A setting is out of range, or a saved `config.token_pruning` is damaged."""


class TrainingError(TokenPruneError, RuntimeError):
    """The training callback cannot do its work as things are."""
