"""Fine-tune a classifier of images in folders named by their class."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForImageClassification, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    model_name_or_path: str
    train_dir: str
    validation_dir: str
    cache_dir: str | None = None


def collate_fn(examples):
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}


def main():
    args, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    folders = {"train": f"{args.train_dir}/**", "validation": f"{args.validation_dir}/**"}
    data = load_dataset("imagefolder", data_files=folders, cache_dir=args.cache_dir)
    labels = data["train"].features["label"].names
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, num_labels=len(labels))
    size = model.config.image_size

    def transform(batch):
        images = [image.convert("RGB").resize((size, size)) for image in batch["image"]]
        batch["pixel_values"] = [torch.tensor(np.array(image) / 127.5 - 1).permute(2, 0, 1).float() for image in images]
        return batch

    data.set_transform(transform)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate_fn,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
