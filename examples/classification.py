"""Fine-tune a text classifier that drops the tokens it does not need: the usual script, and one callback.

python examples/classification.py                                     # tiny and offline
python examples/classification.py --model distilbert-base-uncased --data stanfordnlp/imdb
python examples/classification.py --model bert-base-uncased --data nyu-mll/glue mrpc --text sentence1 sentence2 --test validation

The script stays the same for several processes, on GPUs and, to try it, on a CPU:

    accelerate launch --multi_gpu --num_processes 2 examples/classification.py --model ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/classification.py
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "classification", text=["text"], test="test")
data = load_dataset(*args.data)
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = data.map(lambda row: tokenizer(*(row[column] for column in args.text), truncation=True))
labels = len(set(data["train"]["label"]))
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)

trainer = Trainer(
    model,
    TrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=args.learning_rate, save_strategy="no", logging_steps=20
    ),
    train_dataset=data["train"],
    eval_dataset=data[args.test],
    processing_class=tokenizer,
    compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()},
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.5))],  # half the dense model's MACs on real tokens
)
trainer.train()
scores = trainer.evaluate()  # before saving, so that the model card knows
trainer.save_model(args.output)  # opens with AutoModelForSequenceClassification.from_pretrained(..., trust_remote_code=True)
print(f"accuracy {scores['eval_accuracy']:.3f} at {scores['eval_macs_realised']:.2f} of the dense model's MACs: {args.output}")
