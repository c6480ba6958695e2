"""A cross-encoder that re-ranks search results on a CPU: trained as a classifier with one output, used with sentence-transformers.

    python examples/rerank.py                                             # tiny and offline
    python examples/rerank.py --model cross-encoder/ms-marco-MiniLM-L6-v2 --data my_triplets

`my_triplets` holds train and test files (jsonl, parquet, ...) with the columns query, positive and negative.
"""

import time

import tiny
from datasets import load_dataset
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "pairs")
data = load_dataset(*args.data)
tokenizer = AutoTokenizer.from_pretrained(args.model)


def encode(rows):
    """Two pairs of each triplet: the right passage is worth 1, the wrong one 0."""
    encoded = tokenizer(rows["query"] * 2, rows["positive"] + rows["negative"], truncation=True)
    return {**encoded, "labels": [[1.0]] * len(rows["query"]) + [[0.0]] * len(rows["query"])}


trainer = Trainer(
    AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, problem_type="multi_label_classification"),
    TrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=args.learning_rate, save_strategy="no", logging_steps=20
    ),
    train_dataset=data["train"].map(encode, batched=True, remove_columns=data["train"].column_names),
    processing_class=tokenizer,
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.5))],
)
trainer.train()
trainer.save_model(args.output)

# The folder is opened by the code in it; hf_tokenprune is not needed from here on.
model = CrossEncoder(args.output, trust_remote_code=True, device="cpu")
dense = CrossEncoder(args.output, trust_remote_code=True, device="cpu")
tp.detach(dense.model)
test = data["test"].to_list()
pairs = [(row["query"], row[kind]) for row in test for kind in ("positive", "negative")]
for name, encoder in (("every token read, weights the same", dense), ("tokens dropped", model)):
    encoder.predict(pairs[:32], show_progress_bar=False)  # warms up
    start = time.perf_counter()
    scores = encoder.predict(pairs, show_progress_bar=False)
    ms = 1000 * (time.perf_counter() - start) / len(pairs)
    print(f"{name}: {(scores[::2] > scores[1::2]).mean():.3f} of the pairs in the right order, {ms:.2f} ms per passage")
best = model.rank(test[0]["query"], [test[0]["negative"], test[0]["positive"]])[0]
print(f"{test[0]['query']} -> passage {best['corpus_id']}")
