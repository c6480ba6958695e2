"""The slow, obviously right way to prune: nothing is removed, dropped tokens are masked.

The dense model runs with eager attention on sequences of one length, without padding. Hooks mask the dead tokens as keys,
freeze their hidden state at what it was when they entered the layer that dropped them, and decide at each site who dies.
Nothing here knows the package.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

DEPTH = 4  # layers of every model in families.py
SHOWS = {"output_attentions": True}
OWN_ATTENTION = {"mpnet": SHOWS, "deberta-v2": SHOWS}  # these show their probabilities to nobody who does not ask


@dataclass(frozen=True)
class Rule:
    """What a selector promises: of `n` droppable tokens, does the one ranked `rank` (from 0) stay?

    Args:
        stays: `(rank, n) -> bool`.
        summary: so many leading tokens are never dropped; below 0, so many last ones.
        protected_ids: nor are tokens with these ids.
    """

    stays: callable
    summary: int = 1
    protected_ids: tuple[int, ...] = ()


def share(keep):
    return lambda rank, n: (rank + 0.5) / n < keep


def number(keep):
    return lambda rank, _: rank < keep


def bins(kept):
    return lambda rank, n: kept[(2 * rank + 1) * len(kept) // (2 * n)]


class Reference:
    """A dense model, pruned by masking.

    Args:
        model: the dense model, set to eager attention.
        sites: `{layer: Rule}`.
        causal: importance is relative to what a token would get if all who see it looked at everything they see alike.

    Attributes:
        alive: after a call, `(rows, length)` bool per layer: who is left after it.
    """

    def __init__(self, model, sites, causal=False):
        self.model, self.sites, self.causal, self.alive = model, sites, causal, []
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        self.layers = next((m for m in lists if len(m) == DEPTH), lists[-1])  # ALBERT calls the same one over and over

    def __call__(self, inputs):
        """The model's output for sequences of one length, given without padding."""
        self.ids = inputs.get("input_ids")
        self.alive = []
        self.model.config.use_cache = False  # causal models fill one otherwise, and count it as an output
        self.number = 0
        with torch.no_grad(), self._hooked():
            output = self.model(**inputs, **OWN_ATTENTION.get(self.model.config.model_type, {}))
        return type(output)(**{key: value for key, value in output.items() if key != "attentions"})

    @contextmanager
    def _hooked(self):
        handles = []
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles += [module.register_forward_hook(self._look) for module in layer.modules() if module is not layer]
            handles.append(layer.register_forward_hook(self._after, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _, args, kwargs):
        """Add to the layer's mask (a sliding window, or nothing) that nobody may look at the dead."""
        self.entered = args[0]
        rows, length = self.entered.shape[:2]
        if not self.alive:
            self.alive.append(torch.ones(rows, length, dtype=torch.bool))
        lowest = torch.finfo(self.entered.dtype).min
        mask = torch.zeros(rows, 1, length, length, dtype=self.entered.dtype)
        mask = mask.masked_fill(~self.alive[-1][:, None, None, :], lowest)
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        boolean = self.model.config.model_type == "deberta-v2"
        mask = mask if given is None or boolean else torch.minimum(mask, given)
        self.seen = mask == 0
        mask = self.seen.expand(-1, -1, length, -1) if boolean else mask
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _look(self, _, __, output):
        """Remember the attention probabilities `(rows, heads, queries, keys)`, whichever module returns them."""
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], torch.Tensor) and output[1].ndim == 4:
            self.attention = output[1]

    def _after(self, _, __, output):
        alive = self.alive[-1].clone()
        if self.number in self.sites:
            for row in range(len(alive)):
                alive[row] = self._survivors(self.sites[self.number], row, alive[row])
        self.number += 1
        self.alive.append(alive)
        states = output[0] if isinstance(output, tuple) else output
        states = torch.where(alive[..., None], states, self.entered)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _survivors(self, rule, row, alive):
        living = alive.nonzero().flatten().tolist()
        received, protected = self._received(row, living), self._protected(rule, row, living)
        droppable = sorted((i for i in living if i not in protected), key=lambda i: -received[i])
        stay = {i for rank, i in enumerate(droppable) if rule.stays(rank, len(droppable)) or (rank == 0 and not protected)}
        return torch.tensor([i in stay or i in protected for i in range(alive.shape[0])])

    def _received(self, row, living):
        """The attention that each token of a row gets from the living."""
        received = self.attention[row][:, living].mean((0, 1))
        if self.causal:
            for key in living:
                sees = [self.seen[row, 0, query].sum() for query in living if self.seen[row, 0, query, key]]
                received[key] /= sum(1 / count for count in sees)
        return received

    def _protected(self, rule, row, living):
        ids = self.ids.reshape(-1, self.entered.shape[1])[row].tolist() if rule.protected_ids else None
        kept = living[rule.summary :] if rule.summary < 0 else range(rule.summary)
        return [i for i in living if i in kept or (ids and ids[i] in rule.protected_ids)]


def samples_of(inputs):
    """A right-padded batch -> each sample as a batch of its own, without padding."""
    mask = inputs.get("attention_mask")
    for row in range(len(next(iter(inputs.values())))):
        sample = {key: value[row : row + 1] for key, value in inputs.items()}
        if mask is not None:
            length = int(mask[row].reshape(-1, mask.shape[-1])[0].sum())
            sample = {key: value[..., :length] for key, value in sample.items()}
        yield sample
