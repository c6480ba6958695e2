"""How fast is it here? Packing, dropping and training steps, each as a ratio of two times taken in one run.

    python examples/speed.py --output results/speed.json

Models of two shapes with random weights (time does not depend on them) read documentation texts (see `docstrings.py`) in batches of
32, unsorted, and one by one. Four questions:

* packing: how much faster than the unmodified model on the padded batch, against padded tokens / real tokens?
* dropping: how much faster than the packed dense model, against the MACs saved? Tokens are ranked by the attention they receive, or
  by a learned importance that reads neighbours, too, as ToP does by default.
* cutting 60 % of the layers' weights: the same; and against the unmodified model, one text at a time?
* a ToP training step in the anneal phase, with and without a teacher, against a step of the dense phase.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import docstrings
import torch
from demo import minilm
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertForTokenClassification, set_seed

import hf_tokenprune as tp
from hf_tokenprune.bench import bench
from hf_tokenprune.schedule import Moment
from hf_tokenprune.surgery import operate
from hf_tokenprune.teacher import dense_copy
from hf_tokenprune.writing import write_file

SHAPES = {
    "6x384": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "12x768": {},
}
KEEPS = {"6x384": {1: 0.6, 2: 0.5, 3: 0.5, 4: 0.5}, "12x768": {2: 0.7, 4: 0.6, 6: 0.5, 8: 0.5}}
CUTS = {"6x384": {"hidden": 304, "heads": 6, "units": 768}, "12x768": {"hidden": 608, "heads": 6, "units": 1536}}
PARTS = ("inference", "cutting", "training")
IMPORTANCE = ("attention", "learned")
HEADS = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64, help="texts to time (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=128, help="cut texts to so many tokens; more = more ragged")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch uses)")
    parser.add_argument("--output", type=Path, default=Path("runs/speed.json"))
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    texts = list(docstrings.load()["test"].shuffle(seed=0)["text"][: args.texts])
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]]
    padded = sum(max(lengths[i : i + 32]) * len(lengths[i : i + 32]) for i in range(0, len(lengths), 32))
    report = {
        "command": "python " + " ".join(sys.argv),
        "real_tokens": sum(lengths),
        "padded_tokens": padded,
        "inference": [],
        "cutting": [],
        "training": [],
    }
    cases = [(shape, head, by) for shape in args.shapes for head in HEADS for by in IMPORTANCE if "inference" in args.parts]
    for case in tqdm(cases, desc="inference"):
        report["inference"].append(inference(*case, tokenizer, texts, padded / sum(lengths), args))
    for shape in tqdm(args.shapes if "cutting" in args.parts else [], desc="cutting"):
        report["cutting"].append(cutting(shape, tokenizer, texts, args))
    if "training" in args.parts:
        report["training"] = [training_step(args.shapes[0], tokenizer, texts[:32], args)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.output, json.dumps(report, indent=1))
    show(report)


def selector(share, by, hidden, bins=50):
    """Keeps a share of the tokens, by one importance or the other."""
    if by == "attention":
        return tp.TopK(share)
    chosen = tp.RankBins(bins, hidden, hidden, near=tp.ToP.NEIGHBOURS)
    chosen.set_kept([bin < round(share * bins) for bin in range(bins)])
    return chosen


def inference(shape, head, by, tokenizer, texts, padded_over_real, args):
    """Times of one shape, head and importance, at batch 32 and batch 1."""
    model = HEADS[head](BertConfig(**SHAPES[shape], num_labels=7)).eval()
    tp.attach(model, {layer: selector(share, by, model.config.hidden_size) for layer, share in KEEPS[shape].items()})
    result = bench(model, texts, tokenizer=tokenizer, batch_sizes=(1, 32), max_length=args.max_length, repeats=args.repeats)
    one, many = result["results"][0], result["results"][-1]
    ms, macs = many["ms"], many["macs"]
    return {
        "shape": shape,
        "head": head,
        "importance": by,
        "padded_over_real": padded_over_real,
        "packing_speedup": ms["hf_padded"] / ms["packed_dense"],
        "packing_over_ideal": ms["hf_padded"] / ms["packed_dense"] / padded_over_real,
        "batch_1_packed_over_hf": one["ms"]["packed_dense"] / one["ms"]["hf_padded"],
        "batch_1_dropping_speedup": one["ms"]["packed_dense"] / one["ms"]["pruned"],
        "macs_saved_by_dropping": macs["packed_dense"] / macs["pruned"],
        "dropping_speedup": ms["packed_dense"] / ms["pruned"],
        "dropping_over_ideal": ms["packed_dense"] / ms["pruned"] / (macs["packed_dense"] / macs["pruned"]),
        "bench": result,
    }


def cutting(shape, tokenizer, texts, args):
    """Times of a model of one shape with 60 % of its layers' weights cut out."""
    model = tp.pack(BertForSequenceClassification(BertConfig(**SHAPES[shape], num_labels=7)).eval())
    left, layers = CUTS[shape], model.config.num_hidden_layers
    operate(model, hidden=range(left["hidden"]), heads=[range(left["heads"])] * layers, units=[range(left["units"])] * layers)
    result = bench(model, texts, tokenizer=tokenizer, batch_sizes=(1, 32), max_length=args.max_length, repeats=args.repeats)
    one, many = result["results"][0], result["results"][-1]
    saved = many["macs"]["packed_dense"] / many["macs"]["pruned"]
    return {
        "shape": shape,
        "macs_saved_by_cutting": saved,
        "cutting_speedup": many["ms"]["packed_dense"] / many["ms"]["pruned"],
        "cutting_over_ideal": many["ms"]["packed_dense"] / many["ms"]["pruned"] / saved,
        "batch_1_over_packed": one["ms"]["packed_dense"] / one["ms"]["pruned"],
        "batch_1_over_hf": one["ms"]["hf_padded"] / one["ms"]["pruned"],
        "bench": result,
    }


