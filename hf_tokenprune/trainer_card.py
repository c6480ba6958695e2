"""How the model card gets into what the Trainer publishes.

`Trainer.push_to_hub` saves the model, lets `Trainer.create_model_card` write a README.md of its own over the one that was saved, and
uploads the folder; no event comes in between. So our section is added by a `create_model_card` that stands before the Trainer's
on that one Trainer.
"""

import functools
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .adapter_card import describe_adapter
from .model_card import FILE
from .modeling.architectures import transformers_model
from .modeling.modeling_token_pruned import as_published
from .readme import describe, is_persons

logger = logging.get_logger(__name__)


def follow(trainer):
    """Let a Trainer's model cards say what this package knows of the model that it has by then."""
    if "create_model_card" not in vars(trainer):
        trainer.create_model_card = functools.partial(_create, trainer, trainer.create_model_card)


def _create(trainer, create, *args, **kwargs):
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    if is_persons(folder / FILE):
        logger.warning(f"{folder / FILE} was written by hand, so it stays. Move it away to get a generated model card.")
        return
    own = vars(trainer.model).pop("_create_model_card", None)  # of sentence-transformers, with less than is known here
    try:
        create(*args, **kwargs)
    finally:
        if own is not None:
            trainer.model._create_model_card = own
    if (folder / "config.json").exists():  # or nothing has been saved yet, so that there is nothing to describe
        describe(
            transformers_model(trainer.model), folder, trainer.hub_model_id or trainer.args.hub_model_id, append=True, plot=True
        )
    elif (folder / "adapter_config.json").exists():
        describe_adapter(folder)


def complete(model, folder, step=None):
    """Put beside the weights of a step's checkpoint, which are uploaded during training, what the Trainer does not copy there: the
    code and the card."""
    folder = Path(folder)
    saved = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    with as_published(model):
        custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
    describe(model, folder, weights=saved if saved.is_dir() else None)
