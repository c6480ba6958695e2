"""What is compared, by name. Every method starts from the same dense model of its task and seed, which is also its teacher.

`topk` keeps one and the same share of the tokens in every layer that may drop some, without training; `topk-trained` trains the
weights with exactly that selection. The rest learn what to drop or to cut.

`dense-longer` is the control: nothing goes, and all else is as for the others. They train on for some more epochs, with the dense
model for a teacher; what that alone gives is not pruning's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dense import arguments
from torch.nn import functional
from transformers import DataCollatorWithPadding, Trainer, set_seed

import hf_tokenprune as tp
from hf_tokenprune.budget import Budget, Lengths

PHASES = tp.Schedule(dense=0, anneal=1, settle=1)
TEMPERATURE = 2.0


def structured(budget, teacher):
    return tp.StructuredPruning(target_macs=budget, teacher=teacher, schedule=PHASES)


def dense_longer(_, teacher):
    """As `structured`, with a budget that a packed model meets with everything left (but for 0.1 %, where all tokens are read)."""
    return structured(0.999, teacher)


def top(budget, teacher):
    """As it is by default: importance is learned, from each token and its neighbours."""
    return tp.ToP(target_macs=budget, teacher=teacher, schedule=PHASES)


def top_alone(budget, teacher):
    """Learned from each token alone."""
    return tp.ToP(target_macs=budget, teacher=teacher, schedule=PHASES, neighbours=0)


def top_attention(budget, teacher):
    """The paper's importance, attention received."""
    return tp.ToP(target_macs=budget, teacher=teacher, schedule=PHASES, importance="attention")


def top_ranking(budget, teacher):
    """The paper's importance and its ranking, distilled; the budget is held as by default."""
    return tp.ToP(target_macs=budget, teacher=teacher, schedule=PHASES, importance="attention", rank_weight=1.0)


def top_lagrangian(budget, teacher):
    """As by default, but for the paper's way to hold the budget: gates of whole sites, a Lagrangian."""
    return tp.ToP(target_macs=budget, teacher=teacher, schedule=PHASES, site_gates=True, constraint="lagrangian")


def top_paper(budget, teacher):
    """All as in the paper, but for the number of steps: importance, its ranking distilled, gates of whole sites, a Lagrangian."""
    return tp.ToP(
        target_macs=budget, teacher=teacher, schedule=PHASES, importance="attention", rank_weight=1.0, site_gates=True,
        constraint="lagrangian", layer_weight=0.0,
    )  # fmt: skip


def both(budget, teacher):
    return tp.Compose(tp.StructuredPruning(), tp.ToP(), target_macs=budget, teacher=teacher, schedule=PHASES)


def infor_coef(budget, teacher):
    """Nearly all is saved by weights, and the longest phase is the one in which the model recovers: on the held-out split of STS-B
    that costs nothing at 4 times fewer MACs."""
    phases = tp.Schedule(dense=0, static=2, anneal=0.75, settle=2.25)
    return tp.InforCoef(static_macs=budget**0.95, target_macs=budget, teacher=teacher, schedule=phases)


@dataclass(frozen=True)
class Method:
    """How to get to a budget: by a method of the package, or (None) by a fixed share of the tokens per layer."""

    learned: Callable | None = None
    trained: bool = True


METHODS = {
    "dense-longer": Method(dense_longer),
    "topk": Method(trained=False),
    "topk-trained": Method(),
    "top": Method(top),
    "top-alone": Method(top_alone),
    "top-attention": Method(top_attention),
    "top-ranking": Method(top_ranking),
    "top-lagrangian": Method(top_lagrangian),
    "top-paper": Method(top_paper),
    "structured": Method(structured),
    "structured+top": Method(both),
    "infor-coef": Method(infor_coef),
}


def prune(method, task, splits, tokenizer, *, budget, teacher, work, learning_rate, epochs, batch_size, seed):
    """A pruned model from the dense one in the folder `teacher`.

    Returns:
        `(model, settings, training)`: JSON values that say how it was made, and what the training was (None without one).

    Raises:
        hf_tokenprune.errors.ConfigError: the budget is out of this method's reach.
    """
    set_seed(seed)
    model = task.model(teacher)
    train = task.encode(tokenizer, splits["train"])
    callbacks, distils = [], None
    if method.learned:
        config = method.learned(budget, str(teacher))
        callbacks, settings = [tp.TokenPruneCallback(config)], config.settings()
    else:
        share = attach_fixed(model, [len(feature["input_ids"]) for feature in train.features], budget)
        settings = {"name": "top_k", "target_macs": budget, "keep": share, "sites": sorted(map(int, model.token_pruner.sites))}
        distils = tp.pack(task.model(teacher)).eval().requires_grad_(False)
    if not method.trained:
        return model, settings, None
    trainer = Distilling(
        model,
        arguments(work, learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed),
        train_dataset=train.features,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=callbacks,
    )
    trainer.teacher = distils and distils.to(model.device)
    started = time.perf_counter()
    trainer.train()
    training = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "train_rows": len(splits["train"]),
        "seconds": time.perf_counter() - started,
        "log": trainer.state.log_history,
    }
    made = (getattr(model.config, "token_pruning", None) or {}).get("method")  # with what was left open
    return model, made or settings, training


def attach_fixed(model, lengths, budget):
    """Keep the same share of tokens at every site, such that texts of these lengths spend the budget. Returns the share."""
    tp.pack(model)
    sites = [site for site in model.token_pruner.possible_sites() if site]
    formula = Budget(model, sites=sites)
    seen = Lengths.of(lengths, formula.protected)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if formula.share([middle] * len(sites), seen) > budget:
            high = middle
        else:
            low = middle
    if low == 0:
        raise tp.errors.ConfigError(f"TopK cannot reach {budget}: with nothing kept, more of the dense model's MACs are left.")
    tp.attach(model, {site: tp.TopK(low) for site in sites})
    return low


class Distilling(Trainer):
    """A Trainer that pulls the logits towards a teacher's, if it has one; the package's methods bring their own distillation."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        questions = {k: v for k, v in inputs.items() if k not in ("labels", "start_positions", "end_positions")}
        with torch.no_grad():
            taught = self.teacher(**questions)
        names = [name for name in taught if name.endswith("logits")]
        loss = outputs.loss + sum(distance(outputs[name], taught[name]) for name in names) / len(names)
        return (loss, outputs) if return_outputs else loss


def distance(student, teacher):
    """How far logits are from the teacher's: KL divergence of softened probabilities, squared difference for a single output."""
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return functional.mse_loss(student, teacher)
    student, teacher = (functional.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * TEMPERATURE**2
