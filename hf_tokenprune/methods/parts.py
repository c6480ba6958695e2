"""What budgeted gates are on: tokens, weights; and what is known of the budget when one part is looked at."""

import torch


class Outlook:
    """What is expected to be left: of the tokens at each site, of each layer's weights.

    Attributes:
        kept: by site, the share of its droppable tokens that survive.
        costs: a `LayerCost` per layer, or None if weights are not gated.
        alive: by layer, how far its attention is there (1 = it is); a site without attention cannot rank and keeps all.
    """

    def __init__(self):
        self.kept, self.costs, self.alive = {}, None, {}


class Part:
    """Something that is gated. `size` gates, at `shifted` of which the budget may push.

    `scores` and `expect` also take many sets of gates at once, along leading dimensions.
    """

    size: int
    cuts_weights = False
    if_missed = ""  # what to do where the finished choice spends more than was asked for
    lasting = 0.0  # nepers by which it is worth more, beside other parts, than the information that is measured of it

    def start(self):
        """`(size,)` log-odds with which the gates start."""
        raise NotImplementedError

    def shifted(self):
        """`(size,)` bool: the gates that move with the budget."""
        return torch.ones(self.size, dtype=torch.bool)

    def scores(self, probability):
        """From the probabilities that gates are open, how probable it is that each thing gated by them is kept."""
        return probability

    def score_log_odds(self, log_odds):
        """The log-odds of `scores`, from those that gates are open."""
        return log_odds

    def tie_break(self):
        """A little to add to the scores where equal ones have an order all the same."""
        return 0.0

    def even_out(self, information):
        """`(size,)` measured information, where it is known how it must run."""
        return information

    def worth(self):
        """What to add to the logarithm of measured information: how much more a thing is worth by the time its turn comes."""
        return torch.zeros(self.size)

    def choose(self, scores, level):
        """`(scores,)` bool: what is kept if all is to be kept whose score reaches a level."""
        return scores >= level

    def expect(self, scores, outlook):
        """Enter into the outlook what is left if each thing is kept with these probabilities."""
        raise NotImplementedError

    def open(self, gates, alive):
        """Put sampled gates in force for one forward. Returns what `Outlook.alive` says of them."""
        raise NotImplementedError

    def close(self):
        """Take them out of force."""

    def harden(self, kept, alive):
        """Put in force, for evaluation, what is kept: `(scores,)` bool. Returns as `open`."""
        raise NotImplementedError
