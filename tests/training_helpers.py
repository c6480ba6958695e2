"""Tiny real training runs: a data set in which a few tokens decide the label, a model from the table, the Trainer."""

import shutil

import torch
from families import FAMILIES, PAD, VOCAB, build, make_inputs
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_tokenprune as tp
from hf_tokenprune.methods.base import Objective
from hf_tokenprune.schedule import Schedule

SIGNAL = (5, 6, 7)  # the label is the one of these tokens that the text holds


class Texts(Dataset):
    """Texts of 8 to 24 random tokens; one of three signal tokens, at a random place, is the label."""

    def __init__(self, count=96, seed=0, lengths=(8, 24)):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=generator))
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


class Rows(Dataset):
    """48 labelled samples for any head of the table; the labels are a function of the input."""

    def __init__(self, name, head, make_labels):
        self.rows = []
        for seed in range(8):
            inputs = make_inputs(name, head, lengths=(17, 5, 30, 17, 9, 12), seed=seed)
            inputs = {**inputs, **make_labels(inputs)}
            self.rows += [{key: value[row] for key, value in inputs.items()} for row in range(6)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        return self.rows[item]


def stack(rows):
    """Samples of one length to a batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def no_dropout(name="bert"):
    """Config overrides that switch dropout off."""
    return {key: 0.0 for key in FAMILIES[name].config.to_dict() if "dropout" in key and "token_dropout" not in key}


def trainer_for(folder, method=None, *, model=None, callbacks=(), trainer=Trainer, data=None, **arguments):
    """A Trainer over `Texts` with a tiny BERT, and the callback if there is a method."""
    if model is None and "model_init" not in arguments:
        model = build("bert", "ForSequenceClassification", **no_dropout())
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
    own = ("compute_loss_func", "compute_metrics", "optimizers", "model_init")
    extra = {"data_collator": collate, **{key: settings.pop(key) for key in (*own, "data_collator") if key in settings}}
    callbacks = [*callbacks, *([tp.TokenPruneCallback(method)] if method else [])]
    made = trainer(
        model, TrainingArguments(str(folder), **settings), train_dataset=data or Texts(), eval_dataset=Texts(32, seed=1),
        callbacks=callbacks, **extra,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def top(**settings):
    """A ToP that fits into a dozen steps."""
    schedule = settings.pop("schedule", tp.Schedule(dense=1, anneal=1, settle=1))
    return tp.ToP(**{"target_macs": 0.5, "rank_bins": 8, "rank_topk": 4, "rank_weight": 0.1, "schedule": schedule, **settings})


class Recorder(TrainerCallback):
    """What another callback gets to see: every log, and whatever `look` says of the model after each step."""

    def __init__(self, look=None):
        self.logs, self.looks, self.look = [], [], look

    def on_log(self, *_, logs=None, **__):
        self.logs.append(dict(logs))

    def on_step_end(self, *_, model=None, **__):
        if self.look:
            self.looks.append(self.look(model))


def kept_bins(model):
    """Which bins each site keeps, as lists of 0 and 1."""
    return [site.kept.tolist() for site in model.token_pruner.sites.values()]


def spent_share(model, data):
    """MACs of the model over a data set, as a share of the dense model's on the real tokens."""
    meter = tp.cost.CostMeter(model, max_length=100)
    model.eval()
    with torch.no_grad():
        model(**collate(list(data)))
    meter.update()
    return 1 / meter.cost.true_length_reduction


def at_home(model):
    """The same model with its weights in memory of their own.

    Tensors in a mapped safetensors file are not aligned as torch aligns its own, and some of its kernels then round the last bit
    differently (a dense model does the same). After this, equal weights give equal bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def trained(folder, method=None, resume=None, **arguments):
    """A Trainer that has trained."""
    trainer = trainer_for(folder, top() if method is None else method, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def put_checkpoint(folder, target, step, dense=4):
    """What is left of a run that was killed after a step."""
    shutil.copytree(folder / f"checkpoint-{step}", target / f"checkpoint-{step}")
    if (folder / "_teacher").exists() and step > dense:
        shutil.copytree(folder / "_teacher", target / "_teacher")
    return str(target / f"checkpoint-{step}")


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{key}: {(found[key].double() - value.double()).abs().max()}"


def assert_close_state(found, expected, atol):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class GatesOf(TrainerCallback):
    """How far the log-odds of all gates are from where they start, before the first step and after each."""

    def __init__(self):
        self.values = []

    def on_train_begin(self, *_, model=None, **__):
        self.values = [self.read(model)]

    def on_step_end(self, *_, model=None, **__):
        self.values.append(self.read(model))

    @staticmethod
    def read(model):
        gates = model.token_pruner.objective.gates
        return (gates.learned() - gates.state.start).detach().flatten()


def real_tokens(inputs, chosen):
    """A label for each real token that is chosen, -100 for the others."""
    ids = inputs["input_ids"]
    return {"labels": torch.where(inputs["attention_mask"].bool() & chosen(ids), ids, -100)}


def some_words(inputs):
    return real_tokens(inputs, lambda ids: ids % 4 == 1)


def some_labels(inputs):
    """As many labels as a text is long."""
    return {"labels": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)}


class Pull(Objective):
    """The smallest method there is: an auxiliary loss of 3 w, whatever the batch."""

    def losses(self, *_):
        return {"pull": 3 * self.pruner.training_state.w.sum()}

    def start_run(self, *_):
        pass


class PullMethod:
    teacher, schedule = None, Schedule(dense=0, anneal=1, settle=1)

    def attach(self, model):
        tp.attach(model, {1: tp.RankBins(4)})
        state = model.token_pruner.training_state = nn.Module()
        state.register_buffer("total", torch.tensor(0))
        state.w = nn.Parameter(torch.zeros(()))
        model.token_pruner.objective = Pull(model, 0.0)
        return model.token_pruner.objective
