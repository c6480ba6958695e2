"""The bench and its command line, end to end on a tiny model. No test looks at a real time."""

import json
import os

import pytest
import torch
import transformers as hf
from families import build

import hf_tokenprune as tp
from hf_tokenprune import bench as benching
from hf_tokenprune import cli, cost, subject
from hf_tokenprune.bench import CONTENDERS, bench
from hf_tokenprune.sample_text import TEXTS
from hf_tokenprune.subject import read_texts

WORDS = ["a", "the", "cat", "dog", "sat", "ran", "on", "under", "red", "old", "mat", "and", "then", "home"]
SENTENCES = ["the cat sat", "the old dog ran home and then the cat ran", "a mat", "the red cat sat on the mat", "home"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer():
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    return hf.BertTokenizerFast(vocab=vocabulary, model_max_length=64)


def save(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


def pruned_model():
    return tp.attach(build("bert", "ForSequenceClassification"), {1: tp.TopK(keep=0.5)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    return {
        "pruned": save(root / "pruned", pruned_model()),
        "dense": save(root / "dense", build("bert", "ForSequenceClassification")),
        "wordless": save(root / "wordless", pruned_model(), tokenizer=False),
        "images": save(root / "images", tp.pack(build("vit", "ForImageClassification")), tokenizer=False),
        "choices": save(root / "choices", tp.pack(build("bert", "ForMultipleChoice"))),
        "empty": str(root / "empty"),
        "broken": str(root / "broken"),
        "missing": str(root / "missing"),
    }


@pytest.fixture
def data(tmp_path):
    rows = [{"first": text, "second": text[::-1], "number": i} for i, text in enumerate(SENTENCES)]
    csv = ["first,second,number", *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "data.csv").write_text("\n".join(csv))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {**rows[0], "first": None}]))
    (tmp_path / "data.doc").write_text("the cat")
    (tmp_path / "bad.csv").write_text("")
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "data.parquet"))
    return tmp_path


