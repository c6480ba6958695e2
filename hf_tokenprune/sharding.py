"""Where parameters are not whole in every process: FSDP2, and DeepSpeed's ZeRO.

FSDP2 keeps a shard of each parameter, gates included, between the steps; `processes.whole` puts one together. ZeRO up to stage 2
leaves the parameters as they are, but its engine takes gradients and the optimizer's step out of everybody's hands.
"""

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from .errors import TrainingError


def check_sharding(args, method, adapters):
    """Raise `TrainingError` if a run is set up in a way in which its method cannot work.

    Args:
        args: the Trainer's arguments.
        method: the method's config.
        adapters: has the model any?
    """
    state = AcceleratorState._shared_state  # without making one
    for name, plugin, check in (("fsdp", "fsdp_plugin", _check_fsdp), ("deepspeed", "deepspeed_plugins", _check_engine)):
        if not (getattr(args, name, None) or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")) or not state.get(plugin):
            continue  # where accelerate cannot shard, as on a CPU, it has no plugin
        check(AcceleratorState(), method)
        if method.cuts_weights:
            raise TrainingError(
                f"{type(method).__name__} cuts weights in mid-run, which {name} does not let us do. With it, use a method that drops "
                "tokens only (ToP, InforCoef(static_macs=None)); to cut weights, torchrun alone (DDP)."
            )
        if adapters:
            raise TrainingError(
                f"Under {name} the adapters of this model cannot be merged for its teacher. Use torchrun alone (DDP)."
            )


def _check_fsdp(state, _method):
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise TrainingError("TokenPruneCallback works with FSDP2 only: fsdp_config={'version': 2}.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise TrainingError(
            f"fsdp_config['state_dict_type'] is {plugin.state_dict_type}: no checkpoint would be a model that can be opened. Say "
            "'FULL_STATE_DICT'."
        )
    if plugin.cpu_ram_efficient_loading:
        raise TrainingError(
            "fsdp_config['cpu_ram_efficient_loading'] is on: accelerate then fails at models with buffers in their checkpoints, and "
            "what decides about tokens is one. Leave it out."
        )


def _check_engine(state, method):
    if state.deepspeed_plugin.zero_stage > 2:
        raise TrainingError(
            f"ZeRO stage {state.deepspeed_plugin.zero_stage}: with DeepSpeed, TokenPruneCallback works up to stage 2, which leaves "
            "the parameters whole. To shard them, use FSDP2 (fsdp=True)."
        )
    if state.mixed_precision == "fp16":
        raise TrainingError(
            "fp16 under DeepSpeed: its engine scales the loss where no auxiliary loss can follow. Use bf16=True, or FSDP2 or DDP."
        )
    if method.schedule.dense:
        raise TrainingError(
            f"{method.schedule} under DeepSpeed: after a dense phase Adam's moments of the gates, all zero, must begin anew, and its "
            "engine has them. Fine-tune first; then prune that model with Schedule(dense=0)."
        )


def has_engine(optimizer):
    """Is it DeepSpeed that steps, not the Trainer?"""
    return type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"


def guard(parameters):
    """Let nothing of a gradient that is not finite reach these parameters, where nobody sees it before the step.

    Returns:
        Handles, whose `remove()` ends that.
    """
    return [p.register_hook(lambda g: torch.where(g.isfinite().all(), g, 0.0)) for p in parameters if p.requires_grad]


def reshard(model):
    """Under FSDP2 a forward without backward leaves some parameters whole, which are not those that the optimizer knows."""
    if hasattr(model, "reshard"):
        model.reshard()
