"""Where parameters are not whole in every process, or not the Trainer's to step: FSDP2, and DeepSpeed's ZeRO.

FSDP2 keeps a shard of each parameter, gates included, between the steps; `processes.whole` puts one together. ZeRO up to stage 2
leaves the parameters as they are, but its engine takes gradients and the optimizer's step out of everybody's hands. It passes over
a step that is not finite by itself.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.utils import logging

from .errors import TrainingError
from .modeling.architectures import is_sharded, transformers_model

logger = logging.get_logger(__name__)


def check_sharding(args, method, model, adapters):
    """Raise `TrainingError` if a run is set up in a way in which its method cannot work.

    Args:
        args: the Trainer's arguments.
        method: the method's config.
        model: the model to be trained.
        adapters: has it any?
    """
    state = AcceleratorState._shared_state  # without making one
    for name, plugin, check in (("fsdp", "fsdp_plugin", _check_fsdp), ("deepspeed", "deepspeed_plugins", _check_engine)):
        if not (getattr(args, name, None) or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")):
            continue
        if not state.get(plugin):
            logger.warning(
                f"{name} was asked for, but without an accelerator accelerate shards nothing: this is plain DDP, or one process."
            )
            continue
        check(AcceleratorState(), args, method)
        if method.cuts_weights:
            raise TrainingError(
                f"{type(method).__name__} cuts weights in mid-run, which {name} does not let us do. With it, use a method that drops "
                "tokens only (ToP, InforCoef(static_macs=None)); to cut weights, torchrun alone (DDP)."
            )
        if adapters:
            raise TrainingError(
                f"Under {name} this model's adapters cannot be merged for its teacher. Use torchrun alone (DDP)."
            )
        if name == "fsdp" and transformers_model(model) is not model:
            raise TrainingError(
                f"A {type(model).__name__} under FSDP2: sentence-transformers cannot save its shards. Use torchrun alone (DDP)."
            )


def _check_fsdp(state, args, _method):
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise TrainingError("TokenPruneCallback works with FSDP2 only: version (in accelerate's file: fsdp_version) 2.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise TrainingError(
            f"FSDP's state_dict_type (in accelerate's file: fsdp_state_dict_type) is {plugin.state_dict_type}: no checkpoint would "
            "be a model that can be opened. Say FULL_STATE_DICT."
        )
    refused = {
        "cpu_ram_efficient_loading": "accelerate then fails at models with buffers in their checkpoints, and what decides about "
        "tokens is one",
        "activation_checkpointing": "it runs layers again without our knowing. Use gradient_checkpointing=True instead",
    }
    for name, why in refused.items():
        if getattr(plugin, name, None):
            raise TrainingError(f"FSDP's {name} (in accelerate's file: fsdp_{name}) is on: {why}. Leave it out.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise TrainingError("FSDP's offload_params is on, and the gates would not be where the model is. Leave it out.")
    if args.torch_compile:
        raise TrainingError(
            "torch_compile=True under FSDP2: what the Trainer trains is then another model. Leave one of them out."
        )


def _check_engine(state, _args, method):
    stage = state.deepspeed_plugin.zero_stage
    if stage not in (1, 2):
        raise TrainingError(
            f"ZeRO stage {stage}: with DeepSpeed, TokenPruneCallback works at stages 1 and 2, which leave the parameters whole and "
            "pass over a step that is not finite. To shard parameters use FSDP2 (fsdp=True), for none torchrun alone (DDP)."
        )
    if state.mixed_precision == "fp16":
        raise TrainingError(
            "fp16 under DeepSpeed: its engine scales the loss where no auxiliary loss can follow. Use bf16=True, or FSDP2 or DDP."
        )
    if method.schedule.dense or method.schedule.static:
        raise TrainingError(
            f"{method.schedule} under DeepSpeed: after a dense phase Adam's moments of the gates, all zero, must begin anew, and its "
            "engine has them. Fine-tune first; then prune that model with Schedule(dense=0)."
        )


def has_engine(optimizer):
    """Is it DeepSpeed that steps, not the Trainer?"""
    return type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"


def reshard(model):
    """Under FSDP2 a forward without backward leaves some parameters whole, which are not those that the optimizer knows."""
    if is_sharded(model):
        model.reshard()
