"""Fine-tune a tagger of words."""

import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class ScriptArguments:
    model_name_or_path: str
    train_file: str
    validation_file: str
    cache_dir: str | None = None


def main():
    args, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    files = {"train": args.train_file, "validation": args.validation_file}
    raw = load_dataset("json", data_files=files, cache_dir=args.cache_dir)
    tags = sorted({tag for row in raw["train"]["ner_tags"] for tag in row})
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForTokenClassification.from_pretrained(args.model_name_or_path, num_labels=len(tags))

    def tokenize_and_align(examples):
        encoded = tokenizer(examples["tokens"], truncation=True, is_split_into_words=True)
        encoded["labels"] = []
        for row, words in enumerate(examples["ner_tags"]):
            before, labels = None, []
            for word in encoded.word_ids(row):
                labels.append(-100 if word in (None, before) else tags.index(words[word]))
                before = word
            encoded["labels"].append(labels)
        return encoded

    data = raw.map(tokenize_and_align, batched=True, remove_columns=raw["train"].column_names)

    def compute_metrics(p):
        predictions, labels = p
        there = labels != -100
        return {"accuracy": float((predictions.argmax(-1) == labels)[there].mean())}

    trainer = Trainer(
        model,
        training_args,
        DataCollatorForTokenClassification(tokenizer),
        data["train"],
        data["validation"],
        tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    sys.exit(main())
