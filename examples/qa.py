"""Extractive question answering that drops tokens: start and end are chosen among all tokens, dropped ones included.

python examples/qa.py                                                 # tiny and offline
python examples/qa.py --model bert-base-uncased --data rajpurkar/squad --test validation
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DefaultDataCollator, Trainer, TrainingArguments

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "qa", test="test")
data = load_dataset(*args.data)
tokenizer = AutoTokenizer.from_pretrained(args.model)
length = min(tokenizer.model_max_length, 384)


def encode(row):
    """Where the answer stands in tokens; an answer that was cut off is at the first token."""
    encoded = tokenizer(row["question"], row["context"], truncation="only_second", max_length=length, padding="max_length")
    begin = row["answers"]["answer_start"][0]
    first = encoded.char_to_token(begin, sequence_index=1)
    last = encoded.char_to_token(begin + len(row["answers"]["text"][0]) - 1, sequence_index=1)
    encoded["start_positions"], encoded["end_positions"] = (first, last) if last is not None else (0, 0)
    return encoded


def exact(result):
    """The share of answers whose start and end are both right."""
    start, end = (logits.argmax(-1) for logits in result.predictions)
    return {"exact": ((start == result.label_ids[0]) & (end == result.label_ids[1])).mean().item()}


data = data.map(encode, remove_columns=data["train"].column_names)
trainer = Trainer(
    AutoModelForQuestionAnswering.from_pretrained(args.model),
    TrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=args.learning_rate, save_strategy="no", logging_steps=20
    ),
    train_dataset=data["train"],
    eval_dataset=data[args.test],
    data_collator=DefaultDataCollator(),  # padded to one length: packing takes the padding out again
    processing_class=tokenizer,
    compute_metrics=exact,
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.6))],
)
trainer.train()
scores = trainer.evaluate()  # before saving, so that the model card knows
trainer.save_model(args.output)
print(f"exact {scores['eval_exact']:.3f} at {scores['eval_macs_realised']:.2f} of the dense model's MACs: {args.output}")
