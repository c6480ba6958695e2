"""A Trainer that judges answers as text; `question_answering.py` imports it from its own folder."""

from transformers import Trainer


class QuestionAnsweringTrainer(Trainer):
    def __init__(self, *args, eval_examples=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        output = self.predict(dataset, ignore_keys, metric_key_prefix)
        starts, ends = (logits.argmax(-1) for logits in output.predictions)
        right = 0
        for example, ids, start, end in zip(self.eval_examples, dataset["input_ids"], starts, ends, strict=True):
            right += self.processing_class.decode(ids[start : end + 1]) == example["answers"]["text"][0]
        return {**output.metrics, f"{metric_key_prefix}_exact_match": right / len(dataset)}
