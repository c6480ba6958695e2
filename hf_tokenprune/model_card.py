"""Model cards of token-pruned models, written from data: what lies in the folder, and what was measured.

All that is ours in the text lies between two marks, of which the first holds a fingerprint of it; `readme.py` is why.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from .errors import ConfigError
from .loading import refuse_adapter
from .methods import METHODS, ToP
from .modeling.pruning_config import read_config
from .results import told_busy

FILE = "README.md"
PLOT = "tokens_per_layer.png"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
DATA = "token_pruning_results"  # the evaluation, among the metadata of a card, from which it can be written anew
SECTION = re.compile(
    r"<!-- hf_tokenprune: begin ?(?P<print>\w*) ?(?P<rest>\w*) ?(?P<edited>\w*) -->(?P<text>.*?)<!-- hf_tokenprune: end -->",
    re.S,
)
TAGS = ("token-pruning", "custom_code", "structured-pruning")  # the last where weights were cut
SENTENCE_CLASSES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
KNOWN = {kind.name: kind for kind in METHODS}


def make_card(
    config: Mapping,
    code: Mapping[str, bytes],
    evaluation: Mapping | None = None,
    *,
    name: str,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    license: str | None = None,
    plot: str | None = None,
    sentence_class: str | None = None,
) -> ModelCard:
    """A model card for a token-pruned model.

    Args:
        config: its `config.json`.
        code: the files that travel with it, by name.
        evaluation: what was measured, see `results.py`.
        name: the title, and the model's name in the `model-index`.
        repo_id: where it is to be found on the Hub; by default the examples speak of a folder of that name.
        base_model: the id of the model it was fine-tuned from, or the ids of several.
        license: of the weights, as the Hub names it, such as "apache-2.0".
        plot: a picture that lies beside it.
        sentence_class: the class of sentence-transformers that opens it, see `sentence_class_of`; None = transformers does.

    Raises:
        ConfigError: the config is not that of a token-pruned model.
    """
    pruning = read_config(config.get("token_pruning"))
    evaluation = dict(evaluation or {})
    architecture = (config.get("architectures") or ["PreTrainedModel"])[0]
    tags = [*TAGS[:2], *TAGS[2:] * bool(pruning.get("shapes"))]
    pipeline = _pipeline_of(architecture)
    bases = as_list(base_model)
    known = {name: value for name, value in (("pipeline_tag", pipeline), (DATA, evaluation)) if value}
    data = ModelCardData(
        base_model=base_model,
        library_name="sentence-transformers" if sentence_class else "transformers",
        license=license,
        tags=tags,
        model_name=name,
        eval_results=_eval_results(evaluation, pipeline),
        **known,
    )
    if data.eval_results is None:
        del data.model_name  # which is of use in a model-index only
    latency = evaluation.get("latency")
    parts = {
        "name": name,
        "loading": _loading(sentence_class, next(iter(config.get("auto_map") or {}), "AutoModel"), repo_id or name),
        "summary": _summary(architecture, pruning, evaluation, bases),
        "rows": _rows(evaluation),
        "tokens": f"on {evaluation['tokens']:.0f} tokens per text" if "tokens" in evaluation else "on the evaluation data",
        "max_length": f"{evaluation['max_length']} tokens" if "max_length" in evaluation else None,
        "kept": [f"{share:.0%}" for share in evaluation.get("kept", ())],
        "plot": plot if evaluation.get("kept") else None,
        "made": _made(pruning, evaluation.get("kept", ())),
        "settings": json.dumps(pruning["method"], indent=2) if pruning.get("method") else None,
        "plain": _plain(pruning),
        "hashes": "\n".join(f"{hashlib.sha256(content).hexdigest()}  {file}" for file, content in sorted(code.items())),
        "licence": f"The weights: {license}."
        if license
        else f"The weights follow the licence of {', '.join(bases) or 'their base model'}.",
        **(_times(latency) if latency else {}),
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **parts)
    section = SECTION.search(card.text)
    card.text = card.text.replace("begin -->", f"begin {fingerprint(section['text'])} -->", 1)
    return card


def read_folder(folder: Path) -> dict:
    """The config of a saved token-pruned model.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        if Path(folder).is_dir():
            refuse_adapter(folder)
        raise ConfigError(f"{folder} holds no model: there is no config.json that can be read.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}.") from None
    if not isinstance(config, dict) or config.get("token_pruning") is None:
        raise ConfigError(f"{folder} holds no token-pruned model: its config.json has no token_pruning.")
    read_config(config["token_pruning"])
    return config


