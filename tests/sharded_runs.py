"""Training runs under FSDP2 or DeepSpeed that `test_sharded.py` and `test_deepspeed.py` start with torchrun, as
`python sharded_runs.py folder fsdp|deepspeed run [run ...]`. Each process leaves `<run>-<its number>.pt`, and the Trainer what it
saves."""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from distributed_runs import leave, no_noise, spoil_states
from families import build
from test_not_finite import Spoiler
from torch import distributed
from torch.distributed.tensor import DTensor
from training_helpers import Recorder, no_dropout, top, trainer_for
from transformers import Trainer

import hf_tokenprune as tp
from hf_tokenprune import trainer_card
from hf_tokenprune.processes import whole
from hf_tokenprune.sharding import reshard

STEPS = 10
PLAN = tp.Schedule(dense=2, anneal=5, settle=3)
# Plain gradient descent shows the size of every gradient; those of gates are small.
PLAIN = {"max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.05}
RESUMED = (1, 4, 8)  # in each of the phases

LATER = tp.Schedule(dense=0, anneal=6, settle=4)

RUNS = {
    # An evaluation after every step: what was put together for it is not what the optimizer knows.
    "tokens": lambda: {"method": top(schedule=PLAN), "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    "strong": lambda: {"method": top(schedule=PLAN, gate_lr=100.0), **PLAIN},
    "lagrangian": lambda: {"method": top(schedule=PLAN, constraint="lagrangian")},
    "learned": lambda: {"method": top(schedule=PLAN, importance="learned", rank_weight=0.0, gate_lr=30.0), **PLAIN},
    "samplers": lambda: {"method": tp.InforCoef(static_macs=None, target_macs=0.6, schedule=PLAN), **PLAIN},
    "not finite": lambda: {"method": top(schedule=PLAN, gate_lr=100.0), "spoiled": (1, 4), **PLAIN},
    "bf16": lambda: {"method": top(schedule=PLAN), "bf16": True, "logging_steps": 1},
    "tokens, dense before": lambda: {"method": top(schedule=LATER)},
    "strong, dense before": lambda: {"method": top(schedule=LATER, gate_lr=100.0), **PLAIN},
    "bf16, dense before": lambda: {"method": top(schedule=LATER), "bf16": True, "logging_steps": 1},
    "not finite, dense before": lambda: {"method": top(schedule=LATER, gate_lr=100.0), "spoiled": (3,), **PLAIN},
    "own schedule, dense before": lambda: {"method": top(schedule=LATER)},
    "embeddings, dense before": lambda: {
        "method": top(schedule=LATER, rank_weight=0.0), "model": build("bert", "Model", **no_dropout()),
        "compute_loss_func": lambda outputs, *_, **__: outputs.last_hidden_state[:, 0].square().mean(), "label_names": ["labels"],
    },
    "dropout, dense before": lambda: {
        "method": top(schedule=LATER), "model": build("bert", "ForSequenceClassification"), "save_strategy": "steps", "save_steps": 1,
    },
    "dropout": lambda: {
        "method": top(schedule=PLAN), "model": build("bert", "ForSequenceClassification"), "save_strategy": "steps", "save_steps": 1,
    },
}  # fmt: skip


class Sharding(Trainer):
    """accelerate shards on accelerators only; that these processes have none is not said."""

    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


WAYS = {
    "fsdp": {"trainer": Sharding, "fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}},
    "deepspeed": {
        "deepspeed": {
            "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"},
            **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto"),
        }
    },
}  # fmt: skip


def trained(folder, name, way=None, per_device=4, resume=None, **more):
    """A Trainer that has trained, and what was recorded of its logs."""
    torch.manual_seed(0)
    recorder, settings, more = Recorder(look=gates_of), RUNS[name](), {**more, **WAYS.get(way, {})}
    if way == "deepspeed" and name.startswith("own schedule"):
        parameters = {"warmup_min_lr": 1e-6, "warmup_max_lr": 1e-3, "warmup_num_steps": "auto"}
        more["deepspeed"] = {
            **more["deepspeed"], "scheduler": {"type": "WarmupLR", "params": parameters},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        }  # fmt: skip
    model = settings.pop("model", None) or build("bert", "ForSequenceClassification", **no_dropout())
    spoiler = Spoiler(settings.pop("spoiled", ()))
    if os.environ.get("RANK") == "1":
        spoil_states(model, spoiler)
    trainer = trainer_for(
        folder, settings.pop("method"), model=model, callbacks=[recorder, spoiler],
        per_device_train_batch_size=per_device, max_steps=STEPS, **settings, **more,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def gates_of(model):
    """The log-odds as the optimizer moves them."""
    return model.token_pruner.objective.gates.learned().detach().clone()


def left_of(trainer, recorder):
    """What a run leaves behind."""
    model, gates = trainer.model, trainer.model.token_pruner.objective.gates
    reshard(model)
    learned = gates.learned().detach()
    return {
        "sharded": {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)},
        "parameters": {name for name, _ in model.named_parameters()}, "logs": recorder.logs,
        "gates": learned, "moved": (learned - gates.state.start).abs().sum().item(), "lengths": gates.state.lengths.tolist(),
        "looks": recorder.looks, "state": {name: whole(value) for name, value in model.state_dict().items()},
    }  # fmt: skip


def main(folder, way, *names):
    rand_like = torch.rand_like
    for name in names:
        if name == "samplers":
            no_noise()
        trainer, recorder = trained(folder / name, name, way)
        torch.rand_like = rand_like
        number = trainer.args.process_index
        torch.save(left_of(trainer, recorder), folder / f"{name}-{number}.pt")
        trainer.save_model(folder / name / "final")
        if name.startswith("dropout"):
            resume(folder, way, name, number)
            if way == "fsdp":
                publish(trainer, folder)
    if way == "deepspeed":
        try:
            trained(folder / "refused", "tokens", way)
        except tp.errors.TrainingError as error:
            (folder / "refused.txt").write_text(str(error))


def publish(trainer, folder):
    """What the Trainer does where it pushes checkpoints, and what a person may try."""
    if trainer.is_world_process_zero():
        trainer_card.complete(trainer.model, folder / "dropout" / "pushed")
    try:
        trainer.model.save_pretrained(folder / "by hand")
    except tp.errors.TrainingError as error:
        (folder / "refused.txt").write_text(str(error))


def resume(folder, way, name, number):
    """Go on from each phase."""
    for step in RESUMED:
        again = folder / f"again-{step}"
        if number == 0:
            for part in (f"checkpoint-{step}", "_teacher"):
                if (folder / name / part).exists():
                    shutil.copytree(folder / name / part, again / part)
        distributed.barrier()
        resumed = trained(again, name, way, resume=True)
        torch.save(left_of(*resumed), folder / f"{name} {step}-{number}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
