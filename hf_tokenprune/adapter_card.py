"""What the card of an adapter that drops tokens says besides PEFT's own text or the Trainer's: PEFT alone cannot open it."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import logging

from .model_card import FILE, fingerprint
from .readme import is_changed, update
from .writing import write_file

logger = logging.get_logger(__name__)

TEXT = """
## Opening it

This adapter also says which tokens are dropped where, of which PEFT alone knows nothing. `pip install hf_tokenprune`, and
import it before:

```python
import hf_tokenprune
from peft import PeftModel

model = PeftModel.from_pretrained(base, adapter)  # the model that it was trained on, and this folder or repository
```

`model.merge_and_unload()` gives a model without adapters that drops the same tokens. What its `save_pretrained` writes
opens by `trust_remote_code=True` where neither package is installed.
"""


def describe_adapter(folder: str | os.PathLike) -> None:
    """Say in the README.md beside a saved adapter that drops tokens how it is opened. A person's README.md stays as it is. That the
    adapter is saved matters more: a card that cannot be written is a warning."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not (folder / FILE).is_file() or not str(config["peft_type"]).startswith("TOKEN_PRUNE"):
            return
        existing = (folder / FILE).read_text(encoding="utf-8")
        section = f"<!-- hf_tokenprune: begin {fingerprint(TEXT)} -->{TEXT}<!-- hf_tokenprune: end -->"
        text = update(ModelCard(section), existing, append=not is_changed(existing))
        if text is not None:
            write_file(folder / FILE, text)
    except Exception as error:  # whatever a README.md may hold
        logger.warning(f"The adapter is saved in {folder}, but its README.md is as it was: {type(error).__name__}: {error}")
