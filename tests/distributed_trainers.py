"""What `test_distributed.py` runs under torchrun: the Trainers of sentence-transformers."""

import sys
from pathlib import Path

import torch
from distributed_runs import leave
from test_trainers import inside, logged, trainer_for

# CrossEncoderTrainer of sentence-transformers 6.2 fails under DDP on a CPU by itself: "mark a variable ready only once".
ROWS = ("embedder", "embedder, cached", "sparse")


def main(out, *models):
    heads = dict(model.split("=", 1) for model in models)
    for row in ROWS:
        torch.manual_seed(0)
        trainer = trainer_for(row, heads, out / row, per_device_train_batch_size=3)
        trainer.train()
        assert trainer.args.world_size == 2
        pruner = inside(trainer.model).token_pruner
        left = {
            "state": trainer.model.state_dict(), "spent": logged(trainer, "macs_realised"),
            "kept": [site.kept.tolist() for site in pruner.sites.values()], "phase": logged(trainer, "pruning_phase"),
        }  # fmt: skip
        torch.save(left, out / f"{row}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
