"""Dense fine-tuning: the model that every method starts from and is taught by.

For seed 0 every learning rate of the task is tried, and the one whose model is best on the held-out split at the end of any epoch
is kept: its file is `results/benchmark/dense-<task>.json`. Other seeds take the same learning rate. Of each run the weights of the
epoch that is best on the held-out split are kept.
"""

import json
import shutil
import time
from pathlib import Path

import torch
from files import new_folder, versions, write_json
from tasks import minilm, predict
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_tokenprune as tp


def arguments(folder, *, learning_rate, epochs, batch_size, seed):
    """What all trainings of the benchmark share."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        use_cpu=not cuda,
        bf16=cuda or torch.cpu._is_avx512_bf16_supported(),
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )


class KeepBest(TrainerCallback):
    """Scores the model on the held-out split after every epoch, and keeps the best."""

    def __init__(self, task, held_out, tokenizer):
        self.task, self.held_out, self.tokenizer = task, held_out, tokenizer
        self.scores, self.best, self.seconds = [], None, 0.0

    def on_epoch_end(self, _args, _state, _control, model=None, **_):
        started = time.perf_counter()
        outputs = predict(model, self.held_out, self.tokenizer, name="held-out")
        model.train()
        self.scores.append(self.task.score(self.held_out, outputs))
        print({"epoch": len(self.scores), **self.scores[-1]}, flush=True)
        if self.best is None or self.value(-1) > self.value(self.best):
            self.best = len(self.scores) - 1
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.seconds += time.perf_counter() - started

    def value(self, epoch):
        return self.scores[epoch][self.task.metric]


def train(task, splits, tokenizer, folder, *, source, learning_rate, epochs, seed):
    """Fine-tune and save to `folder`, with `trial.json` beside the weights. A folder that is there is only read.

    Returns:
        What is in `trial.json`: settings, the held-out scores of every epoch, which is the best, and how long it took.
    """
    folder = Path(folder)
    asked = {
        "learning_rate": learning_rate, "epochs": epochs, "batch_size": task.batch_size, "seed": seed,
        "train_rows": len(splits["train"]), "held_out_rows": len(splits["held_out"]),
    }  # fmt: skip
    if folder.exists():
        trial = json.loads((folder / "trial.json").read_text())
        differ = [f"{name} is {trial[name]}, not {value}" for name, value in asked.items() if trial[name] != value]
        if differ:
            raise SystemExit(
                f"The dense model in {folder} was trained in another way: {', '.join(differ)}. Remove the folder, or use another "
                "--output."
            )
        return trial
    set_seed(seed)
    model = tp.pack(task.model(source))  # the same model, without any work on padding
    keeper = KeepBest(task, task.encode(tokenizer, splits["held_out"]), tokenizer)
    with new_folder(folder) as temporary:
        trainer = Trainer(
            model,
            arguments(temporary, learning_rate=learning_rate, epochs=epochs, batch_size=task.batch_size, seed=seed),
            train_dataset=task.encode(tokenizer, splits["train"]).features,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[keeper],
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started - keeper.seconds
        model.load_state_dict(keeper.weights)
        tp.detach(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        trial = {
            **asked,
            "held_out": keeper.scores,
            "best_epoch": keeper.best + 1,
            "score": keeper.value(keeper.best),
            "seconds": seconds,
        }
        write_json(temporary / "trial.json", trial)
    return trial


def ensure(task, splits, args, command, *, seed):
    """The folder with the dense model of a task and seed; tunes and trains what is not there yet."""
    tokenizer = AutoTokenizer.from_pretrained(args.model or minilm())
    tuning = tuning_file(task, args)

    def run(seed, learning_rate, folder):
        return train(
            task, splits, tokenizer, folder, source=args.model, learning_rate=learning_rate, epochs=task.epochs, seed=seed
        )

    def trial_folder(learning_rate):
        return args.output / "trials" / f"{task.name}-{learning_rate:g}"

    if not tuning.exists():
        trials = [run(0, rate, trial_folder(rate)) for rate in task.learning_rates]
        chosen = max(trials, key=lambda trial: trial["score"])
        report = {
            "task": task.name,
            "metric": task.metric,
            "held_out": task.held_out or "a tenth of train",
            "chosen": {name: chosen[name] for name in ("learning_rate", "best_epoch", "score")},
            "trials": trials,
            "command": command,
            "versions": versions(),
        }
        write_json(tuning, report)
    learning_rate = chosen_rate(task, args)
    folder = args.output / "dense" / f"{task.name}-{seed}"
    if seed or folder.exists():
        run(seed, learning_rate, folder)
    else:
        run(0, learning_rate, trial_folder(learning_rate))
        with new_folder(folder) as temporary:
            shutil.copytree(trial_folder(learning_rate), temporary, dirs_exist_ok=True)
    return folder


def tuning_file(task, args):
    """Where a task's tuning is recorded."""
    return args.results / f"dense-{task.name}.json"


def chosen_rate(task, args):
    """The learning rate that was best."""
    return json.loads(tuning_file(task, args).read_text())["chosen"]["learning_rate"]
