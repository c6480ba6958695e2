"""The tasks: where the data comes from, how it is tokenised, which model reads it, how it is scored.

The split that is reported is used for nothing else. Settings are chosen on the held-out split: the validation set where there is a
test set with gold labels, otherwise a tenth of the training set.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from metrics import accuracy, exact_match, f1, pearson, ranking, spearman, word_f1
from pyarrow.parquet import read_table
from tqdm import tqdm
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, DataCollatorWithPadding

sys.path.append(str(Path(__file__).resolve().parent.parent))
from demo import minilm

SPLIT_SEED = 0  # subsets and held-out parts are the same in all runs, whatever their own seed


@dataclass
class Encoded:
    """A tokenised split. `windows[i]` says which row feature `i` is of and, where answers are spans, its tokens' offsets."""

    rows: list
    features: list
    windows: list


@dataclass(frozen=True, kw_only=True)
class Task:
    """Classification of texts or pairs. `held_out` None = a tenth of train, whole groups of `group` where that is given."""

    name: str
    hub: tuple
    columns: tuple
    max_length: int
    labels: int = 2
    held_out: str | None = None
    report: str = "test"
    train: str = "train"
    group: str | None = None
    rename: tuple = ()
    train_limit: int | None = None
    eval_limit: int | None = None
    learning_rates: tuple = (1e-4, 2e-4)
    epochs: int = 3
    batch_size: int = 32
    method_epochs: int = 2
    bench_texts: int = 128
    metric: str = "accuracy"

    def load(self, data_dir=None, train_limit=None, eval_limit=None):
        """`{"train", "held_out", "report"}`: lists of rows. Limits of None are the task's own, 0 means no limit."""
        train_limit, eval_limit = self.limited("train", train_limit), self.limited("eval", eval_limit)
        parts = {"train": self._split(data_dir, self.train), "report": self._split(data_dir, self.report)}
        if self.held_out:
            parts["held_out"] = self._split(data_dir, self.held_out)
        else:
            parts["train"], parts["held_out"] = self._hold_out(parts["train"])
        limits = {"train": train_limit, "held_out": train_limit and max(train_limit // 9, 1), "report": eval_limit}
        return {name: self._limit(rows, limits[name]) for name, rows in parts.items()}

    def limited(self, what, given):
        """The number of rows that a split is limited to, or None."""
        return (getattr(self, f"{what}_limit") if given is None else given) or None

    def _split(self, data_dir, split):
        if data_dir is None:
            rows = load_dataset(*self.hub, split=split).to_list()
        else:
            file = Path(data_dir) / self.name / f"{split}.parquet"
            if split == "train" and not file.exists():
                file = file.with_name("train_subset.parquet")
            if not file.exists():
                raise SystemExit(
                    f"There is no file {file}: --data-dir needs <task>/<split>.parquet; leave it out to use the Hub."
                )
            rows = read_table(file).to_pylist()
        names = dict(self.rename)
        return self.choose([{names.get(column, column): value for column, value in row.items()} for row in rows])

    def choose(self, rows):
        """The rows that count."""
        return rows

    def _hold_out(self, rows):
        groups = sorted({row[self.group] for row in rows}) if self.group else list(range(len(rows)))
        random.Random(SPLIT_SEED).shuffle(groups)
        held = set(groups[: max(len(groups) // 10, 1)])
        parts = ([], [])
        for number, row in enumerate(rows):
            parts[(row[self.group] if self.group else number) in held].append(row)
        return parts

    def _limit(self, rows, limit):
        if not limit or len(rows) <= limit:
            return rows
        return random.Random(SPLIT_SEED).sample(rows, limit)

    def texts(self, rows):
        """What `bench` reads: strings, or pairs of strings."""
        return [row[self.columns[0]] if len(self.columns) == 1 else tuple(row[c] for c in self.columns) for row in rows]

    def model(self, source=None):
        """A model with this task's head; by default fresh, from all-MiniLM-L6-v2."""
        return AutoModelForSequenceClassification.from_pretrained(source or minilm(), num_labels=self.labels)

    def encode(self, tokenizer, rows):
        columns = [[row[column] for row in rows] for column in self.columns]
        encoded = tokenizer(*columns, truncation=True, max_length=self.max_length)
        features = [{name: values[i] for name, values in encoded.items()} for i in range(len(rows))]
        for feature, row in zip(features, rows, strict=True):
            feature["labels"] = row["label"]
        return Encoded(rows, features, list(range(len(rows))))

    def score(self, encoded, outputs):
        """`{metric: value}` from the logits of each feature."""
        predicted, labels = np.stack(outputs).argmax(-1), [row["label"] for row in encoded.rows]
        scores = {"accuracy": accuracy(predicted, labels)}
        return {**scores, "f1": f1(predicted, labels)} if self.labels == 2 else scores


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """A number per pair."""

    labels: int = 1
    metric: str = "pearson"

    def score(self, encoded, outputs):
        predicted, labels = np.stack(outputs)[:, 0], [row["label"] for row in encoded.rows]
        return {"pearson": pearson(predicted, labels), "spearman": spearman(predicted, labels)}


@dataclass(frozen=True, kw_only=True)
class Reranking(Task):
    """Answers ordered by a cross-encoder, question by question; only questions that have right and wrong answers count."""

    metric: str = "map"

    def choose(self, rows):
        labels = {}
        for row in rows:
            labels.setdefault(row[self.group], set()).add(row["label"])
        return [row for row in rows if labels[row[self.group]] == {0, 1}]

    def score(self, encoded, outputs):
        logits, rows = np.stack(outputs), encoded.rows
        groups = [row[self.group] for row in rows]
        mean_average, reciprocal = ranking(logits[:, 1] - logits[:, 0], [row["label"] for row in rows], groups)
        return {"map": mean_average, "mrr": reciprocal}

    def _limit(self, rows, limit):
        """Whole questions only."""
        if not limit or len(rows) <= limit:
            return rows
        groups = sorted({row[self.group] for row in rows})
        random.Random(SPLIT_SEED).shuffle(groups)
        sizes = dict.fromkeys(groups, 0)
        for row in rows:
            sizes[row[self.group]] += 1
        kept, total = set(), 0
        for group in groups:
            if total < limit:
                kept.add(group)
                total += sizes[group]
        return [row for row in rows if row[self.group] in kept]


@dataclass(frozen=True, kw_only=True)
class SpanAnswers(Task):
    """Extractive question answering in overlapping windows; the best span of all windows of a question is its answer."""

    stride: int = 128
    longest_answer: int = 30
    candidates: int = 20
    metric: str = "f1"

    def model(self, source=None):
        return AutoModelForQuestionAnswering.from_pretrained(source or minilm())

    def encode(self, tokenizer, rows):
        encoded = tokenizer(
            [row["question"].strip() for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        features, windows = [], []
        for i, owner in enumerate(owners):
            feature = {name: values[i] for name, values in encoded.items()}
            context = [span if part == 1 else None for span, part in zip(offsets[i], encoded.sequence_ids(i), strict=True)]
            start, end = self._positions(rows[owner]["answers"], context)
            features.append({**feature, "start_positions": start, "end_positions": end})
            windows.append((owner, context))
        return Encoded(rows, features, windows)

    def _positions(self, answers, context):
        """First and last token of the answer; the first token of the text (0) where this window does not hold all of it."""
        first = answers["answer_start"][0]
        last = first + len(answers["text"][0])
        inside = [i for i, span in enumerate(context) if span and span[0] < last and span[1] > first]
        if not inside or context[inside[0]][0] > first or context[inside[-1]][1] < last:
            return 0, 0
        return inside[0], inside[-1]

    def score(self, encoded, outputs):
        best = {}
        for (owner, context), logits in zip(encoded.windows, outputs, strict=True):
            for value, text in self._spans(context, logits, encoded.rows[owner]["context"]):
                if owner not in best or value > best[owner][0]:
                    best[owner] = (value, text)
        found = [(best.get(i, (0, ""))[1], row["answers"]["text"]) for i, row in enumerate(encoded.rows)]
        exact, overlap = (float(np.mean([score(text, gold) for text, gold in found])) for score in (exact_match, word_f1))
        return {"exact_match": exact, "f1": overlap}

    def _spans(self, context, logits, text):
        """The best span of one window, as `(value, text)`, among pairs of its likeliest starts and ends."""
        inside = np.array([span is not None for span in context])
        starts, ends = np.where(inside[:, None], logits, -np.inf).T
        likeliest = [np.argsort(-values)[: min(self.candidates, inside.sum())] for values in (starts, ends)]
        pairs = [(s, e) for s in likeliest[0] for e in likeliest[1] if s <= e < s + self.longest_answer]
        if pairs:
            start, end = max(pairs, key=lambda pair: starts[pair[0]] + ends[pair[1]])
            yield starts[start] + ends[end], text[context[start][0] : context[end][1]]


GLUE = "nyu-mll/glue"
PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task(
            name="mrpc", hub=(GLUE, "mrpc"), columns=PAIR, max_length=128, held_out="validation",
            learning_rates=(5e-5, 1e-4), batch_size=16, epochs=4, method_epochs=4,
        ),
        Regression(
            name="stsb", hub=("mteb/stsbenchmark-sts",), rename=(("score", "label"),), columns=PAIR, max_length=64,
            held_out="validation", learning_rates=(5e-5, 1e-4), method_epochs=4,
        ),
        Reranking(
            name="wikiqa", hub=("microsoft/wiki_qa",), columns=("question", "answer"), max_length=128, group="question_id",
            learning_rates=(1e-4,), epochs=2,
        ),
        Task(
            name="sst2", hub=(GLUE, "sst2"), columns=("sentence",), max_length=64, report="validation", train_limit=12_000,
            learning_rates=(1e-4,),
        ),
        Task(
            name="20newsgroups", hub=("SetFit/20_newsgroups",), columns=("text",), max_length=512, labels=20,
            learning_rates=(2e-4,),
        ),
        SpanAnswers(
            name="squad", hub=("rajpurkar/squad",), columns=("question", "context"), max_length=384, report="validation",
            group="title", learning_rates=(2e-4,), method_epochs=4,
        ),
    )
}  # fmt: skip


@torch.inference_mode()
def predict(model, encoded, tokenizer, *, meter=None, batch_size=32, name="evaluate"):
    """The logits of every feature, one array each, without padding: `(labels,)`, or `(tokens, 2)` where answers are spans."""
    model.eval()
    collate, outputs = DataCollatorWithPadding(tokenizer), []
    features = [
        {k: v for k, v in feature.items() if k not in ("labels", "start_positions", "end_positions")}
        for feature in encoded.features
    ]
    for start in tqdm(range(0, len(features), batch_size), desc=name, unit="batch", mininterval=5):
        part = features[start : start + batch_size]
        answer = model(**collate(part).to(model.device))
        if meter is not None:
            meter.update()
        if "logits" in answer:
            outputs += list(answer.logits.float().cpu().numpy())
        else:
            spans = torch.stack([answer.start_logits, answer.end_logits], dim=-1).float().cpu().numpy()
            outputs += [row[: len(feature["input_ids"])] for row, feature in zip(spans, part, strict=True)]
    return outputs
