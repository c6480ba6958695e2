"""Training runs that `test_distributed.py` starts with torchrun, as `python distributed_runs.py folder run [run ...]`, and compares
with the same runs in one process. Each process leaves `<run>-<its number>.pt`."""

import os
import shutil
import sys
from pathlib import Path

import torch
from families import build
from test_not_finite import Spoiler
from torch import distributed
from training_helpers import Recorder, Texts, no_dropout, top, trainer_for
from transformers import TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.modeling.sizes import sizes_of

STEPS, SURGERY = 10, 7
PLAN = tp.Schedule(dense=2, anneal=5, settle=3)
STAGES = tp.Schedule(dense=2, static=5, anneal=2, settle=1)
NARROW = ("hidden", "heads", "units")
# Plain gradient descent shows the size of every gradient; those of gates are small.
STRONG = {"gate_lr": 100.0}
PLAIN = {"max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.05}


def both(**settings):
    return tp.Compose(
        tp.StructuredPruning(parts=NARROW), tp.ToP(rank_bins=8, rank_topk=4, rank_weight=0.1),
        target_macs=0.3, schedule=PLAN, **settings,
    )  # fmt: skip


RUNS = {
    "tokens": lambda: {"method": top(schedule=PLAN), "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5},
    "tokens, one length": lambda: {"method": top(schedule=PLAN, **STRONG), "data": Texts(96, lengths=(17, 17)), **PLAIN},
    "learned importance": lambda: {"method": top(schedule=PLAN, importance="learned", rank_weight=0.0)},
    "lagrangian": lambda: {"method": top(schedule=PLAN, constraint="lagrangian")},
    "weights and tokens": lambda: {"method": both(**STRONG), **PLAIN},
    "samplers": lambda: {"method": tp.InforCoef(static_macs=0.5, target_macs=0.3, schedule=STAGES, parts=NARROW, **STRONG), **PLAIN},
    "not finite": lambda: {
        "method": tp.InforCoef(static_macs=0.5, target_macs=0.3, schedule=STAGES, parts=NARROW), "spoiled": (3, 5, 8, 10),
        "logging_steps": 1, **PLAIN,
    },
    "dropout": lambda: {
        "method": both(), "model": build("bert", "ForSequenceClassification"), "data": Texts(48), "save_strategy": "steps",
        "save_steps": 1,
    },
}  # fmt: skip


class Noise(TrainerCallback):
    """What the gates of each step were drawn from."""

    def __init__(self):
        self.drawn = []

    def on_pre_optimizer_step(self, *_, model=None, **__):
        noise = model.token_pruner.objective.gates.noise
        self.drawn += [] if noise is None else [noise]


def trained(folder, name, per_device=4, resume=None, **more):
    """A Trainer that has trained, and what was recorded of its logs."""
    torch.manual_seed(0)
    recorder, noise, settings = Recorder(), Noise(), RUNS[name]()
    model = settings.pop("model", None) or build("bert", "ForSequenceClassification", **no_dropout())
    spoiler = Spoiler(settings.pop("spoiled", ()))
    if os.environ.get("RANK") == "1":
        spoil_states(model, spoiler)
    trainer = trainer_for(
        folder, settings.pop("method"), model=model, callbacks=[recorder, noise, spoiler], per_device_train_batch_size=per_device,
        max_steps=STEPS, ddp_find_unused_parameters=False, **settings, **more,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    recorder.noise = noise.drawn
    return trainer, recorder


def spoil_states(model, spoiler):
    """Only this process's hidden states are NaN, in some steps."""
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output * float("nan") if spoiler.now and model.training else None
    )


def no_noise():
    """Samplers draw for each token; without noise it does not matter which process draws."""
    torch.rand_like = lambda like, **_: torch.full_like(like, 0.5)


def left_of(trainer, recorder):
    """What a run leaves behind."""
    gates = trainer.model.token_pruner.objective.gates
    return {
        "state": trainer.model.state_dict(), "logs": recorder.logs, "sizes": sizes_of(trainer.model),
        "gates": gates.learned().detach(), "moved": (gates.learned() - gates.state.start).abs().max().item(),
        "noise": recorder.noise, "lengths": gates.state.lengths.tolist(),
    }  # fmt: skip


def main(folder, *names):
    for name in names:
        rand_like = torch.rand_like
        if name == "samplers":
            no_noise()
        trainer, recorder = trained(folder / name, name)
        torch.rand_like = rand_like
        torch.save(left_of(trainer, recorder), folder / f"{name}-{trainer.args.process_index}.pt")
        if name == "dropout":
            for _ in range(10):  # as a script does that does not ask which process it is
                trainer.model.save_pretrained(folder / "by both")
            distributed.barrier()
            resume(folder, trainer.args.process_index)


def resume(folder, number):
    """Go on from just before and just after surgery."""
    for step in (SURGERY - 2, SURGERY + 1):
        again = folder / f"again-{step}"
        if number == 0:
            for part in ("_teacher", f"checkpoint-{step}"):
                shutil.copytree(folder / "dropout" / part, again / part)
            (again / f"checkpoint-{step + 1}").mkdir()  # half of one
        distributed.barrier()
        resumed = trained(again, "dropout", resume=True)
        torch.save(left_of(*resumed), folder / f"dropout {step}-{number}.pt")


def leave():
    """End this process when all are done, and do not take the interpreter apart: a thread of gloo may have a tensor, which aborts."""
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
