"""Fine-tune a model that picks the ending of a sentence."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

ENDINGS = ["ending0", "ending1"]


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
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)

    def preprocess(examples):
        first = [[context] * len(ENDINGS) for context in examples["sent1"]]
        second = [list(endings) for endings in zip(*(examples[name] for name in ENDINGS), strict=True)]
        encoded = tokenizer(list(chain(*first)), list(chain(*second)), truncation=True)
        size = len(ENDINGS)
        return {key: [rows[i : i + size] for i in range(0, len(rows), size)] for key, rows in encoded.items()}

    data = raw.map(preprocess, batched=True)
    trainer = Trainer(
        model_init=lambda: AutoModelForMultipleChoice.from_pretrained(args.model_name_or_path),
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForMultipleChoice(tokenizer=tokenizer),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())},
    )
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
