"""What the processes that train one model together (`torchrun`) have to agree on.

Each sees its own part of a step's samples. Whatever a method measures on them is summed or averaged over all processes here, so
that N processes learn what one would with N times the batch. A process that is alone gets back what it gave.
"""

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def count():
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def total_of(numbers, device):
    """The sums of a list of numbers over all processes.

    Args:
        numbers: floats or whole numbers below 2 ** 53, equally many in every process.
        device: where the model is.
    """
    if count() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def of_all(thing):
    """What each process has, in order of their numbers: plain values, which need not be alike."""
    if count() == 1:
        return [thing]
    found = [None] * count()
    distributed.all_gather_object(found, thing)
    return found


def mean_of(tensor):
    """The mean of a tensor over all processes."""
    if count() == 1:
        return tensor
    mean = tensor / count()
    distributed.all_reduce(mean)
    return mean


def agreed(tensor):
    """The first process's tensor, for all of them."""
    if count() > 1:
        tensor = tensor.contiguous()
        distributed.broadcast(tensor, src=0)
    return tensor


def whole(tensor):
    """A tensor of which each process holds a shard (FSDP2), put together by all of them; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapper_now():
    """The `DistributedDataParallel` inside of whose forward the caller runs, or None."""
    return DistributedDataParallel._get_active_ddp_module() if count() > 1 else None


def renew(wrapper):
    """Make a `DistributedDataParallel` anew, in place, around a module some of whose parameters have been cut or are gone.

    The Trainer's loop goes on with the same object; what is new is how it reduces gradients.
    """
    settings = {
        "device_ids": wrapper.device_ids,
        "output_device": wrapper.output_device,
        "process_group": wrapper.process_group,
        "bucket_cap_mb": None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20,
        "find_unused_parameters": wrapper.find_unused_parameters,
        "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
        "static_graph": wrapper.static_graph,
    }
    if not wrapper.broadcast_buffers:  # newer versions of torch warn about saying so
        settings["broadcast_buffers"] = False
    del wrapper.logger, wrapper.reducer  # takes the old hooks from the parameters
    wrapper.__init__(wrapper.module, **settings)
