"""The page that shows a model, and the terminal's version of it. No test looks at a real time."""

import json
import os
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch
import transformers as hf
from families import build
from test_bench import SENTENCES, make_tokenizer, pruned_model, save
from training_helpers import top, trainer_for

import hf_tokenprune as tp
from hf_tokenprune import cli, cost
from hf_tokenprune.explain import explain
from hf_tokenprune.modeling.modeling_token_pruned import resize
from hf_tokenprune.reporting import collect, timing
from hf_tokenprune.reporting.shades import contrast, shades

VOID = {"meta", "br", "wbr", "link", "img"}
EVIL = '<script>alert("1")</script> & <b onclick=x>'


class Page(HTMLParser):
    """The elements of a page: what opens is closed, and tables by their cells."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.rows, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open[-1] in ("tr", "td") and tag != self.open[-1]:  # these may be left open
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def write(folder, texts=SENTENCES, **more):
    made = tp.report(folder, texts, repeats=1, **more)
    return made, made.html()


def cut_model():
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.TopK(0.5)})
    heads, units = [[0, 1], [0, 1, 2, 3], [], [1]], [range(48), range(10), [], range(7)]
    return resize(model, heads=heads, units=units)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "pruned": save(root / "pruned", pruned_model()),
        "dense": save(root / "dense", build("bert", "ForSequenceClassification")),
        "cut": save(root / "cut", cut_model()),
        "wordless": save(root / "wordless", pruned_model(), tokenizer=False),
        "choices": save(root / "choices", tp.pack(build("bert", "ForMultipleChoice"))),
    }


def run(*arguments):
    """The exit status of a command line."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def test_the_page_stands_alone(folders):
    _, text = write(folders["pruned"], log_history=[{"step": 1, "macs_target": 0.5}])
    page = Page(text)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    for tag, attributes in page.seen:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "a"
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("aria-label" in attributes for tag, attributes in page.seen if tag == "svg")
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_every_token_bears_its_depth_as_a_class_and_as_a_number(folders):
    made, text = write(folders["pruned"])
    tokens = [token for sample in made.samples for token in sample]
    assert [token.text for token in made.samples[0]] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    classes = [attributes["class"].split()[0] for tag, attributes in Page(text).seen if tag == "b"]
    legend, shown = classes[:5], classes[5:]
    assert legend == [f"d{depth}" for depth in range(5)]
    assert shown == [f"d{token.depth}" for token in tokens]
    for token in made.samples[1]:
        assert f"{token.text}<sub>{token.depth}</sub>" in text
    assert all(f".d{depth} {{" in text for depth in range(5))
    assert made.legend in text


def test_nothing_from_outside_becomes_markup(tmp_path):
    model = tp.attach(build("bert", "ForSequenceClassification", vocab_size=130), {1: tp.TopK(0.5)})
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<script>", "</script>", "<b", "&amp;"])
    run = {
        "task": EVIL,
        "method": EVIL + "$x$",
        "metric": EVIL,
        "score": 0.5,
        "reduction": {"true_length": 2.0},
        "training": {},
    }
    (tmp_path / "evil.json").write_text(json.dumps(run))
    folder = save(tmp_path / "<i>&", model, tokenizer=False)
    tokenizer.save_pretrained(folder)
    made, text = write(folder, [EVIL, "&amp; the cat"], runs=[tmp_path / "evil.json"])
    assert any(token.text == "<script>" for token in made.samples[0])
    page = Page(text)
    assert not {"script", "i"} & {tag for tag, _ in page.seen}
    assert all("onclick" not in attributes for _, attributes in page.seen)
    assert "<i>&" in page.text
    assert EVIL in page.text
    assert "&amp;amp;" in text


