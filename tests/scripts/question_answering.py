"""Fine-tune a model that finds the answer in a text, by a Trainer of our own (trainer_qa.py)."""

from dataclasses import dataclass

from datasets import load_dataset
from trainer_qa import QuestionAnsweringTrainer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ScriptArguments:
    model_name_or_path: str
    train_file: str
    validation_file: str
    cache_dir: str | None = None
    max_seq_length: int = 48


def main():
    args, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    files = {"train": args.train_file, "validation": args.validation_file}
    raw = load_dataset("json", data_files=files, field="data", cache_dir=args.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForQuestionAnswering.from_pretrained(args.model_name_or_path)

    def prepare(examples):
        encoded = tokenizer(
            examples["question"],
            examples["context"],
            truncation="only_second",
            max_length=args.max_seq_length,
            padding="max_length",
        )
        starts, ends = [], []
        for row, answers in enumerate(examples["answers"]):
            start = answers["answer_start"][0]
            end = start + len(answers["text"][0]) - 1
            starts.append(encoded.char_to_token(row, start, sequence_index=1) or 0)
            ends.append(encoded.char_to_token(row, end, sequence_index=1) or 0)
        encoded["start_positions"], encoded["end_positions"] = starts, ends
        return encoded

    data = raw.map(prepare, batched=True, remove_columns=raw["train"].column_names)
    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        eval_examples=raw["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
