"""Publish a token-pruned model: whoever opens it needs transformers, but not this package.

python examples/publish.py                                            # a tiny model, and what would be pushed
python examples/publish.py --folder runs/classification --push me/my-classifier
"""

import argparse
import subprocess
import sys
from pathlib import Path

import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_tokenprune as tp
from hf_tokenprune.publish import push

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", help="what trainer.save_model wrote (default: a tiny sequence classifier, made now)")
parser.add_argument("--push", metavar="ID", help="push it to this repository of the Hub (after `hf auth login`)")
parser.add_argument("--output", default="runs/publish", help="where the tiny model is saved (default: %(default)s)")
args = parser.parse_args()

if args.folder is None:
    args.folder, dense = args.output, tiny.model()
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    tp.attach(model, {1: tp.TopK(0.6), 2: tp.TopK(0.5)}).save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(args.folder)

# Does the folder open where hf_tokenprune is not installed?
CHECK = """
import sys
sys.modules["hf_tokenprune"] = None  # cannot be imported
from transformers import AutoTokenizer, pipeline
model = pipeline("text-classification", sys.argv[1], trust_remote_code=True, device="cpu")
print(type(model.model).__qualname__, model("It opens without hf_tokenprune."))
"""
subprocess.run([sys.executable, "-c", CHECK, args.folder], check=True)

for file in sorted(Path(args.folder).iterdir()):
    if file.is_file():
        print(f"{file.stat().st_size / 1e6:10.3f} MB  {file.name}")
if args.push:
    push(args.folder, args.push)  # weights, tokenizer, the code that opens them, and a card: one commit
    print(f"pushed; opens with AutoModelForSequenceClassification.from_pretrained({args.push!r}, trust_remote_code=True)")
else:
    print(f"{args.folder} is ready; --push ID publishes it.")