def training_step(shape, tokenizer, texts, args):
    """Times of a step of the dense phase and of the anneal phase, mean over the phase, with and without a teacher."""
    batch = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
    batch["labels"] = torch.arange(len(texts)) % 7
    dense = BertForSequenceClassification(BertConfig(**SHAPES[shape], num_labels=7))
    steps = {}
    for name in ("dense", "anneal", "anneal, teacher"):
        model = BertForSequenceClassification(dense.config)
        teacher = "self" if "teacher" in name else None  # without one, importance is the attention received
        objective = tp.ToP(target_macs=0.4, teacher=teacher).attach(model)
        objective.start_run(1e-4, {"anneal": 100})
        objective.teacher = dense_copy(dense) if teacher else None
        steps[name] = (model.train(), objective, torch.optim.AdamW(model.parameters(), lr=1e-4))
    moments = [0.1, 0.3, 0.5, 0.7, 0.9]
    seconds = {name: [[] for _ in moments] for name in steps}
    for repeat in tqdm(range(args.repeats + 1), desc="training"):
        for i, progress in enumerate(moments):
            for name, (model, objective, optimizer) in steps.items():
                objective.moment = Moment("dense" if name == "dense" else "anneal", progress)
                start = time.perf_counter()
                objective.begin_step()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                objective.close_gates()
                objective.end_step()
                objective.harden()
                if repeat:
                    seconds[name][i].append(time.perf_counter() - start)
    mean = {name: statistics.mean(statistics.median(times) for times in rows) for name, rows in seconds.items()}
    return {
        "shape": shape,
        "seconds": mean,
        "anneal_over_dense": mean["anneal"] / mean["dense"],
        "anneal_with_teacher_over_dense": mean["anneal, teacher"] / mean["dense"],
    }


def show(report):
    for row in report["inference"]:
        print(
            f"{row['shape']:>7} {row['head']:<9} {row['importance']:<9} batch 32: packing {row['packing_speedup']:.2f} x "
            f"(padded/real {row['padded_over_real']:.2f}, so {row['packing_over_ideal']:.2f} of it), "
            f"dropping {row['dropping_speedup']:.2f} x (MACs {row['macs_saved_by_dropping']:.2f}, so "
            f"{row['dropping_over_ideal']:.2f} of it); batch 1: dropping {row['batch_1_dropping_speedup']:.2f} x, "
            f"packed takes {row['batch_1_packed_over_hf']:.3f} of HF's time"
        )
    for row in report["cutting"]:
        print(
            f"{row['shape']:>7} cut: batch 32 {row['cutting_speedup']:.2f} x (MACs {row['macs_saved_by_cutting']:.2f}, so "
            f"{row['cutting_over_ideal']:.2f} of it), batch 1 {row['batch_1_over_packed']:.2f} x packed, "
            f"{row['batch_1_over_hf']:.2f} x HF"
        )
    for row in report["training"]:
        print(
            f"{row['shape']:>7} ToP step in the anneal phase: {row['anneal_over_dense']:.2f} x a dense step, "
            f"{row['anneal_with_teacher_over_dense']:.2f} x with a teacher"
        )


if __name__ == "__main__":
    main()