def test_the_table_says_what_was_measured(folders):
    made, text = write(folders["pruned"])
    model = tp.from_pretrained(folders["pruned"])
    lengths = [5, 12, 4, 9, 3]
    assert [len(sample) for sample in made.samples] == lengths
    head, *rows = Page(text).rows
    assert head[:4] == ["layer", "tokens that leave", "million MACs, packed dense", "million MACs, this model"]
    tokens = [33 / 5, 18 / 5, 18 / 5, 1]
    assert [row[:2] for row in rows[:4]] == [[str(layer), f"{left:.1f}"] for layer, left in enumerate(tokens)]
    dense = [macs / 5 for macs in cost.dense_macs(model, lengths)]
    assert made.dense.macs[:3] == pytest.approx(dense[:3])
    assert made.model.macs[0] == made.dense.macs[0]
    assert made.model.macs[3] < made.dense.macs[3] < dense[3]
    assert sum(made.model.macs) == pytest.approx(made.cost.spent / 5)
    assert rows[0][2] == f"{dense[0] / 1e6:.2f}"
    assert [row[5] for row in rows[:4]] == [f"{ms:.2f}" for ms in made.model.ms]
    assert rows[-1][-1] == f"{made.model.total_ms:.2f}"
    assert f"{made.cost.true_length_reduction:.2f} x" in text
    assert made.machine["processor"] in text


def test_layers_are_timed_by_the_clock_around_them(monkeypatch):
    ticks, clock = [], iter(range(10_000))

    def now(model):
        ticks.append(model)
        return next(clock) / 1000

    monkeypatch.setattr(timing, "now", now)
    models = {"one": pruned_model(), "two": tp.pack(build("bert", "ForSequenceClassification"))}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    times = timing.layer_times(models, inputs, 3)
    assert times["one"][0] == pytest.approx([1, 1, 1, 1])  # two looks at the clock per layer, a tick apart
    assert times["two"][1] == pytest.approx(5)
    order = [model is models["one"] for model in ticks[::10]]
    assert order == [False, True, True, False, False, True, True, False]
    before = len(ticks)
    models["one"](**inputs)
    assert len(ticks) == before, "the hooks are gone"


def test_a_cut_model_shows_what_is_left(folders):
    made, text = write(folders["cut"])
    assert made.was_cut
    assert made.origins == [0, 1, 3]
    head, *rows = Page(text).rows
    assert head[-2:] == ["heads left", "FFN units left"]
    assert [row[-2:] for row in rows[:4]] == [
        ["2 of 4", "48 of 48"], ["4 of 4", "10 of 48"], ["0 of 4", "0 of 48"], ["1 of 4", "7 of 48"],
    ]  # fmt: skip
    assert rows[2][1] == "-"
    assert [row[0] for row in rows[:4]] == ["0", "1", "2", "3"]
    assert made.model.heads == [2, 4, 1]
    assert made.dense.units == [48] * 4
    assert f"{100 * made.model.parameters / made.dense.parameters:.0f} %" in text
    assert "32 of 32 hidden units are left" in text
    assert "Attention heads and FFN units left" in text


def test_layers_whose_origin_is_not_known_stand_in_their_own_order():
    model = tp.pack(build("bert", "ForSequenceClassification"))
    resize(model, heads=[range(4), [], range(4), range(4)], units=[range(48), [], range(48), range(48)])
    made, text = write(model, tokenizer=make_tokenizer())
    assert made.origins is None
    _, *rows = Page(text).rows
    assert [row[0] for row in rows[:4]] == ["0", "1", "2", "embeddings and head"]
    assert [row[2] for row in rows[:3]] == ["", "", ""]
    assert rows[4][2] == f"{sum(made.dense.macs) / 1e6:.2f}"
    assert len(made.dense.macs) == 4


def test_a_dense_model_lives_to_the_end_and_says_so(folders):
    made, text = write(folders["dense"])
    assert not made.pruned
    assert {token.depth for sample in made.samples for token in sample} == {3, 4}
    assert "every token lives to the end" in text
    head, *rows = Page(text).rows
    assert head == ["layer", "tokens that leave", "million MACs, this model", "ms, this model"]
    assert all(len(row) == 4 for row in rows)


