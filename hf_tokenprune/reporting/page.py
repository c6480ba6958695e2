"""The page of a report: HTML without scripts that loads nothing. Whatever comes from outside goes through `escape`."""

from html import escape
from importlib import resources
from string import Template

from ..depth import Grid
from ..results import told_busy
from .plots import inline
from .shades import shades


def render(report) -> str:
    """The whole page."""
    count = len(report.model.macs) + 1
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    drawn = inline(report)
    sections = [_facts(report), _layers(report, drawn), _training(drawn), _scores(drawn), _samples(report), _method(report)]
    return template.substitute(
        title=escape(report.name),
        subtitle=escape(_subtitle(report)),
        shades=_styles(count, dark=False),
        dark_shades=_styles(count, dark=True),
        body="\n".join(section for section in sections if section),
    )


def _styles(count, dark):
    colours = enumerate(shades(count, dark=dark))
    return "\n".join(f".d{depth} {{ background: {paper}; color: {ink}; }}" for depth, (paper, ink) in colours)


def _subtitle(report):
    what = []
    if report.pruned:
        what.append("drops tokens")
    if report.was_cut:
        what.append("was cut")
    samples = "images" if report.max_length is None else "texts"
    does = " and ".join(what) or "drops no tokens and was never cut: every token lives to the end"
    return f"{report.model_class}, {len(report.model.macs)} layers; {does}. Looked at on {len(report.samples)} {samples}."


def _facts(report):
    cost = report.cost
    facts = [(f"{cost.true_length_reduction:.2f} x", "fewer MACs than the dense model on the real tokens")]
    if report.max_length is not None:
        facts.append(
            (f"{cost.padded_reduction:.2f} x", f"fewer MACs than the dense model padded to {report.max_length} tokens")
        )
    if report.pruned or report.was_cut:
        faster = report.dense.total_ms / report.model.total_ms
        facts.append((f"{faster:.2f} x", f"as fast as the packed dense model, {report.machine['timed']} samples in a batch"))
    last = cost.tokens_per_layer[-2] if len(cost.tokens_per_layer) > 1 else cost.tokens
    facts.append((f"{last:.1f}", f"of {cost.tokens:.1f} tokens per sample reach the last layer"))
    if report.was_cut:
        share = 100 * report.model.parameters / report.dense.parameters
        facts.append((f"{share:.0f} %", f"of {report.dense.parameters / 1e6:.1f} million parameters are left"))
    items = "".join(f"<div><dt>{escape(text)}</dt><dd>{escape(number)}</dd></div>" for number, text in facts)
    return f'<dl class="facts">{items}</dl>'


def _figures(drawn, names):
    found = [
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
        for name, (title, svg) in drawn.items()
        if name in names
    ]
    return f'<div class="plots">{"".join(found)}</div>' if found else ""


def _layers(report, drawn):
    return "\n".join(
        (
            "<h2>Layer by layer</h2>",
            _figures(drawn, ("tokens", "macs", "milliseconds", "weights")),
            _layer_table(report),
        )
    )


def _layer_table(report):
    """One row per layer of the dense model if it is known which became which, else one per layer of the model."""
    both, model, dense = report.pruned or report.was_cut, report.model, report.dense
    origins = report.origins or range(len(model.macs))
    rows = []
    for place in range(len(dense.macs) if report.origins else len(model.macs)):
        mine = origins.index(place) if place in origins else None
        cells = ["-" if mine is None else f"{report.cost.tokens_per_layer[mine]:.1f}"]
        known = report.origins is not None
        cells += _pair(model.macs, dense.macs, mine, place if known else None, both, lambda macs: f"{macs / 1e6:.2f}")
        cells += _pair(model.ms, dense.ms, mine, place if known else None, both, lambda ms: f"{ms:.2f}")
        if report.was_cut:
            for name in ("heads", "units"):
                left = 0 if mine is None else getattr(model, name)[mine]
                cells.append(f"{left} of {getattr(dense, name)[place]}" if known else str(left))
        rows.append((str(place), cells))
    head = ["layer", "tokens that leave"]
    contenders = ["packed dense", "this model"] if both else ["this model"]
    head += [f"million MACs, {name}" for name in contenders] + [f"ms, {name}" for name in contenders]
    rest = [
        "embeddings and head",
        [""] + [""] * len(contenders) + [f"{c.rest_ms:.2f}" for c in ((dense, model) if both else (model,))],
    ]
    sums = ["all", [""]]
    for value in (lambda c: f"{sum(c.macs) / 1e6:.2f}", lambda c: f"{c.total_ms:.2f}"):
        sums[1] += [value(c) for c in ((dense, model) if both else (model,))]
    if report.was_cut:
        head += ["heads left", "FFN units left"]
        rest[1] += ["", ""]
        sums[1] += [f"{sum(model.heads)} of {sum(dense.heads)}", f"{sum(model.units)} of {sum(dense.units)}"]
    hidden = f"<p>{model.hidden} of {dense.hidden} hidden units are left.</p>" if report.was_cut else ""
    return (
        f'<div class="scroll" role="region" aria-label="Layer by layer" tabindex="0"><table><thead>{_row(head, "th", "col")}</thead>'
        f"<tbody>{''.join(_row([name, *cells]) for name, cells in rows)}</tbody>"
        f"<tfoot>{_row([rest[0], *rest[1]])}{_row([sums[0], *sums[1]])}</tfoot></table></div>{hidden}"
    )


