"""How fast is it on this GPU? Packing and dropping, each as a ratio of two times taken in one run.

    python examples/speed_gpu.py --output results/speed-gpu.json

Models of two shapes with random weights (time does not depend on them) read texts of random words, as many as a length drawn evenly
from a range says, in large unsorted batches, in half precision. Two questions, as in `speed.py`: how much faster than the unmodified
model on the padded batch, against padded tokens / real tokens? And how much faster than the packed dense model, against the MACs
saved? Tokens are dropped at four sites, as in `speed.py`, or at two: each costs the host a little time, which counts where the GPU
is done soon.
"""

import argparse
import json
import random
import shlex
import sys
from pathlib import Path

import torch
from demo import minilm
from speed import HEADS, KEEPS, SHAPES
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, set_seed

import hf_tokenprune as tp
from hf_tokenprune.bench import bench
from hf_tokenprune.writing import write_file

SITES = {4: KEEPS, 2: {"6x384": {1: 0.5, 3: 0.4}, "12x768": {3: 0.5, 7: 0.4}}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--sites", nargs="+", type=int, choices=SITES, default=list(SITES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--batches", type=int, default=3, help="of the largest size")
    parser.add_argument("--lengths", type=int, nargs=2, default=(128, 512), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokenizer", default=None, help="folder or Hub id; default: that of all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, default=Path("runs/speed-gpu.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. examples/speed.py measures on a CPU.")
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or minilm())
    texts = words(tokenizer, max(args.batch_sizes) * args.batches, args.lengths)
    report = {"command": shlex.join(["python", *sys.argv]), "lengths": list(args.lengths), "rows": []}
    cases = [(shape, head, sites) for shape in args.shapes for head in args.heads for sites in args.sites]
    for shape, head, sites in tqdm(cases):
        for row in measure(shape, head, sites, tokenizer, texts, args):
            report["rows"].append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "bench"}), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.output, json.dumps(report, indent=1))


def words(tokenizer, count, lengths):
    """`count` texts of words that are one token each."""
    known = [word for word in sorted(tokenizer.get_vocab()) if word.isascii() and word.isalpha()]
    shortest, longest = (length - tokenizer.num_special_tokens_to_add() for length in lengths)
    return [" ".join(random.choices(known, k=random.randint(shortest, longest))) for _ in range(count)]


def measure(shape, head, sites, tokenizer, texts, args):
    """Times of one shape, head and choice of sites, at each batch size."""
    model = HEADS[head](BertConfig(**SHAPES[shape], num_labels=7)).eval().cuda()
    tp.attach(model, {layer: tp.TopK(share) for layer, share in SITES[sites][shape].items()})
    longest = max(args.lengths)
    result = bench(
        model,
        texts,
        tokenizer=tokenizer,
        batch_sizes=args.batch_sizes,
        max_length=longest,
        repeats=args.repeats,
        dtype=args.dtype,
    )
    real = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]]
    for found in result.pop("results"):
        size, ms, macs = found["batch_size"], found["ms"], found["macs"]
        groups = [real[i : i + size] for i in range(0, len(real), size)]
        padded_over_real = sum(max(group) * len(group) for group in groups) / sum(real)
        packing, dropping = ms["hf_padded"] / ms["packed_dense"], ms["packed_dense"] / ms["pruned"]
        saved = macs["packed_dense"] / macs["pruned"]
        yield {
            "shape": shape,
            "head": head,
            "sites": sites,
            "batch_size": size,
            "padded_over_real": padded_over_real,
            "packing_speedup": packing,
            "packing_over_ideal": packing / padded_over_real,
            "macs_saved_by_dropping": saved,
            "dropping_speedup": dropping,
            "dropping_over_ideal": dropping / saved,
            "bench": {**result, **found},
        }


if __name__ == "__main__":
    main()