def test_a_model_in_memory_is_left_as_it_was():
    model, tokenizer = pruned_model().train(), make_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = tp.report(model, list(zip(SENTENCES, SENTENCES[::-1], strict=True)), tokenizer=tokenizer, repeats=1, max_length=20)
    assert made.name == "BertForSequenceClassification"
    assert made.max_length == 20
    assert [token.text for token in made.samples[4]] == ["[CLS]", "home", "[SEP]", "the", "cat", "sat", "[SEP]"]
    assert model.training
    assert model.token_pruner.trace == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(tp.errors.ConfigError, match="needs its tokenizer"):
        tp.report(model, SENTENCES)
    dense = build("bert", "ForSequenceClassification")
    tp.report(dense, SENTENCES, tokenizer=tokenizer, repeats=1)
    assert not hasattr(dense, "token_pruner")


def test_a_notebook_shows_the_page_in_a_frame(folders):
    made, text = write(folders["pruned"])
    ((tag, attributes),) = Page(made._repr_html_()).seen
    assert tag == "iframe"
    assert attributes["srcdoc"] == text
    assert attributes["sandbox"] is None


def test_saving_is_all_or_nothing(folders, tmp_path, monkeypatch):
    made, text = write(folders["pruned"])
    path = tmp_path / "report.html"
    made.save(path)
    assert path.read_text(encoding="utf-8") == text
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        made.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_plots_are_files_too(folders, tmp_path):
    made, _ = write(folders["cut"], log_history=[{"step": 1, "macs_target": 0.5, "tokens_after_0": 1.0}])
    files = made.save_plots(tmp_path / "plots")
    assert {file.name for file in files} == {
        f"{name}.{kind}"
        for name in ("tokens", "macs", "milliseconds", "weights", "budget", "training")
        for kind in ("png", "svg")
    }
    for file in files:
        if file.suffix == ".png":
            assert matplotlib.image.imread(file).std() > 0.05
        else:
            assert "<svg" in file.read_text()


def test_the_log_of_a_training_is_found_in_its_checkpoint(tmp_path):
    trainer = trainer_for(tmp_path / "out", top(), save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    make_tokenizer().save_pretrained(tmp_path / "out")
    made, text = write(tmp_path / "out")
    logged = [entry for entry in trainer.state.log_history if "macs_realised" in entry]
    assert [entry["step"] for entry in made.log] == [entry["step"] for entry in logged] == [4, 8, 12]
    assert made.log == logged
    assert "Over training" in text
    again, _ = write(trainer.model, tokenizer=make_tokenizer(), log_history=trainer.state.log_history)
    assert again.log == made.log
    assert write(trainer.model, tokenizer=make_tokenizer())[0].log == []


def test_results_give_a_plot_and_the_log_of_their_own_model(folders, tmp_path):
    log = [{"step": 5, "macs_target": 0.5, "macs_realised": 0.6}, {"train_runtime": 3, "step": 5}]
    for name, method, score in (("pruned", "top", 0.7), ("other", "dense", 0.8)):
        result = {"task": "mrpc", "method": method, "metric": "accuracy", "score": score, "reduction": {"true_length": 2.0}}
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "training": {"log": log if name == "pruned" else []}}))
    (tmp_path / "dense-mrpc.json").write_text(json.dumps({"task": "mrpc", "trials": []}))
    made, text = write(folders["pruned"], runs=sorted(tmp_path.glob("*.json")))
    assert [run["method"] for run in made.runs] == ["dense", "top"]
    assert made.log == log[:1]
    assert "mrpc: score against MACs reduction" in text
    assert write(folders["cut"], runs=[tmp_path / "pruned.json"])[0].log == []


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"task": "a", "method": "b", "metric": "c", "score": "d", "reduction": {}}']
)
def test_a_file_that_is_no_result_is_refused_before_anything_runs(tmp_path, monkeypatch, content):
    (tmp_path / "bad.json").write_text(content)
    monkeypatch.setattr(collect, "copy_of", None)
    with pytest.raises(tp.errors.ConfigError, match=r"bad\.json"):
        tp.report(pruned_model(), SENTENCES, tokenizer=make_tokenizer(), runs=[tmp_path / "bad.json"])


