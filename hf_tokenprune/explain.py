"""How deep each token of one text lives, in a terminal."""

import os

from rich.text import Text

from .depth import legend
from .modeling.modeling_token_pruned import pack
from .reporting.samples import Texts
from .reporting.shades import shades
from .subject import open_model

BAR = 40
SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def explain(
    folder: str | os.PathLike, text: str | tuple[str, str], *, max_length: int | None = None, ascii_only: bool = False
) -> Text:
    """Run a saved model on a text (or a pair), and draw each token in the colour of its depth, for `rich.print`.

    Each token bears its depth as a number, too, so that nobody depends on colours. A dense model is looked at as `pack` would make
    it.

    Args:
        folder: a folder with a model and its tokenizer.
        text: a string, or two for a model that reads pairs.
        max_length: as in `report`.
        ascii_only: use no letter that is not in ASCII.

    Raises:
        ConfigError: the folder lacks the model or the tokenizer, or `max_length` makes no sense.
        UnsupportedModelError: the model cannot be packed, or does not read one sequence of text at a time.
    """
    model = pack(open_model(folder).eval())
    found, (tokens,) = next(Texts(model, [text], os.fspath(folder), max_length).depths())
    papers, inks = zip(*shades(found.layers + 1), strict=True)
    drawn = Text()
    for token in tokens:
        drawn.append("" if not drawn or (token.joined and not ascii_only) else " ")
        words = "".join(letter if letter.isprintable() else "?" for letter in token.text)  # nothing that moves the cursor
        if ascii_only:
            words = words.encode("ascii", "backslashreplace").decode() + f"/{token.depth}"
        else:
            words += str(token.depth).translate(SMALL)
        drawn.append(words, f"{inks[token.depth]} on {papers[token.depth]}")
    drawn.append("\n\n")
    if not len(model.token_pruner.sites):
        drawn.append("This model drops no tokens. ")
    drawn.append(legend(found.layers, found.last_reads_pooled) + "\n")
    for layer, left in enumerate(found.tokens_per_layer):
        drawn.append(f"\nlayer {layer:<2} {left:4.0f} of {len(tokens)} tokens leave it  ")
        drawn.append("#" * round(BAR * left / len(tokens)), papers[layer + 1])
    return drawn
