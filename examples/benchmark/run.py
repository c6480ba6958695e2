"""Runs the benchmark: task x method x budget x seed, one JSON file each in results/benchmark.

    python examples/benchmark/run.py --tasks mrpc stsb --methods dense topk top --budgets 0.6 0.4

What is there already is skipped, and whatever stops a run leaves nothing half done: start the same command again. Dense models are
tuned, trained once per task and seed into runs/benchmark/dense and shared by all methods.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import dense
import torch
from files import UNPRUNED, fingerprint, new_folder, versions, write_json
from methods import METHODS, prune
from tasks import TASKS, predict
from tqdm import tqdm
from transformers import AutoTokenizer

import hf_tokenprune as tp
from hf_tokenprune.bench import bench
from hf_tokenprune.cost import dense_layer_costs, layer_costs
from hf_tokenprune.subject import cpu_name

BATCHES = 1, 32  # texts; what is timed


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=["dense", *METHODS], default=["dense", *METHODS])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.45, 0.35], help="shares of the dense model's MACs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    data = parser.add_argument_group("data and models")
    data.add_argument("--data-dir", type=Path, help="folder with <task>/<split>.parquet; default: the Hub")
    data.add_argument("--model", help="folder or Hub id of the encoder; default: all-MiniLM-L6-v2")
    data.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="models (default %(default)s)")
    data.add_argument("--results", type=Path, default=Path("results/benchmark"), help="JSON files (default %(default)s)")
    smaller = parser.add_argument_group("other than the task's own settings")
    smaller.add_argument("--train-limit", type=int, help="rows to train on, 0 = all")
    smaller.add_argument("--eval-limit", type=int, help="rows to report on, 0 = all")
    smaller.add_argument("--epochs", type=float, help="of a method's training")
    smaller.add_argument("--learning-rate", type=float, help="of a method's training; default: as the dense model's")
    smaller.add_argument("--batch-size", type=int, help="of a method's training")
    smaller.add_argument("--bench-texts", type=int, help="texts to time, 32 or more; 0 = do not time")
    smaller.add_argument("--bench-repeats", type=int, default=3)
    smaller.add_argument(
        "--held-out",
        action="store_true",
        help="to choose settings: report on the held-out split, without timing, into <output>/held-out",
    )
    args = parser.parse_args(arguments)
    if args.bench_texts is not None and 0 < args.bench_texts < max(BATCHES):
        parser.error(f"--bench-texts {args.bench_texts}: batches of {max(BATCHES)} are timed, so give that many or more, or 0.")
    return args


def main(arguments=None):
    args = parse(arguments)
    command = shlex.join(["python", "examples/benchmark/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    plan = [
        (name, seed, method, budget)
        for name in args.tasks
        for seed in args.seeds
        for method in args.methods
        for budget in ([1.0] if method in UNPRUNED else args.budgets)
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.model or dense.minilm())
    loaded = None, None
    for name, seed, method, budget in (bar := tqdm(plan, unit="run")):
        bar.set_description(f"{name} {method} {budget:g} seed {seed}")
        path = result_file(args, name, method, budget, seed)
        if path.exists():
            continue
        if loaded[0] != name:
            loaded = name, TASKS[name].load(args.data_dir, args.train_limit, args.eval_limit)
        try:
            result = run(TASKS[name], loaded[1], tokenizer, args, command, method, budget, seed)
        except tp.errors.ConfigError as error:
            print(f"\n{path.stem} is left out: {error}", flush=True)
            continue
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write_json(path, {**result, "command": command, "versions": versions(), "cpu": cpu_name(), "gpu": gpu})
        print(f"\n{path.stem}: {result['scores']}, {result['reduction']}", flush=True)


def result_file(args, name, method, budget, seed):
    """The JSON file of one run. Those on the held-out split are told apart by the settings that are being chosen."""
    stem = f"{name}-{method}-{budget:g}-{seed}"
    if not args.held_out:
        return args.results / f"{stem}.json"
    chosen = (args.learning_rate, args.epochs, args.batch_size, args.train_limit, args.eval_limit)
    tried = "".join(
        f"-{name}{value:g}" for name, value in zip(("", "", "b", "t", "e"), chosen, strict=True) if value is not None
    )
    return args.output / "held-out" / f"{stem}{tried}.json"


def run(task, splits, tokenizer, args, command, method, budget, seed):
    """One run, from the dense model to what is written about it."""
    teacher = dense.ensure(task, splits, args, command, seed=seed)
    with tempfile.TemporaryDirectory(prefix="work-", dir=args.output) as work:
        folder, settings, training = teacher, None, None
        if method != "dense":
            model, settings, training = prune(
                METHODS[method],
                task,
                splits,
                tokenizer,
                budget=budget,
                teacher=teacher,
                work=work,
                learning_rate=args.learning_rate or dense.chosen_rate(task, args),
                epochs=args.epochs or task.method_epochs,
                batch_size=args.batch_size or task.batch_size,
                seed=seed,
            )
            folder = Path(work) / "pruned"
            if not args.held_out:
                folder = args.output / "models" / result_file(args, task.name, method, budget, seed).stem
            with new_folder(folder) as new:
                model.save_pretrained(new)
                tokenizer.save_pretrained(new)
        # As a user would find it; and a model that was trained with mixed precision goes on to use it.
        model = tp.pack(tp.from_pretrained(folder)).to("cuda" if torch.cuda.is_available() else "cpu")
    part = "held_out" if args.held_out else "report"
    encoded = task.encode(tokenizer, splits[part])
    meter = tp.cost.CostMeter(model, max_length=task.max_length)
    scores = task.score(encoded, predict(model, encoded, tokenizer, meter=meter, name=part))
    cost, held_out = meter.cost, scores
    if part != "held_out":  # by which settings are chosen
        encoded = task.encode(tokenizer, splits["held_out"])
        held_out = task.score(encoded, predict(model, encoded, tokenizer, name="held-out"))
    return {
        "task": task.name,
        "method": method,
        "budget": budget,
        "seed": seed,
        "data": "Hub" if args.data_dir is None else "local files",
        "split": task.report if part == "report" else task.held_out or "a tenth of train",
        "rows": len(splits[part]),
        "limited": {"train": task.limited("train", args.train_limit), "report": task.limited("eval", args.eval_limit)},
        "train_rows": len(splits["train"]),
        "dense_model": fingerprint(teacher),  # that it is, or began from
        "metric": task.metric,
        "score": scores[task.metric],
        "held_out": held_out[task.metric],
        "scores": scores,
        "reduction": {
            "true_length": cost.true_length_reduction,
            "padded": cost.padded_reduction,
            "by_weights": by_weights(model, cost),
        },
        "max_length": task.max_length,
        "macs": {name: getattr(cost, name) / cost.sequences for name in ("dense", "padded", "spent")},
        "tokens": cost.tokens,
        "tokens_per_layer": cost.tokens_per_layer,
        "settings": settings,
        "training": training,
        "time": None if args.held_out else measure(task, splits, args, model, tokenizer),
    }


def by_weights(model, cost):
    """The reduction on true lengths that the weights cut out of a model give if every token is kept."""
    costs, dense = layer_costs(model), dense_layer_costs(model)
    # Texts differ in length: how many tokens a token sees on average, more than their mean, the dense model's MACs tell.
    linear, attention = (sum(values) for values in zip(*((s.before + s.after, s.attention) for s in dense), strict=True))
    tokens, macs = cost.tokens, cost.dense / cost.sequences
    seen = (macs / tokens - linear) / attention
    queries, left = [seen] * len(costs), [tokens] * len(costs)
    if cost.tokens_per_layer[-1] == 1:  # the one that the head reads is computed alone
        queries[-1] = left[-1] = 1
    spent = (
        layer.macs(entered=[tokens], queries=[asking], survived=[stay])
        for layer, asking, stay in zip(costs, queries, left, strict=True)
    )
    return macs / sum(spent)


def measure(task, splits, args, model, tokenizer):
    """Milliseconds per text on the CPU, from `bench`: of the dense model with padding and packed, and of the model itself."""
    count = task.bench_texts if args.bench_texts is None else args.bench_texts
    if not count:
        return None
    texts = task.texts(splits["report"][:count])
    # Always there: a GPU has done a model as small as this before the host has said what comes next.
    found = bench(
        model,
        texts,
        device="cpu",
        tokenizer=tokenizer,
        batch_sizes=BATCHES,
        max_length=task.max_length,
        repeats=args.bench_repeats,
    )
    ms = {}
    for result in found["results"]:
        padded, packed, pruned = (result["ms"][name] for name in ("hf_padded", "packed_dense", "pruned"))
        ms[str(result["batch_size"])] = {
            "dense": padded,
            "dense_packed": packed,
            "pruned": packed if pruned is None else pruned,
        }
    return {"ms": ms, "bench": found}


if __name__ == "__main__":
    main()
