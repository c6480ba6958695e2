"""`hf-tokenprune run` on scripts in the style of transformers' examples, unchanged, offline, on tiny models and files."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from families import IMAGE, TEXT
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, Trainer, ViTConfig, ViTModel

import hf_tokenprune as tp
from hf_tokenprune.cli import main
from hf_tokenprune.run import METHODS, make_method, trainers_prune

SCRIPTS = Path(__file__).parent / "scripts"
FILLER = ["the", "of", "in", "and", "to", "it", "was", "with", "for", "on", "from", "film", "story", "house", "day", "old"]
GOOD, BAD, NAMES = ["lovely", "great"], ["dull", "awful"], ["anna", "bert", "carl"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *GOOD, *BAD, *NAMES, "who", "lives", "?"]
SHORT = ["--schedule", "dense=1,static=0,anneal=2,settle=1"]
FAST = [
    *("--per_device_train_batch_size", "8", "--max_steps", "4", "--learning_rate", "1e-3", "--logging_steps", "2"),
    *(
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "--dataloader_pin_memory",
        "false",
    ),
]


def _sentence(chance, *words):
    filler = [chance.choice(FILLER) for _ in range(chance.randint(6, 14))]
    place = chance.randint(0, len(filler))
    return [*filler[:place], *words, *filler[place:]]


def _rows(task, count):
    chance = random.Random(0)
    for number in range(count):
        good, name = chance.random() < 0.5, chance.choice(NAMES)
        if task == "text":
            sentence = _sentence(chance, chance.choice(GOOD if good else BAD))
            yield {"sentence": " ".join(sentence), "label": "good" if good else "bad"}
        elif task == "tokens":
            words = _sentence(chance, name)
            yield {"id": number, "tokens": words, "ner_tags": ["NAME" if word in NAMES else "O" for word in words]}
        elif task == "answers":
            context = " ".join(_sentence(chance, name, "lives"))
            answers = {"text": [name], "answer_start": [context.index(name)]}
            yield {"question": "who lives ?", "context": context, "answers": answers}
        else:
            endings = {"ending0": chance.choice(GOOD if good else BAD), "ending1": chance.choice(BAD if good else GOOD)}
            yield {"sent1": " ".join(_sentence(chance)), **endings, "label": int(not good)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models and data files, as a user has them."""
    folder = tmp_path_factory.mktemp("home")
    config = {**TEXT, "vocab_size": len(WORDS)}
    del config["num_labels"]
    BertModel(BertConfig(**config)).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=64).save_pretrained(
        folder / "bert"
    )
    ViTModel(ViTConfig(**{**IMAGE, "num_labels": 2})).save_pretrained(folder / "vit")
    for split, count in (("train", 32), ("validation", 8)):
        rows = list(_rows("text", count))
        lines = ["sentence,label", *(f"{row['sentence']},{row['label']}" for row in rows)]
        (folder / f"text-{split}.csv").write_text("\n".join(lines) + "\n")
        for task in ("tokens", "choices"):
            lines = [json.dumps(row) for row in _rows(task, count)]
            (folder / f"{task}-{split}.json").write_text("\n".join(lines) + "\n")
        (folder / f"answers-{split}.json").write_text(json.dumps({"data": list(_rows("answers", count))}))
        pixels = np.random.default_rng(0).integers(0, 99, (count, 24, 24, 3), dtype=np.uint8)
        for number, image in enumerate(pixels):
            bright = number % 2
            place = folder / f"images-{split}" / ("dark", "bright")[bright] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image + 150 * bright).save(place)
    return folder


@pytest.fixture
def script(home, tmp_path):
    """The end of a command line: a script and its own arguments."""

    def line(name, task, *more, model="bert"):
        kind = "csv" if task == "text" else "json"
        files = [("--train_file", f"{task}-train.{kind}"), ("--validation_file", f"{task}-validation.{kind}")]
        if task == "images":
            files = [("--train_dir", "images-train"), ("--validation_dir", "images-validation")]
        data = [word for option, file in files for word in (option, str(home / file))]
        folders = ["--model_name_or_path", str(home / model), "--cache_dir", str(home / "cache")]
        return [str(SCRIPTS / f"{name}.py"), *folders, *data, "--output_dir", str(tmp_path / "out"), *FAST, *more]

    return line


@pytest.fixture
def write(tmp_path):
    """A script of these lines."""

    def made(source):
        path = tmp_path / "script.py"
        path.write_text(source)
        return str(path)

    return made


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = Trainer.__init__, sys.argv, list(sys.path), sys.modules["__main__"]
    yield
    sys.modules.pop("trainer_qa", None)
    assert before == (Trainer.__init__, sys.argv, sys.path, sys.modules["__main__"])


