"""An image classifier that drops patches.

python examples/vit.py                                                # tiny and offline
python examples/vit.py --model google/vit-base-patch16-224-in21k --data ethz/food101 --test validation
python examples/vit.py --data my_images                               # my_images/train/cat/1.png, ...
"""

import tiny
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "images", "vit", test="test")
data = load_dataset(*args.data)
processor = AutoImageProcessor.from_pretrained(args.model)
names = data["train"].features["label"].names
model = AutoModelForImageClassification.from_pretrained(args.model, num_labels=len(names), id2label=dict(enumerate(names)))


def collate(rows):
    """Pixels and labels of a batch."""
    pixels = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")
    return {**pixels, "labels": torch.tensor([row["label"] for row in rows])}


trainer = Trainer(
    model,
    TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        save_strategy="no",
        logging_steps=20,
        remove_unused_columns=False,  # the images are what collate needs
    ),
    train_dataset=data["train"],
    eval_dataset=data[args.test],
    data_collator=collate,
    processing_class=processor,
    compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()},
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.5))],
)
trainer.train()
scores = trainer.evaluate()  # before saving, so that the model card knows
trainer.save_model(args.output)
print(f"accuracy {scores['eval_accuracy']:.3f} at {scores['eval_macs_realised']:.2f} of the dense model's MACs: {args.output}")
found = tp.report(args.output, [row["image"].convert("RGB") for row in data[args.test].select(range(12))])
found.save(f"{args.output}/patches.html")  # which patches live how deep
