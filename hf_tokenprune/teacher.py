"""Teachers: a frozen, packed, dense copy of a model, and where the "self" teacher of a run is kept."""

import copy
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import TrainingError, UnsupportedModelError
from .loading import from_pretrained
from .modeling.architectures import transformers_model
from .modeling.configs import restored
from .modeling.modeling_token_pruned import is_token_pruned, pack
from .modeling.shapes import replay, shape_map
from .processes import whole
from .weights import number_of

logger = logging.get_logger(__name__)
HEAD = re.compile(r"(For[A-Z]\w*|Model)$")
FOLDER = "_teacher"  # Trainer.push_to_hub leaves out what begins with an underscore
WRITING = f"{FOLDER}-writing-"  # what begins like this is ours to delete, and nothing else is


def dense_copy(model):
    """A packed copy of a model without its sites, in evaluation mode and without gradients."""
    twin = _skeleton(model)
    twin.load_state_dict({name: whole(value) for name, value in _dense_state(model).items()})
    return freeze(twin.to(model.device))


def _dense_state(model):
    """A model's state without that of its pruner."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("token_pruner.")}


def _skeleton(model, device="cpu"):
    """A dense model of the same sizes with weights of no meaning."""
    config = copy.deepcopy(model.config)
    for name in ("token_pruning", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    dense_class = type(model)._dense_class if is_token_pruned(model) else type(model)
    shapes = shape_map(model)
    with torch.device(device):
        with restored(config, shapes):
            attention = "sdpa" if dense_class._supports_sdpa else "eager"
            twin = dense_class._from_config(config, attn_implementation=attention, dtype=model.dtype)
        if shapes is not None:
            replay(twin, shapes)
    if getattr(model, "pooler", twin) is None:  # made with add_pooling_layer=False, which no config says
        twin.pooler = None
    return twin


def freeze(model):
    """Pack a model in place; evaluation mode, no gradients."""
    return pack(model).eval().requires_grad_(False)


def save_teacher(teacher, run_folder):
    """Write the teacher to `run_folder/_teacher`, all or nothing.

    Returns:
        A number that tells this teacher from any other, for `load_teacher`.
    """
    target = Path(run_folder) / FOLDER
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{WRITING}*"):  # by a run that was killed right here
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=target.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        teacher.save_pretrained(new)
        number = number_of(new)
        if target.exists():
            if number_of(target) == number:
                return number
            os.replace(target, old)
        os.replace(new, target)
        return number
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_teacher(run_folder, number, device):
    """The teacher that `save_teacher` wrote.

    Raises:
        TrainingError: it is not there, or is another run's.
    """
    folder = Path(run_folder) / FOLDER
    if not list(folder.glob("*.safetensors")):
        raise TrainingError(
            f"The run to resume has left its dense phase and needs its teacher, but there is none in {folder}. Put the folder back "
            "that this run wrote there, or name a teacher: ToP(teacher='path/to/it')."
        )
    if number and number_of(folder) != number:
        raise TrainingError(
            f"{folder} holds the teacher of another run than the checkpoint to resume. Use one output_dir per run, or name the "
            "right teacher: ToP(teacher='path/to/it')."
        )
    teacher = from_pretrained(folder).to(device)
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        tensor.data = tensor.data.clone()  # in a mapped file they are not aligned as torch's own, and the last bit may differ
    return freeze(teacher)


def find_teacher(teacher, student, tokenizer=None):
    """A teacher given by the user, as a model or by folder or Hub id, ready to teach. `tokenizer`: the Trainer's, if it has one.

    Raises:
        TrainingError: it is the student itself, judges other classes or in another order, or reads other tokens.
    """
    if isinstance(teacher, nn.Module) and student in teacher.modules():
        raise TrainingError(
            "The teacher is the model that is to be trained. ToP(teacher='self') takes it as it is after the dense phase."
        )
    model = from_pretrained(teacher) if isinstance(teacher, (str, os.PathLike)) else transformers_model(teacher)
    if model.config.num_labels != student.config.num_labels:
        raise TrainingError(
            f"The teacher has {model.config.num_labels} labels, the model to be trained {student.config.num_labels}. Give a teacher "
            "for the same task."
        )
    words = [getattr(each.config, "vocab_size", None) for each in (model, student)]
    if None not in words and words[0] != words[1]:  # tables may be padded, each to its own size
        said = f"The teacher knows {words[0]} tokens, the model to be trained {words[1]}"
        if isinstance(tokenizer, PreTrainedTokenizerBase) and len(tokenizer) > words[0]:
            raise TrainingError(
                f"{said}, and the Trainer's tokenizer makes {len(tokenizer)}: the teacher cannot read them. Give one that has the "
                "same tokenizer."
            )
        logger.warning(f"{said}. It teaches only if both have the same tokenizer.")
    heads = [HEAD.search(type(each).__name__) for each in (model, student)]
    if None not in heads and heads[0][0] != heads[1][0]:
        raise TrainingError(
            f"The teacher is a {type(model).__name__}, the model to be trained a {type(student).__name__}: they answer different "
            "questions. Give a teacher with the same head, fine-tuned for the same task."
        )
    labels = [{int(number): str(name).lower() for number, name in each.config.id2label.items()} for each in (model, student)]
    names, own = [[each[number] for number in sorted(each)] for each in labels]
    if "Classification" in type(model).__name__ and names != own and sorted(names) == sorted(own):
        raise TrainingError(
            f"The teacher's labels are {', '.join(names)}, in this order, those of the model to be trained {', '.join(own)}: each "
            "would be taught as another. Give the model to be trained the teacher's order (config.id2label and label2id, and the "
            "labels of your data), or give a teacher with this one; where only the names are wrong, correct id2label."
        )
    return dense_copy(model).to(student.device)


def check_head(model):
    """Raise `UnsupportedModelError` if a model has other weights than the class and config of its folder would make."""
    expected, found = (
        {name: value.shape for name, value in _dense_state(each).items()} for each in (_skeleton(model, "meta"), model)
    )
    odd = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if odd:
        raise UnsupportedModelError(
            f"This {type(model).__name__} is not as its config says, in {', '.join(odd[:3])}{', ...' if odd[3:] else ''}: saved, it "
            "could not be opened again. Say by the config what can be said there (num_labels=...), and leave the modules as they are."
        )