def _pair(mine, dense, number, place, both, form):
    ours = "-" if number is None else form(mine[number])
    if not both:
        return [ours]
    return ["" if place is None else form(dense[place]), ours]


def _row(cells, tag="td", scope="row"):
    first, *rest = (escape(cell) for cell in cells)
    return f'<tr><th scope="{scope}">{first}</th>' + "".join(f"<{tag}>{cell}</{tag}>" for cell in rest) + "</tr>"


def _training(drawn):
    figures = _figures(drawn, ("budget", "training"))
    return f"<h2>Over training</h2>\n{figures}" if figures else ""


def _scores(drawn):
    figures = _figures(drawn, [name for name in drawn if name.startswith("score-")])
    return f"<h2>Score against MACs</h2>\n{figures}" if figures else ""


def _samples(report):
    grids = isinstance(report.samples[0], Grid)
    layers = len(report.model.macs)
    steps = "".join(f"<li><b class=d{depth}>{_step(depth, layers)}<sub>{depth}</sub></b></li>" for depth in range(layers + 1))
    shown = "".join(map(_grid if grids else _text, report.samples))
    listed = f'<ul class="images">{shown}</ul>' if grids else f'<ol class="texts">{shown}</ol>'
    title = "How deep each patch lives" if grids else "How deep each token lives"
    return f'<h2>{title}</h2>\n<p>{escape(report.legend)}</p>\n<ul class="strip">{steps}</ul>\n{listed}'


def _step(depth, layers):
    return "to the end" if depth == layers else f"layer {depth}"


def _text(tokens):
    parts = []
    for token in tokens:
        kind = f'"d{token.depth} special"' if token.special else f"d{token.depth}"
        space = "<wbr>" if token.joined else " "
        parts.append(f"{space}<b class={kind}>{escape(token.text)}<sub>{token.depth}</sub></b>")
    return f"<li>{''.join(parts).strip()}</li>\n"


def _grid(grid):
    rows = ("".join(f"<td class=d{depth}>{depth}" for depth in row) for row in grid.rows)
    return f'<li><table class="grid">{"".join(f"<tr>{row}</tr>" for row in rows)}</table></li>\n'


def _method(report):
    machine, versions = report.machine, report.machine["versions"]
    lines = [
        f"MACs are means over all samples. Milliseconds are per sample, on the first {machine['timed']} as one batch: medians of "
        f"{machine['repeats']} repeats after a first pass, {machine['processor']}, {machine['threads']} threads, {machine['dtype']}."
    ]
    if busy := told_busy(machine["load_average"]):
        lines.append(busy)
    if report.pruned or report.was_cut:
        lines.append(
            "Dense is the model before anything was cut, packed: no work on padding, nothing dropped. Of a model whose weights "
            "were cut it has random weights, which does not change the time."
        )
    lines.append(
        f"Made by hf_tokenprune {versions['hf_tokenprune']} with torch {versions['torch']}, transformers {versions['transformers']}."
    )
    return "<h2>How this was measured</h2>\n" + "\n".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)
