"""Tiny real training runs: a data set in which a few tokens decide the label, a model from the table, the Trainer."""

import torch
from families import FAMILIES, PAD, VOCAB, build
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import hf_tokenprune as tp

SIGNAL = (5, 6, 7)  # the label is the one of these tokens that the text holds


class Texts(Dataset):
    """Texts of 8 to 24 random tokens; one of three signal tokens, at a random place, is the label."""

    def __init__(self, count=96, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(8, 25, (1,), generator=generator))
            label = int(torch.randint(0, 3, (1,), generator=generator))
            ids = torch.randint(20, VOCAB, (length,), generator=generator)
            ids[0] = 3
            ids[int(torch.randint(1, length, (1,), generator=generator))] = SIGNAL[label]
            self.rows.append((ids, label))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        ids, label = self.rows[item]
        return {"input_ids": ids, "labels": label}


def collate(rows):
    """Pad on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def no_dropout(name="bert"):
    """Config overrides that switch dropout off."""
    return {key: 0.0 for key in FAMILIES[name].config.to_dict() if "dropout" in key and "token_dropout" not in key}


def trainer_for(folder, method=None, *, model=None, callbacks=(), trainer=Trainer, data=None, **arguments):
    """A Trainer over `Texts` with a tiny BERT, and the callback if there is a method."""
    model = model or build("bert", "ForSequenceClassification", **no_dropout())
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    extra = {key: settings.pop(key) for key in ("compute_loss_func", "compute_metrics") if key in settings}
    callbacks = [*callbacks, *([tp.TokenPruneCallback(method)] if method else [])]
    return trainer(
        model, TrainingArguments(str(folder), **settings), train_dataset=data or Texts(), eval_dataset=Texts(32, seed=1),
        data_collator=collate, callbacks=callbacks, **extra,
    )  # fmt: skip


def top(**settings):
    """A ToP that fits into a dozen steps."""
    schedule = settings.pop("schedule", tp.Schedule(dense=1, anneal=1, settle=1))
    return tp.ToP(**{"target_macs": 0.5, "rank_bins": 8, "rank_topk": 4, "rank_weight": 0.1, "schedule": schedule, **settings})
