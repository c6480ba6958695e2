"""Sentence embeddings that read fewer tokens: sentence-transformers' own trainer, and the same callback.

    python examples/embeddings.py                                         # tiny and offline
    python examples/embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 --data my_triplets

`my_triplets` holds train and test files (jsonl, parquet, ...) with the columns query, positive and negative.
"""

import tiny
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import hf_tokenprune as tp

args = tiny.arguments(__doc__, "pairs")
data = load_dataset(*args.data).select_columns(["query", "positive", "negative"])
model = SentenceTransformer(args.model, device="cpu")

trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=args.learning_rate, save_strategy="no", logging_steps=20
    ),
    train_dataset=data["train"],
    loss=MultipleNegativesRankingLoss(model),
    callbacks=[tp.TokenPruneCallback(tp.ToP(target_macs=0.5))],
)
trainer.train()
model.save_pretrained(args.output)

# The folder is opened by the code in it; hf_tokenprune is not needed from here on.
model = SentenceTransformer(args.output, trust_remote_code=True, device="cpu")
query, positive, negative = (model.encode(data["test"][name], convert_to_tensor=True) for name in data["test"].column_names)
right = model.similarity_pairwise(query, positive) > model.similarity_pairwise(query, negative)
print(f"{right.float().mean():.3f} of the positives are nearer to their query than the negatives: {args.output}")
