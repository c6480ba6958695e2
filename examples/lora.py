"""LoRA: a frozen model, a small adapter, and gates that learn which tokens it can do without.

python examples/lora.py                                               # tiny and offline
python examples/lora.py --model roberta-base --data nyu-mll/glue sst2 --text sentence --test validation
"""

import tiny
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "classification", text=["text"], test="test")
data = load_dataset(*args.data)
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = data.map(lambda row: tokenizer(*(row[column] for column in args.text), truncation=True))
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(set(data["train"]["label"])))
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))

trainer = Trainer(
    model,
    TrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=10 * args.learning_rate, save_strategy="no", logging_steps=20
    ),
    train_dataset=data["train"],
    eval_dataset=data[args.test],
    processing_class=tokenizer,
    compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()},
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.6))],
)
trainer.train()
scores = trainer.evaluate()
trainer.model.merge_and_unload().save_pretrained(args.output)  # or trainer.save_model(args.output): the adapter alone
tokenizer.save_pretrained(args.output)
print(f"accuracy {scores['eval_accuracy']:.3f} at {scores['eval_macs_realised']:.2f} of the dense model's MACs: {args.output}")