def spent(folder, home):
    """The saved model, and what it spends of the dense model's MACs on the training data."""
    model = tp.from_pretrained(folder).eval()
    meter = tp.cost.CostMeter(model)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(8, 3, 24, 24)}
    else:
        tokenizer = BertTokenizerFast.from_pretrained(home / "bert")
        inputs = tokenizer([row["sentence"] for row in _rows("text", 32)], return_tensors="pt", padding=True)
        if "MultipleChoice" in type(model).__name__:
            inputs = {key: value.view(-1, 2, value.shape[-1]) for key, value in inputs.items()}
    with torch.no_grad():
        model(**inputs)
    meter.update()
    return model, meter.cost.spent / meter.cost.dense


TASKS = {
    "text": ("text_classification", "text", ["--do_train", "--do_eval"], "accuracy"),
    "smoothed": ("text_classification", "text", ["--do_train", "--do_eval", "--label_smoothing_factor", "0.1"], "accuracy"),
    "tokens": ("token_classification", "tokens", [], "accuracy"),
    "answers": ("question_answering", "answers", [], "exact_match"),
    "choices": ("multiple_choice", "choices", [], "accuracy"),
    "images": ("image_classification", "images", ["--remove_unused_columns", "false"], "accuracy"),
}


@pytest.mark.parametrize("case", TASKS)
def test_a_script_trains_a_pruned_model_without_knowing_it(script, home, tmp_path, case):
    name, task, more, metric = TASKS[case]
    line = script(name, task, *more, model="vit" if task == "images" else "bert")
    assert main(["run", "--target-macs", "0.6", "--rank-bins", "32", *SHORT, "--", *line]) == 0
    out = tmp_path / "out"
    model, share = spent(out, home)
    assert model.config.token_pruning["method"]["name"] == "top"
    assert share == pytest.approx(0.6, abs=0.08)
    assert 0 <= json.loads((out / "eval_results.json").read_text())[f"eval_{metric}"] <= 1


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("structured", ["--target-params", "0.6", "--parts", "heads,units", *SHORT], "structured"),
        ("structured+top", ["--target-macs", "0.6", "--sites", "1,2", "--parts", "units", *SHORT], "compose"),
        ("infor-coef", ["--static-macs", "none", "--target-macs", "0.7", "--width", "8", *SHORT], "infor_coef"),
    ],
)
def test_every_method_has_its_name_and_options(script, tmp_path, method, settings, name):
    line = script("text_classification", "text", "--do_train")
    assert main(["run", "--method", method, *settings, *line]) == 0  # the two dashes may be left out
    saved = tp.from_pretrained(tmp_path / "out").config.token_pruning
    assert saved["method"]["name"] == name


def test_settings_come_as_a_method_takes_them():
    given = {"target_macs": "0.3", "sites": "2, 3", "parts": "heads,blocks", "rank_weight": "0.5", "teacher": "none"}
    made = make_method("structured+top", {**given, "gate_lr": "None", "schedule": "dense=0,anneal=2,settle=1"})
    schedule = tp.Schedule(dense=0, anneal=2, settle=1)
    weights, tokens = tp.StructuredPruning(parts=("heads", "blocks")), tp.ToP(sites=(2, 3), rank_weight=0.5)
    assert made == tp.Compose(weights, tokens, target_macs=0.3, teacher=None, schedule=schedule)
    assert make_method("infor-coef", {}) == tp.InforCoef()


def _as_text(value):
    if isinstance(value, tp.Schedule):
        return ",".join(f"{phase}={share}" for phase, share in asdict(value).items())
    return "none" if value is None else str(value)


