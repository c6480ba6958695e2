"""Teachers: a frozen, packed, dense copy of a model, and where the "self" teacher of a run is kept."""

import copy
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

from .errors import TrainingError
from .loading import from_pretrained
from .modeling.architectures import transformers_model
from .modeling.configs import restored
from .modeling.modeling_token_pruned import is_token_pruned, pack
from .modeling.shapes import replay, shape_map
from .processes import whole

FOLDER = "_teacher"  # Trainer.push_to_hub leaves out what begins with an underscore


def dense_copy(model):
    """A packed copy of a model without its sites, in evaluation mode and without gradients."""
    pruned = is_token_pruned(model)
    config = copy.deepcopy(model.config)
    for name in ("token_pruning", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    dense_class = type(model)._dense_class if pruned else type(model)
    shapes = shape_map(model)
    with restored(config, shapes):
        attention = "sdpa" if dense_class._supports_sdpa else "eager"
        twin = dense_class._from_config(config, attn_implementation=attention, dtype=model.dtype)
    if shapes is not None:
        replay(twin, shapes)
    state = {k: whole(v) for k, v in model.state_dict().items() if not k.startswith("token_pruner.")}
    twin.load_state_dict(state)
    return freeze(twin.to(model.device))


def freeze(model):
    """Pack a model in place; evaluation mode, no gradients."""
    return pack(model).eval().requires_grad_(False)


def save_teacher(teacher, output_dir):
    """Write the teacher to `output_dir/_teacher`, all or nothing.

    Returns:
        A number that tells this teacher from any other, for `load_teacher`.
    """
    target = Path(output_dir) / FOLDER
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{FOLDER}-*"):  # by a run that was killed right here
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-", dir=target.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        teacher.save_pretrained(new)
        number = _fingerprint(new)
        if target.exists():
            if _fingerprint(target) == number:
                return number
            os.replace(target, old)
        os.replace(new, target)
        return number
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_teacher(output_dir, number, device):
    """The teacher that `save_teacher` wrote.

    Raises:
        TrainingError: it is not there, or is another run's.
    """
    folder = Path(output_dir) / FOLDER
    if not list(folder.glob("*.safetensors")):
        raise TrainingError(
            f"The run to resume has left its dense phase and needs its teacher, but there is none in {folder}. Put the folder back "
            "that this run wrote there, or name a teacher: ToP(teacher='path/to/it')."
        )
    if number and _fingerprint(folder) != number:
        raise TrainingError(
            f"{folder} holds the teacher of another run than the checkpoint to resume. Use one output_dir per run, or name the "
            "right teacher: ToP(teacher='path/to/it')."
        )
    teacher = from_pretrained(folder).to(device)
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        tensor.data = tensor.data.clone()  # in a mapped file they are not aligned as torch's own, and the last bit may differ
    return freeze(teacher)


def find_teacher(teacher, student):
    """A teacher given by the user, as a model or by folder or Hub id, ready to teach.

    Raises:
        TrainingError: it is the student itself, or judges other classes.
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
    return dense_copy(model).to(student.device)


def _fingerprint(folder):
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")