def test_images_are_grids(tmp_path):
    model = tp.attach(build("vit", "ForImageClassification"), {1: tp.TopK(0.5)})
    processor = hf.ViTImageProcessorPil(size={"height": 24, "width": 24})
    model.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    from PIL import Image

    for number in range(2):
        Image.effect_noise((30, 40), 90).convert("RGB").save(tmp_path / f"{number}.png")
    status = run(
        "report",
        tmp_path / "vit",
        "--images",
        tmp_path / "0.png",
        tmp_path / "1.png",
        "-o",
        tmp_path / "r.html",
        "--repeats",
        1,
    )
    assert status == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    grid = page.rows[-12:-6]
    assert all(len(row) == 6 for row in grid)
    assert sorted(depth for row in grid for depth in row) == ["1"] * 18 + ["3"] * 18
    with pytest.raises(tp.errors.ConfigError, match="pass a list of PIL images"):
        tp.report(model, ["a text"], processor=processor)
    with pytest.raises(tp.errors.ConfigError, match="needs its image processor"):
        tp.report(model, [Image.new("RGB", (24, 24))])


def test_command_line_writes_a_page_and_plots(folders, tmp_path, capsys):
    (tmp_path / "data.csv").write_text("a,b\nthe cat,sat\nhome,a mat\n")
    (tmp_path / "data.txt").write_text("the cat sat\n\n  home \n")
    out = tmp_path / "page.html"
    columns = ("--columns", "a", "b")
    assert (
        run("report", folders["pruned"], "--texts", tmp_path / "data.csv", *columns, "-o", out, "--plots", tmp_path / "p") == 0
    )
    assert f"{out}: 2 texts, 4 layers" in capsys.readouterr().out
    assert len(os.listdir(tmp_path / "p")) == 6
    assert "mat" in Page(out.read_text(encoding="utf-8")).text
    assert run("report", folders["dense"], "--texts", tmp_path / "data.txt", "-o", out, "--limit", 1) == 0
    assert "Looked at on 1 texts" in out.read_text(encoding="utf-8")
    assert run("report", folders["pruned"], "-o", out) == 0  # built-in text
    assert os.path.getsize(out) < 2_000_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/missing"], "There is no folder"),
        (["{wordless}"], "has no tokenizer"),
        (["{choices}"], "reads several sequences at a time"),
        (["{pruned}", "--texts", "{tmp}/none.txt"], "There is no file"),
        (["{pruned}", "--texts", "{tmp}/empty.txt"], "There are no texts"),
        (["{pruned}", "--texts", "{tmp}/latin.txt"], "is no text in UTF-8"),
        (["{pruned}", "--texts", "{tmp}/empty.txt", "--columns", "a"], "has no columns"),
        (["{pruned}", "--texts", "{tmp}/a.csv", "--columns", "x"], "has no column 'x'; it has: a"),
        (["{pruned}", "--texts", "{tmp}/a.csv"], "that holds the texts, or two for pairs: a"),
        (["{pruned}", "--columns", "a"], "--texts, which is missing"),
        (["{pruned}", "--limit", "0"], "--limit: must be"),
        (["{pruned}", "--repeats", "0"], "--repeats: must be"),
        (["{pruned}", "--images", "{tmp}/a.csv"], "cannot identify image file"),
        (["{pruned}", "--images", "{tmp}/a.csv", "--texts", "{tmp}/a.csv"], "cannot be given together"),
        (["{pruned}", "--images", "{tmp}/a.csv", "--columns", "a"], "cannot be given together"),
        (["{pruned}", "-o", "{tmp}/none/r.html"], "cannot be written"),
        (["{pruned}", "--runs", "{tmp}/a.csv"], "cannot be read as JSON"),
    ],
)
def test_wrong_input_gives_one_clear_line(folders, tmp_path, capsys, arguments, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.csv").write_text("a\nthe cat\n")
    places = {"tmp": tmp_path, **folders}
    arguments = [argument.format(**places) for argument in arguments]
    assert run("report", *(["-o", tmp_path / "r.html"] if "-o" not in arguments else []), *arguments) == (
        2 if "must be" in words else 1
    )
    printed = capsys.readouterr().err.strip().splitlines()
    assert words in printed[-1]
    assert printed[-1].startswith("hf-tokenprune")
    assert not any("Traceback" in line for line in printed)
    assert not (tmp_path / "r.html").exists()


def test_a_report_needs_matplotlib(folders, monkeypatch):
    monkeypatch.setattr("hf_tokenprune.reporting.plots.find_spec", lambda _: None)
    with pytest.raises(tp.errors.ConfigError, match=r"pip install \"hf_tokenprune\[plots\]\""):
        tp.report(folders["pruned"], SENTENCES)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("count", [2, 7, 13, 25])
def test_colours_can_be_read_and_are_in_order_in_grey_too(count, dark):
    def rgb(colour):
        return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    made = shades(count, dark=dark)
    assert len(set(made)) == count
    assert all(contrast(rgb(paper), rgb(ink)) >= 4.5 for paper, ink in made)
    greys = [contrast(rgb(paper), (0, 0, 0)) for paper, _ in made]
    assert greys == sorted(greys, reverse=not dark)


# In the terminal.


def test_explain_prints_depths_without_colours(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run("explain", folders["pruned"], "the cat sat", "home") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    shown = re.findall(r"(\S+?)([₀₁₂₃₄₅₆₇₈₉])", printed)
    assert [word for word, _ in shown] == ["[CLS]", "the", "cat", "sat", "[SEP]", "home", "[SEP]"]
    model = tp.from_pretrained(folders["pruned"])
    found = tp.token_depths(model, make_tokenizer()("the cat sat", "home", return_tensors="pt"))
    assert ["₀₁₂₃₄".index(depth) for _, depth in shown] == found.depths[0].tolist()
    assert "The number is the layer in which a token was dropped" in printed
    assert [int(left) for left in re.findall(r"layer \d +(\d+) of 7", printed)] == [7, 4, 4, 1]


def test_explain_in_colour_and_in_ascii(folders):
    from rich.console import Console

    text = explain(folders["pruned"], "the cat\x1b[31m", ascii_only=True)
    assert text.plain.isascii()
    assert text.plain.startswith("[CLS]/4 the/")
    assert "\x1b" not in text.plain
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as captured:
        console.print(text)
    deepest = shades(5)[4][0]
    red, green, blue = (int(deepest[i : i + 2], 16) for i in (1, 3, 5))
    assert re.search(rf"48;2;{red};{green};{blue}m\[CLS\]/4", captured.get())


def test_explain_of_a_dense_model_says_so(folders, capsys):
    assert run("explain", folders["dense"], "the cat") == 0
    assert "This model drops no tokens." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "texts", "words"),
    [
        ("pruned", ["a", "b", "c"], "3 texts were given"),
        ("wordless", ["a"], "has no tokenizer"),
        ("choices", ["a"], "reads several sequences at a time"),
    ],
)
def test_explain_refuses_in_one_line(folders, capsys, folder, texts, words):
    assert run("explain", folders[folder], *texts) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["albert", "mpnet", "deberta-v2", "gemma3"])
def test_families_of_which_nothing_can_be_cut_have_a_report_too(name):
    model = tp.attach(build(name, "ForSequenceClassification"), {1: tp.TopK(0.5)})
    made = tp.report(model, ["a lovely film", "an old house"], tokenizer=make_tokenizer(), repeats=1)
    assert (made.model.heads, made.model.units, made.model.hidden) == (None, None, None)
    assert sum(made.model.macs) < sum(made.dense.macs)
    Page(made.html())