@pytest.mark.parametrize("name", METHODS)
def test_every_default_can_be_given_as_text(name):
    made = make_method(name, {"target_macs": "0.3"})
    inside = [made.weights, made.tokens] if name == "structured+top" else []
    fields = {field: getattr(made, field) for field in made.__dataclass_fields__ if field not in ("weights", "tokens")}
    for method in inside:
        own = set(method.__dataclass_fields__) - set(fields) - {"target_params"}
        fields.update({field: getattr(method, field) for field in own})
    assert make_method(name, {field: _as_text(value) for field, value in fields.items()}) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "bottom"], "--method must be one of top, structured, infor-coef, structured+top, not 'bottom'."),
        (["--target-macs", "half"], "--target-macs takes a number, not 'half'."),
        (["--target-macs", "1.5"], "ToP(target_macs=1.5): a share of the dense model's MACs, above 0 and below 1."),
        (["--site-gates", "maybe"], "--site-gates takes true or false, not 'maybe'."),
        (["--sites", "1,x"], "--sites takes whole numbers, not 'x'."),
        (["--target-macs", "0.4", "--rank-bins", "1"], "ToP(rank_bins=1): a whole number from 2 to 10000."),
        (["--schedule", "dense=1,warm=2"], "--schedule takes shares of phases (dense, static, anneal, settle) as in "),
        (["--schedule", "dense"], "--schedule takes shares of phases"),
        (["--schedule", "anneal=0"], "Schedule(anneal=0): without annealing"),
        (["--target-macs", "0.4", "--schedule", "static=1"], "ToP(schedule="),
        (["--target-params", "0.4"], "--target-params is no option of --method top, but of structured."),
        (["--method", "structured", "--rank-bins", "8"], "--rank-bins is no option of --method structured, but of top and "),
        ([], "--method top needs a budget: --target-macs 0.4, for instance."),
        (
            ["--method", "structured"],
            "--method structured needs a budget: --target-macs 0.4 or --target-params 0.4, for instance.",
        ),
    ],
)
def test_wrong_options_get_one_line_before_the_script_runs(write, capsys, options, message):
    path = write("raise AssertionError('ran')")
    assert main(["run", *options, "--", path]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hf-tokenprune: {message}")
    assert said.count("\n") == 1


def test_a_script_must_be_there(tmp_path, capsys):
    assert main(["run", "--target-macs", "0.4"]) == 1
    assert main(["run", "--target-macs", "0.4", str(tmp_path)]) == 1
    assert main(["run", "--target-macs", "0.4", "--", "nowhere.py"]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("hf-tokenprune: There is no script to run")
    assert second == f"hf-tokenprune: There is no script '{tmp_path}' to run."
    assert third == "hf-tokenprune: There is no script 'nowhere.py' to run."


def test_an_option_of_no_method_is_refused(write, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--target-mac", "0.4", "--", write("raise AssertionError('ran')")])
    assert "hf-tokenprune run: unknown: --target-mac (" in capsys.readouterr().err


def test_help_explains_every_setting_and_says_whose_it_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--target-macs VALUE MACs to spend on the real tokens" in said
    assert "--width VALUE units of a sampler's network (infor-coef)" in said
    for method in METHODS.values():
        for name in set(method.__dataclass_fields__) - {"weights", "tokens"}:
            assert f"--{name.replace('_', '-')} VALUE" in said


SEES = """
import json, sys
from transformers import Trainer
print(json.dumps([sys.argv, sys.path[0], __name__, __file__, sys.modules["__main__"].__dict__ is globals()]))
"""


def test_the_script_sees_what_python_would_show_it(write, capsys, tmp_path, monkeypatch):
    path = write(SEES)
    arguments = ["--its", "--own", "--", "--target-macs", "x", "-h"]
    monkeypatch.chdir(tmp_path)
    main(["run", "--target-macs", "0.4", "--", "script.py", *arguments])
    argv, folder, name, file, is_main = json.loads(capsys.readouterr().out)
    assert argv == [path, *arguments]
    assert (Path(folder), name, file, is_main) == (tmp_path.resolve(), "__main__", path, True)


NO_TRAINER = "ended without making a transformers.Trainer, so nothing was pruned."


@pytest.mark.parametrize("source", ["pass", "import sys\nsys.exit()", "import sys\nsys.exit(0)"])
def test_a_script_without_a_trainer_is_told_so(write, capsys, source):
    assert main(["run", "--target-macs", "0.4", "--", write(source)]) == 1
    said = capsys.readouterr().err
    assert NO_TRAINER in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("code", "arguments"), [(3, []), ("'it says why'", []), (0, ["--help"])])
def test_exit_codes_pass_through(write, capsys, code, arguments):
    with pytest.raises(SystemExit) as end:
        main(["run", "--target-macs", "0.4", write(f"import sys\nsys.exit({code})"), *arguments])
    assert repr(end.value.code) == str(code)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("error", ["ValueError('mine')", "FileNotFoundError('mine')"])
def test_an_error_shows_the_traceback_of_the_script(write, capsys, error):
    path = write(f"def inner():\n    raise {error}\n\ninner()\n")
    with pytest.raises(SystemExit, match="1"):
        main(["run", "--target-macs", "0.4", path])
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["Traceback (most recent call last):", f'  File "{path}", line 4, in <module>']
    assert said[-1] == f"{error.split('(')[0]}: mine"
    assert not any("runpy" in line or "cli.py" in line for line in said)


def test_a_syntax_error_is_shown_as_python_does(write, capsys):
    path = write("def (:\n")
    with pytest.raises(SystemExit, match="1"):
        main(["run", "--target-macs", "0.4", path])
    said = capsys.readouterr().err
    assert f'File "{path}", line 1' in said
    assert "runpy" not in said


def test_an_interrupt_stays_one(write):
    with pytest.raises(KeyboardInterrupt):
        main(["run", "--target-macs", "0.4", write("raise KeyboardInterrupt")])


def test_a_budget_out_of_reach_is_told_in_one_line(script, capsys):
    line = script("text_classification", "text", "--do_train")
    assert main(["run", "--target-macs", "0.05", "--", *line]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hf-tokenprune: ToP(target_macs=0.05) is out of reach")


BUILDS = """
import sys
sys.path.append({tests!r})
from training_helpers import top, trainer_for
import hf_tokenprune as tp
{body}
"""


def run_python(write, tmp_path, body, method="top", budget="0.5", schedule=SHORT):
    """Run lines that make Trainers by `made(...)`. Returns the exit status."""
    helper = "def made(model=None, **more):\n    return trainer_for('%s', model=model, max_steps=4, **more)\n" % (
        tmp_path / "out"
    )
    path = write(BUILDS.format(tests=str(SCRIPTS.parent), body=helper + body))
    return main(["run", "--method", method, "--target-macs", budget, *schedule, "--", path])


def test_a_trainer_that_has_the_callback_already_is_refused(write, tmp_path, capsys):
    assert run_python(write, tmp_path, "made(method=top())") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hf-tokenprune: The script's Trainer has a TokenPruneCallback already.")


@pytest.mark.parametrize("end", ["", "sys.exit(0)"])
def test_a_trainer_that_never_trains_prunes_nothing_and_says_so(write, tmp_path, capsys, end):
    assert run_python(write, tmp_path, f"made().evaluate()\n{end}") == 1
    assert "ended without training" in capsys.readouterr().err.splitlines()[-1]


def test_each_model_of_several_trainers_is_pruned(write, tmp_path):
    body = """
import gc, weakref
for fold in range(2):
    trainer = made()
    trainer.train()
    trainer.save_model(f"{sys.path[0]}/{fold}")
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None
"""
    assert run_python(write, tmp_path, body) == 0
    for fold in range(2):
        assert tp.from_pretrained(tmp_path / str(fold)).config.token_pruning["method"]["target_macs"] == 0.5


@pytest.mark.parametrize(("method", "parts"), [("top", []), ("structured+top", ["--parts", "heads"])])
def test_a_second_trainer_leaves_a_pruned_model_as_it_is(write, tmp_path, method, parts):
    """To predict, or to train on: what was selected and cut stays, and so does the number of callbacks. Heads alone do not save
    enough, so that tokens go, too."""
    body = f"""
unused = made()
model = unused.model
first = made(model)
whole = model.num_parameters()
assert len(model.token_pruner.sites) > 0 or model.token_pruner.structure is not None
assert unused.callback_handler.callbacks[0] is first.callback_handler.callbacks[0]
first.train()
kept = [site.kept.tolist() for site in model.token_pruner.sites.values()]
assert sum(map(sum, kept)) < sum(map(len, kept))
size = model.num_parameters()
assert (size < whole) == {method == "structured+top"}
second = made(model)
assert not any(isinstance(c, tp.TokenPruneCallback) for c in second.callback_handler.callbacks)
assert model.token_pruner.objective.moment.phase == "settle"
before = second.predict(second.eval_dataset).predictions
second.train()
assert (second.predict(second.eval_dataset).predictions != before).any()
assert kept == [site.kept.tolist() for site in model.token_pruner.sites.values()]
assert size == model.num_parameters()
"""
    assert run_python(write, tmp_path, body, method, "0.6", ["--schedule", "dense=1,anneal=2,settle=0", *parts]) == 0


def test_the_patch_lasts_as_long_as_the_context():
    original = Trainer.__init__
    with trainers_prune(tp.ToP(target_macs=0.4)):
        assert Trainer.__init__ is not original
        with pytest.raises(TypeError, match="nonsense"):
            Trainer(nonsense=1)
    assert Trainer.__init__ is original


def launched(launcher, line):
    """Run in processes of its own. Returns what was printed to stderr."""
    run = subprocess.run([*launcher, *line], capture_output=True, text=True, check=False, timeout=300)
    return run.returncode, run.stderr


def test_as_a_module_in_a_process_of_its_own(write):
    path = write("import sys\nfrom transformers import Trainer\nsys.exit(5 * (Trainer.__init__.__name__ == '__init__'))")
    assert launched([sys.executable, "-m", "hf_tokenprune"], ["run", "--target-macs", "0.4", path]) == (5, "")


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2 -m",
    "accelerate": "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --num_cpu_threads_per_process 1 -m",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher(script, home, tmp_path, launcher):
    line = script("text_classification", "text", "--do_train")
    start = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "hf_tokenprune", "run"]
    status, said = launched(start, ["--target-macs", "0.6", *SHORT, "--", *line])
    assert status == 0, said
    assert spent(tmp_path / "out", home)[1] == pytest.approx(0.6, abs=0.08)
    processes = 2 if launcher == "torchrun" else 1
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["epoch"] == processes  # 4 steps of 8 texts, of 32
