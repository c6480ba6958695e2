"""Token classification that drops tokens: every token still gets its label, a dropped one from the state it left with.

python examples/ner.py                                                # tiny and offline
python examples/ner.py --model bert-base-cased --data lhoestq/conll2003 --test validation
"""

import tiny
from datasets import load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "ner", test="test")
data = load_dataset(*args.data)
tokenizer = AutoTokenizer.from_pretrained(args.model)


def encode(row):
    """The first piece of each word bears its tag; -100 is ignored."""
    encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True)
    words = encoded.word_ids()
    first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
    encoded["labels"] = [row["ner_tags"][word] if new else -100 for word, new in zip(words, first, strict=True)]
    return encoded


def accuracy(result):
    """The share of words with the right tag, among those that have one at all."""
    named = result.label_ids > 0
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids)[named].mean().item()}


data = data.map(encode)
tags = 1 + max(max(row) for row in data["train"]["ner_tags"] if row)
trainer = Trainer(
    AutoModelForTokenClassification.from_pretrained(args.model, num_labels=tags),
    TrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=args.learning_rate, save_strategy="no", logging_steps=20
    ),
    train_dataset=data["train"],
    eval_dataset=data[args.test],
    data_collator=DataCollatorForTokenClassification(tokenizer),
    processing_class=tokenizer,
    compute_metrics=accuracy,
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.6))],
)
trainer.train()
scores = trainer.evaluate()  # before saving, so that the model card knows
trainer.save_model(args.output)
print(f"accuracy {scores['eval_accuracy']:.3f} at {scores['eval_macs_realised']:.2f} of the dense model's MACs: {args.output}")