def code_of(folder: Path) -> dict[str, bytes]:
    """The code that lies in a folder, but for the script that DeepSpeed leaves beside its checkpoints."""
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.py")) if file.name != "zero_to_fp32.py"}


def sentence_class_of(folder: Path) -> str | None:
    """The class of sentence-transformers that a folder was saved by, None if it is a model of transformers alone."""
    try:
        found = json.loads((Path(folder) / "config_sentence_transformers.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found in SENTENCE_CLASSES else None


def draw(evaluation: Mapping) -> bytes | None:
    """A PNG of the share of tokens that leaves each layer; None without these numbers, or without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    import io

    kept = evaluation.get("kept")
    if not kept:
        return None
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(kept)), [100 * share for share in kept])
    axes.set(xlabel="layer", ylabel="tokens that leave it (%)", ylim=(0, 105), xticks=range(len(kept)))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, metadata={"Software": None})  # the same numbers make the same file
    return buffer.getvalue()


def name_of(place: str | os.PathLike) -> str:
    """What a model is called that lies in a folder or repository."""
    path = Path(place).absolute()
    return path.parent.name if re.fullmatch(r"checkpoint-\d+", path.name) else path.name


def base_of(name: str | None) -> str | list[str] | None:
    """The id on the Hub (or ids) of what a model was loaded from, if that can be told from `config.name_or_path`."""
    if not name:
        return None
    if os.path.isdir(name):
        file = Path(name) / FILE
        if not file.is_file():
            return None
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.base_model
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name) else None


def as_list(value) -> list:
    """An entry of the metadata that is one thing, several, or missing."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None or value == "" else [value]


def has_our_index(data: Mapping) -> bool:
    """Is the `model-index` in the metadata of a card what `make_card` made of the evaluation there, or empty?"""
    found = [result for model in data.get("model-index") or () for result in model.get("results") or ()]
    evaluation = data.get(DATA)
    if not found or not isinstance(evaluation, Mapping) or "metric" not in evaluation:
        return not found
    made = ModelCardData(model_name="any", eval_results=_eval_results(evaluation, None)).to_dict().get("model-index")
    # The task that it names is told by the model's class, which may be another by now.
    return made is not None and [{**result, "task": None} for result in found] == [{**made[0]["results"][0], "task": None}]


def fingerprint(text: str) -> str:
    """Of the text between the marks; space at the end of lines does not count."""
    return hashlib.sha256("\n".join(line.rstrip() for line in text.strip().splitlines()).encode()).hexdigest()[:16]


def _pipeline_of(architecture):
    for task, classes in TASK_MAPPING.items():
        for names in classes.values():
            if architecture == names or (isinstance(names, (tuple, list)) and architecture in names):
                return task
    return None


def _eval_results(evaluation, pipeline):
    if "score" not in evaluation:
        return None
    task = evaluation.get("task")
    return [
        EvalResult(
            task_type=pipeline or "feature-extraction",
            dataset_type=task or "unknown",
            dataset_name=task or "Unknown",
            dataset_split=evaluation.get("split"),
            metric_type=evaluation["metric"],
            metric_name=evaluation["metric"],
            metric_value=evaluation["score"],
        )
    ]


def _summary(architecture, pruning, evaluation, bases):
    links = ", ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    what = f"A `{architecture}`" + (f", fine-tuned from {links}," if links else "")
    reduction = evaluation.get("reduction", {}).get("true_length")
    spends = f": {reduction:.2f} times fewer MACs than the dense model on the same texts" if reduction else ""
    target = (pruning.get("method") or {}).get("target_macs")
    if reduction and reduction > 1.05 and isinstance(target, float) and 0 < 1.05 * target * reduction < 1:
        spends += f", where {1 / target:.2f} times were asked for"
    does = ["reads fewer tokens layer by layer"] * bool(pruning["sites"]) + ["has fewer weights"] * bool(pruning.get("shapes"))
    return f"{what} that {' and '.join(does) or 'does no work on padding'}{spends}. Made with `hf_tokenprune`."


def _rows(evaluation):
    rows = []
    if "score" in evaluation or "dense_score" in evaluation:
        on = ", ".join(evaluation[name] for name in ("task", "split") if name in evaluation)
        scores = [f"{evaluation[n]:.4f}" if n in evaluation else "not known" for n in ("dense_score", "score")]
        rows.append([evaluation["metric"] + (f" ({on})" if on else ""), *scores])
    reduction = evaluation.get("reduction", {})
    for kind, title in (("true_length", "true length"), ("padded", "padded")) if reduction else ():
        value = f"{reduction[kind]:.2f} x" if kind in reduction else "not measured"
        rows.append([f"MACs reduction, {title}", "1 x", value])
    return rows


def _times(latency):
    ms = {int(size): times for size, times in latency["ms"].items()}
    contenders = list(next(iter(ms.values())))
    threads = latency["threads"]
    return {
        "latency": [(size, [f"{times[name]:.2f}" for name in contenders]) for size, times in ms.items()],
        "contenders": contenders,
        "machine": f"{latency['machine']} ({threads} thread{'s' * (threads != 1)}, {latency['dtype']})"
        + (f", {latency['texts']} texts" if "texts" in latency else ""),
        "busy": told_busy(latency.get("load_average")),
    }


def _made(pruning, kept):
    settings, shapes = pruning.get("method") or {}, pruning.get("shapes")
    known = KNOWN.get(settings.get("name"))
    if known:
        papers = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in known.papers)
        said = [f"Method: {known.title} ({papers}).{_unlike_top(settings)}"]
    else:
        said = [f"Method: {settings.get('name')}." if settings else "Without training."]
    sites = [site["layer"] for site in pruning["sites"]]
    layers = ", ".join(map(str, sites))
    said.append(f"Tokens are dropped in layers {layers} (counted from 0)." if sites else "No layer drops tokens.")
    if len(kept) - 1 not in sites and min(kept, default=1) < min(kept[:-1], default=1):
        said.append("The last layer computes only the token that the head reads.")
    if shapes:
        heads, units = (", ".join(str(layer[part]) for layer in shapes["layers"]) for part in ("heads", "units"))
        said.append(
            f"Weights were cut. What is left: hidden size {shapes['hidden']}, attention heads {heads}, FFN units {units}."
        )
    return " ".join(said)


def _unlike_top(settings):
    """In what a ToP is not its paper's."""
    own = settings.get("tokens", settings)
    if own.get("name") != ToP.name:
        return ""
    other = [
        said
        for said, is_so in (
            ("importance is learned, not the attention received", own.get("importance") == "learned"),
            ("its ranking is not distilled", not own.get("rank_weight")),
            ("the budget is held by projection, not by a Lagrangian", settings.get("constraint") == "projected"),
        )
        if is_so
    ]
    return f" Other than in the paper of ToP: {'; '.join(other)}." if other else ""


def _loading(sentence_class, auto_class, where):
    """What opens the model by the code that lies beside it, and what opens it without."""
    if sentence_class is None:
        theirs = (
            f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{where}", trust_remote_code=True)'
        )
        return theirs, f'import hf_tokenprune\n\nmodel = hf_tokenprune.from_pretrained("{where}")'
    load = f"from sentence_transformers import {sentence_class}\n"
    kind = "" if sentence_class == SENTENCE_CLASSES[0] else f", {sentence_class}"
    return (
        f'{load}\nmodel = {sentence_class}("{where}", trust_remote_code=True)',
        f"import hf_tokenprune\n{load if kind else ''}\n"
        f'model = hf_tokenprune.sentence_transformers.from_pretrained("{where}"{kind})',
    )


def _plain(pruning):
    without = "Without `trust_remote_code`, or by the Auto class of another head than the saved one,"
    if not pruning.get("shapes"):
        return (
            f"{without} the same call gives the plain class with the same weights, which reads all tokens; what it says is not quite "
            "the same."
        )
    if pruning["shapes"]["dense"] and not pruning["shapes"]["restore"]:  # a plain config says what is left
        return f"{without} the same call gives the plain, smaller model, which reads all tokens."
    return f"{without} transformers refuses these weights: no plain config can say what was cut."
