"""What the examples run on if nothing else is named: a tiny random model and a few hundred made-up samples, without a network.

Every example takes the same flags, so that `--model` and `--data` put real ones in their place:

    python examples/classification.py --model distilbert-base-uncased --data stanfordnlp/imdb
"""

import argparse
import atexit
import json
import random
import tempfile
from pathlib import Path

from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

GOOD, BAD = ["lovely", "great", "superb"], ["dull", "awful", "broken"]
NAMES, PLACES = ["anna", "bert", "carl", "dora"], ["oslo", "rome", "lima", "cairo"]
FILLER = ["the", "of", "in", "and", "to", "it", "was", "with", "for", "on", "from", "film", "story", "house", "day", "old"]
QUESTION = ["who", "lives", "?", "."]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NAMES, *PLACES, *FILLER, *QUESTION]
SIZES = {"initializer_range": 0.1, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
HOME = tempfile.TemporaryDirectory(prefix="tiny-")
atexit.register(HOME.cleanup)


def arguments(description, task, kind="bert", **more):
    """The flags of an example: `model` and `data` are what `from_pretrained` and `load_dataset(*data)` take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a dense model (default: a tiny random one)")
    parser.add_argument(
        "--data", nargs="+", help="folder, or Hub id and perhaps configuration, of a data set (default: made up)"
    )
    parser.add_argument("--epochs", type=float, help="default: 3, or 8 for the tiny model")
    parser.add_argument("--learning-rate", type=float, help="default: 5e-5, or 1e-3 for the tiny model")
    parser.add_argument("--output", default=f"runs/{task}", help="where to save (default: %(default)s)")
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default, nargs="+" if isinstance(default, list) else None)
    args = parser.parse_args()
    args.epochs = args.epochs or (3 if args.model else 8)
    args.learning_rate = args.learning_rate or (5e-5 if args.model else 1e-3)
    args.model = args.model or model(kind)
    args.data = args.data or [data(task)]
    return args


def model(kind="bert"):
    """A folder with a tiny random BERT and its tokenizer, or a ViT and its image processor."""
    folder = Path(HOME.name) / kind
    if kind == "vit":
        ViTModel(ViTConfig(**SIZES, image_size=24, patch_size=4)).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    else:
        vocabulary = {word: number for number, word in enumerate(WORDS)}
        BertModel(BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=64)).save_pretrained(folder)
        BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    return str(folder)


def data(task, train=256, test=64):
    """A folder that `load_dataset` opens as splits train and test."""
    make = {"classification": _review, "ner": _tagged, "qa": _question, "pairs": _pair, "images": None}[task]
    chance = random.Random(0)
    folder = Path(HOME.name) / f"{task}-data"
    for split, count in (("train", train), ("test", test)):
        if task == "images":
            _images(folder / split, count, chance)
            continue
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(make(chance)) + "\n" for _ in range(count)))
    return str(folder)


def _filler(chance, least=4, most=14):
    return [chance.choice(FILLER) for _ in range(chance.randint(least, most))]


def _review(chance):
    label = chance.randint(0, 1)
    return {"text": " ".join([*_filler(chance), chance.choice((BAD, GOOD)[label]), *_filler(chance)]), "label": label}


def _tagged(chance):
    words = _filler(chance)
    tags = [0] * len(words)
    for kind, choices in ((1, NAMES), (2, PLACES)):
        at = chance.randint(0, len(words))
        words.insert(at, chance.choice(choices))
        tags.insert(at, kind)
    return {"tokens": words, "ner_tags": tags}


def _question(chance):
    places = chance.sample(PLACES, 2)
    names = chance.sample(NAMES, 2)
    facts = [f"{name} lives in {place} ." for name, place in zip(names, places, strict=True)]
    context = " ".join([*_filler(chance), facts[0], *_filler(chance), facts[1], *_filler(chance)])
    answers = {"text": [names[0]], "answer_start": [context.index(facts[0])]}
    return {"question": f"who lives in {places[0]} ?", "context": context, "answers": answers}


def _pair(chance):
    """A query, a passage that answers it, and one that does not."""
    place = chance.choice(PLACES)
    passage = " ".join([*_filler(chance), chance.choice(NAMES), "lives", "in", place, *_filler(chance)])
    return {"query": f"who lives in {place} ?", "positive": passage, "negative": " ".join(_filler(chance, 10, 30))}


def _images(folder, count, chance):
    """A bright square on noise, in the upper or the lower half."""
    from PIL import Image

    for number in range(count):
        name = ("lower", "upper")[number % 2]
        image = Image.effect_noise((24, 24), 60).convert("RGB")
        image.paste(
            (255, 220, 40), (x := chance.randint(0, 18), y := chance.randint(0, 5) + 13 * (name == "lower"), x + 6, y + 6)
        )
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f"{number}.png")
