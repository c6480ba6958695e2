"""What the callback costs several processes in the dense phase, where it changes nothing yet: steps per second without and with it.

    torchrun --nproc_per_node 2 examples/throughput.py --output results/ddp.json

The same script trains a BERT of random weights on random texts, now without and now with `TokenPruneCallback`, one after the other
in several rounds. Ragged texts show what packing gains besides; of texts of equal length there is no padding to save.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_tokenprune as tp
from hf_tokenprune.writing import write_file

SHAPES = {
    "2x128": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "6x384": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
LENGTHS = {"ragged": (16, 128), "equal": (72, 72)}
WARM = 3  # steps that are not timed


class Clock(TrainerCallback):
    """Seconds of each step, from its beginning to that of the next."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *_, **__):
        self.times.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="6x384")
    parser.add_argument("--batch-size", type=int, default=8, help="texts per process and step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/ddp.json"))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    seconds = {name: {"without": [], "with": []} for name in LENGTHS}
    for _ in range(args.rounds):
        for name, lengths in LENGTHS.items():
            for way in seconds[name]:
                seconds[name][way].append(run(lengths, way, args))
    if int(os.environ.get("RANK", 0)) == 0:
        report(seconds, args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def texts(count, lengths):
    """Rows of random ids."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(1, 1000, (size,), generator=generator), "labels": i % 3} for i, size in enumerate(sizes)
    ]


def collate(rows):
    """Pad on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["labels"] for row in rows])}


def run(lengths, way, args):
    """Seconds of the median step of one run."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES[args.shape], vocab_size=1000, num_labels=3))
    clock, steps = Clock(), WARM + args.steps + 1
    # Far more dense steps than this run has: it ends with the first step that is not dense, which nobody times.
    method = tp.ToP(target_macs=0.5, teacher=None, sites=(0,), schedule=tp.Schedule(dense=10_000, anneal=1, settle=1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=args.batch_size, max_steps=steps, logging_steps=10, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=torch.cuda.device_count() < int(os.environ.get("WORLD_SIZE", 1)), bf16=args.bf16,
            dataloader_pin_memory=False, ddp_find_unused_parameters=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=texts(64 * args.batch_size, lengths), data_collator=collate,
            callbacks=[clock, *([tp.TokenPruneCallback(method)] if way == "with" else [])],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return statistics.median(b - a for a, b in zip(clock.times[WARM:-1], clock.times[WARM + 1 :], strict=True))


def report(seconds, args):
    """Write and print steps per second, and how many times as many there are with the callback: the median over the rounds."""
    results = {}
    for name, ways in seconds.items():
        ratios = [without / with_it for without, with_it in zip(ways["without"], ways["with"], strict=True)]
        results[name] = {
            "steps_per_second": {way: 1 / statistics.median(times) for way, times in ways.items()},
            "with_over_without": statistics.median(ratios),
            "of_each_round": ratios,
        }
        print(f"{name}: {results[name]['with_over_without']:.2f} x the steps per second, with the callback")
    modules = (torch, transformers, accelerate, tp)
    circumstances = {
        "command": f"torchrun --nproc_per_node {os.environ.get('WORLD_SIZE', 1)} " + " ".join(sys.argv),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "shape": args.shape,
        "batch_size_per_process": args.batch_size,
        "lengths": LENGTHS,
        "versions": {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.output, json.dumps({**circumstances, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