def run(*arguments):
    """The exit status of a command line."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def test_command_line_measures_and_writes_json(folders, data, capsys):
    out = data / "out.json"
    out.write_text("old")
    status = run(
        "bench", folders["pruned"], "--texts", data / "data.csv", "--columns", "first", "second", "--batch-sizes", 1, 3,
        "--repeats", 2, "--threads", 1, "--max-length", 30, "--json", out,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0
    assert all(
        name in printed for name in (*CONTENDERS, "batch size 1", "batch size 3", "MACs", "BertForSequenceClassification")
    )
    result = json.loads(out.read_text())
    assert sorted(path.name for path in data.iterdir() if "out" in path.name) == ["out.json"]
    assert result["threads"] == 1
    assert result["dtype"] == "float32"
    assert result["texts"] == 5
    assert result["max_length"] == 30
    assert result["cpu"]
    assert result["command"].startswith("hf-tokenprune bench ")
    assert set(result["versions"]) == {"python", "torch", "transformers", "hf_tokenprune"}
    assert [entry["batch_size"] for entry in result["results"]] == [1, 3]
    for entry in result["results"]:
        assert set(entry) == {"batch_size", "ms", "ms_each_repeat", "macs", "reduction", "tokens_per_layer"}
        assert set(entry["ms"]) == set(CONTENDERS)
        assert all(ms > 0 for ms in entry["ms"].values())
        assert all(len(each) == 2 for each in entry["ms_each_repeat"].values())
        assert len(entry["tokens_per_layer"]) == 4
        assert entry["tokens_per_layer"][-1] == 1


def test_macs_are_those_of_the_texts(folders):
    result = bench(folders["pruned"], SENTENCES, batch_sizes=(1, 2), max_length=20, repeats=1)
    model = tp.from_pretrained(folders["pruned"])
    lengths = [len(sentence.split()) + 2 for sentence in SENTENCES]
    assert lengths == [5, 12, 4, 9, 3]
    assert result["tokens_per_text"] == sum(lengths) / 5

    def dense(lengths):
        return sum(cost.dense_macs(model, lengths)) / 5

    one, two = (entry["macs"] for entry in result["results"])
    assert one["dense"] == two["dense"] == one["hf_padded"] == one["hf_sorted"] == dense(lengths)
    assert two["dense_padded"] == dense([20] * 5)
    assert two["hf_padded"] == dense([12, 12, 9, 9, 3])
    assert two["hf_sorted"] == dense([4, 4, 9, 9, 12])
    assert one["pruned"] == two["pruned"] < one["packed_dense"] == two["packed_dense"] < one["dense"]
    for entry in result["results"]:
        assert entry["reduction"]["true_length"] == pytest.approx(one["dense"] / one["pruned"])
        assert entry["reduction"]["padded"] == pytest.approx(one["dense_padded"] / one["pruned"])
        # CLS stays, and of 4, 11, 3, 8 and 2 others as many as have a rank with (r + 0.5) / n < 0.5.
        assert entry["tokens_per_layer"] == [33 / 5, (5 + 2 + 5 + 1 + 4 + 1) / 5, (5 + 2 + 5 + 1 + 4 + 1) / 5, 1]


def test_contenders_take_turns_and_medians_are_taken(monkeypatch):
    ran, threads = [], torch.get_num_threads() + 1

    def fake(model, _batch):
        assert torch.get_num_threads() == threads
        assert not model.training
        assert torch.is_inference_mode_enabled()
        ran.append(model)
        return float(len(ran))

    monkeypatch.setattr(benching, "_seconds", fake)
    model = pruned_model().train()
    result = bench(model, SENTENCES, tokenizer=make_tokenizer(), batch_sizes=[3], repeats=3, threads=threads)
    entry = result["results"][0]
    rounds = [ran[start : start + 4] for start in range(0, len(ran), 4)]
    assert len(rounds) == 3 * 2
    padded, ordered, packed, pruned = rounds[0]
    assert padded is ordered
    assert len({padded, packed, pruned}) == 3
    turn = [padded, ordered, packed, pruned]
    places = [0, 1, 1, 2, 2, 3]  # repeat + number of the batch
    assert rounds == [turn[place:] + turn[:place] for place in places]
    # pruned ran 4th and 7th, then 11th and 14th, then 18th and 21st; 5 texts.
    assert entry["ms_each_repeat"]["pruned"] == [1000 * 11 / 5, 1000 * 25 / 5, 1000 * 39 / 5]
    assert entry["ms"]["pruned"] == 1000 * 25 / 5


def test_contenders_share_weights_and_give_the_outputs_they_should():
    model = pruned_model()
    tokenizer = make_tokenizer()
    models = benching.contenders(model)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    dense = build("bert", "ForSequenceClassification")
    with torch.no_grad():
        expected, cut = dense(**batch).logits, pruned_model()(**batch).logits
        torch.testing.assert_close(models["hf_padded"](**batch).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(models["packed_dense"](**batch).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(models["pruned"](**batch).logits, cut, rtol=0, atol=0)
    assert (cut - expected).abs().max() > 1e-3
    assert type(models["hf_padded"]) is hf.BertForSequenceClassification
    assert models["hf_padded"].config._attn_implementation == "sdpa"
    assert len({m.classifier.weight.data_ptr() for m in models.values()}) == 1
    assert not len(models["packed_dense"].token_pruner.sites)


def test_transformers_own_flash_attention_is_measured_where_it_runs(monkeypatch):
    asked = []
    monkeypatch.setattr(subject, "runs_flash_attention", lambda _: True)
    monkeypatch.setattr(hf.BertForSequenceClassification, "set_attn_implementation", lambda _, name: asked.append(name))
    entry = bench(pruned_model(), SENTENCES, tokenizer=make_tokenizer(), batch_sizes=[2], repeats=1)["results"][0]
    assert asked == ["flash_attention_2"]
    assert list(entry["ms"]) == ["hf_padded", "hf_sorted", "hf_flash", "packed_dense", "pruned"]
    assert entry["macs"]["hf_flash"] == entry["macs"]["hf_padded"]
    assert entry["ms_each_repeat"]["hf_flash"] == [entry["ms"]["hf_flash"]]


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2"])
def test_a_family_that_computes_its_attention_itself_is_measured(name):
    model = tp.attach(build(name, "ForSequenceClassification"), {1: tp.TopK(keep=0.5)})
    report = bench(model, SENTENCES, tokenizer=make_tokenizer(), batch_sizes=[2], repeats=1)
    assert report["results"][0]["ms"]["pruned"] > 0


def test_the_unmodified_contender_uses_sdpa():
    model = build("bert", "ForSequenceClassification")
    model.set_attn_implementation("eager")
    assert benching.contenders(tp.pack(model))["hf_padded"].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_in_memory_is_left_as_it_is(dtype):
    model = pruned_model().train()
    model.config.token_pruning["method"] = {"name": "by hand"}
    model.token_pruner.objective = lambda _, forward, args, kwargs: forward(*args, **kwargs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    result = bench(model, SENTENCES, tokenizer=make_tokenizer(), batch_sizes=[2], threads=threads + 1, repeats=1, dtype=dtype)
    assert result["dtype"] == (dtype or "float32")
    assert result["model"] == "BertForSequenceClassification"
    assert result["method"] == {"name": "by hand"}
    assert torch.get_num_threads() == threads
    assert model.training
    assert model.token_pruner.trace == []
    assert callable(model.token_pruner.objective)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def test_a_dense_folder_is_measured_packed(folders):
    result = bench(folders["dense"], SENTENCES, batch_sizes=[2], repeats=1)
    entry = result["results"][0]
    assert entry["ms"]["pruned"] is entry["ms_each_repeat"]["pruned"] is entry["macs"]["pruned"] is None
    assert entry["reduction"]["true_length"] == pytest.approx(entry["macs"]["dense"] / entry["macs"]["packed_dense"])
    assert entry["tokens_per_layer"] == [33 / 5] * 3 + [1]
    assert "time / packed_dense" in cli.format_bench(result)


def test_sample_text_is_the_default(folders, capsys):
    assert run("bench", folders["pruned"], "--batch-sizes", 4, "--repeats", 1, "--limit", 6, "--max-length", 16) == 0
    assert "6 texts of" in capsys.readouterr().out
    words = [len(text.split()) for text in TEXTS]
    assert len(set(TEXTS)) == len(TEXTS) == 180
    assert (min(words), max(words)) == (3, 94)
    assert not any("\n" in text for text in TEXTS)


def test_max_length_is_at_most_what_the_model_reads(folders):
    result = bench(folders["pruned"], ["the cat " * 100, "home"], batch_sizes=[2], repeats=1)
    assert result["max_length"] == 64
    assert result["tokens_per_text"] == (64 + 3) / 2


def test_a_batch_is_no_larger_than_there_are_texts(folders):
    result = bench(folders["pruned"], ["the cat", "home"], batch_sizes=[1, 8, 32], repeats=1)
    assert [entry["batch_size"] for entry in result["results"]] == [1, 2]


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet"])
def test_texts_are_read_from_files(data, name):
    assert read_texts(data / name, ["first"], limit=5) == SENTENCES
    assert read_texts(data / name, ["first", "second"], limit=2) == [(text, text[::-1]) for text in SENTENCES[:2]]


def test_a_name_is_no_pattern(data):
    for name, text in (("data[1].csv", "mine"), ("data1.csv", "another's")):
        (data / name).write_text(f"first\n{text}\n")
    assert read_texts(data / "data[1].csv", ["first"]) == ["mine"]


def test_a_text_file_holds_a_text_a_line(tmp_path):
    (tmp_path / "texts.txt").write_text("the cat\n\n sat \n")
    assert read_texts(tmp_path / "texts.txt", limit=5) == ["the cat", "sat"]


def test_a_missing_text_is_empty(data):
    assert read_texts(data / "data.jsonl", ["first"]) == [*SENTENCES, ""]


WRONG = {
    "no such folder": (["missing"], "no folder"),
    "no model in it": (["empty"], "holds no model"),
    "a broken config": (["broken"], "holds no model"),
    "no tokenizer": (["wordless"], "no tokenizer"),
    "images": (["images"], "pixel_values"),
    "several sequences": (["choices"], "several sequences"),
    "no such column": (
        ["pruned", "--texts", "data.csv", "--columns", "frist"],
        "no column 'frist'; it has: first, second, number",
    ),
    "a column of numbers": (["pruned", "--texts", "data.csv", "--columns", "number"], "not text"),
    "three columns": (["pruned", "--texts", "data.csv", "--columns", "first", "second", "number"], "3 columns"),
    "texts without columns": (["pruned", "--texts", "data.csv"], "Name the column of data.csv that holds the texts"),
    "columns without texts": (["pruned", "--columns", "first"], "--texts, which is missing"),
    "no such file": (["pruned", "--texts", "none.csv", "--columns", "first"], "no file"),
    "an empty file": (["pruned", "--texts", "bad.csv", "--columns", "first"], "cannot be read as csv"),
    "an unknown type": (["pruned", "--texts", "data.doc", "--columns", "first"], "unknown type"),
    "batch size 0": (
        ["pruned", "--batch-sizes", "1", "0"],
        "--batch-sizes: must be a whole number from 1 to 999999999, not '0'",
    ),
    "no repeats": (["pruned", "--repeats", "0"], "--repeats: must be"),
    "no threads": (["pruned", "--threads", "0"], "--threads: must be"),
    "no texts": (["pruned", "--limit", "no"], "--limit: must be"),
    "too long": (["pruned", "--max-length", "65"], "3 to 64 tokens"),
    "too short": (["pruned", "--max-length", "2"], "3 to 64 tokens"),
    "no such device": (["pruned", "--device", "abacus"], "abacus"),
    "JSON into nowhere": (["pruned", "--json", "none/out.json"], "cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_one_line_and_a_status(folders, data, capsys, monkeypatch, case):
    (folder, *arguments), message = WRONG[case]
    monkeypatch.chdir(data)
    assert run("bench", folders[folder], *arguments) == (2 if "must be" in message else 1)  # 2: as a command line
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("hf-tokenprune")]
    assert len(said) == 1
    assert message in said[0]
    if "must be" in message:
        assert captured.err == f"{said[0]}\n"
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_wrong_calls_say_why():
    model, tokenizer = pruned_model(), make_tokenizer()
    for texts in ([], "the cat", ["a", ("a", "b")], [("a", "b", "c")], [1]):
        with pytest.raises(tp.errors.ConfigError, match="texts"):
            bench(model, texts, tokenizer=tokenizer)
    with pytest.raises(tp.errors.ConfigError, match="tokenizer=tokenizer"):
        bench(model, SENTENCES)
    with pytest.raises(tp.errors.ConfigError, match="int3"):
        bench(model, SENTENCES, tokenizer=tokenizer, dtype="int3")
    with pytest.raises(tp.errors.ConfigError, match="nothing"):
        bench(model, SENTENCES, tokenizer=tokenizer, batch_sizes=[])
    padless = make_tokenizer()
    padless.pad_token = None
    for look in (bench, tp.report):
        with pytest.raises(tp.errors.ConfigError, match="has no padding token"):
            look(model, SENTENCES, tokenizer=padless)
    with pytest.raises(tp.errors.UnsupportedModelError, match="pixel_values"):
        bench(build("vit", "Model"), SENTENCES, tokenizer=tokenizer)


def test_json_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cli._write_json({"a": 1}, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize(("arguments", "status", "words"), [
    (["--help"], 0, ["bench", "tokens dropped"]),
    (["bench", "--help"], 0, [*CONTENDERS, "--columns", "--json", "examples:"]),
    (["--version"], 0, [tp.__version__]),
])  # fmt: skip
def test_help_explains_itself(capsys, arguments, status, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == status
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
