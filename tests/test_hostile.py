"""A folder made to do harm: `hf_tokenprune.from_pretrained` refuses it in words or opens it, and never runs or reads what is not its
own, nor takes much memory or time."""

import json
import os
import shutil
import struct

import pytest
import torch
from families import build, outputs_of
from other_process import run_offline
from safetensors.torch import load_file, save_file
from test_shapes import cut_model

import hf_tokenprune as tp

HEAD = "ForSequenceClassification"
BAIT = "BAIT"  # is written by whatever gets executed
EVIL = f"import os, pathlib\npathlib.Path(__file__).with_name({BAIT!r}).write_text('executed')\nclass Model: pass\n"

# The other process: opens each folder with an ear on what Python does, and little memory to spare.
INSIDE = """
import json, os, resource, signal, sys, traceback, warnings
warnings.simplefilter("ignore")
root = os.path.realpath(sys.argv[1])
import torch, transformers
import transformers.modeling_utils
import hf_tokenprune as tp
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

homes = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), *filter(None, sys.path[1:]))
homes = (*(os.path.abspath(home) + "/" for home in homes), "/proc/", "/sys/", "/usr/share/zoneinfo/")
heard = None

def listen(event, args):
    if heard is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.startswith(homes):
            heard["open"].append(path)
    elif event in ("exec", "compile"):
        name = args[0].co_filename if event == "exec" else args[1]
        if root in str(name):
            heard["run"].append(f"{event} {name}")
    elif event == "import" and "transformers_modules" in args[0]:
        heard["run"].append(f"{event} {args[0]}")
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class"):
        heard["run"].append(f"{event} {args[:2]}")

sys.addaudithook(listen)
ids, mask = torch.tensor([[3, 9, 7, 6, 5, 8]]), torch.ones(1, 6, dtype=torch.long)
if os.path.exists("/proc/self/statm"):  # not on macOS, which limits no address space either
    here = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 2**30, here + 2**30))
PEAK = 1024 if sys.platform == "linux" else 1024**2  # units of ru_maxrss in a megabyte

def attempt(load, folder):
    global heard
    heard = {"open": [], "run": []}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(60)
    try:
        model = load(folder)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        report = {"class": f"{type(model).__module__}.{type(model).__qualname__}", "logits": logits.tolist()}
    except BaseException as error:
        report = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error), "trace": traceback.format_exc()}
    signal.alarm(0)
    report.update(heard, megabytes=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / PEAK)
    heard = None
    return report

def stop(*_):
    raise TimeoutError("a minute is over")

signal.signal(signal.SIGALRM, stop)
reports = {}
for load in (tp.from_pretrained, transformers.AutoModelForSequenceClassification.from_pretrained):  # what is read only once
    load(f"{root}/good")
for name, compare in json.load(open(f"{root}/names.json")):
    folder = f"{root}/{name}/deep/model"
    plain = transformers.AutoModelForSequenceClassification.from_pretrained
    reports[name] = {"ours": attempt(tp.from_pretrained, folder), "plain": attempt(plain, folder) if compare else {"open": []}}
json.dump(reports, open(f"{root}/reports.json", "w"))
"""


def bins_model():
    selector = tp.RankBins(5)
    selector.set_kept([1, 1, 0, 1, 0])
    return tp.attach(build("bert", HEAD), {1: selector, 2: tp.TopK(0.5)})


def packed(name, head=HEAD):
    return lambda: tp.pack(build(name, head))


def skim_model():
    sampler = tp.Skim(hidden=32, width=4)
    sampler.offset.fill_(0.5)
    return tp.attach(build("bert", HEAD), {1: sampler})


def cut():
    return cut_model("bert", HEAD, "mixed")


# What can be done to a folder. Each is called with the folder.


def config(**entries):
    """Other entries in config.json."""

    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return change


def pruning(**entries):
    """Other entries in config.token_pruning."""

    def change(folder):
        old = json.loads((folder / "config.json").read_text())["token_pruning"]
        config(token_pruning={**old, **entries})(folder)

    return change


def selector(**settings):
    return pruning(sites=[{"layer": 1, "selector": settings}])


def shapes(**entries):
    def change(folder):
        old = json.loads((folder / "config.json").read_text())["token_pruning"]["shapes"]
        pruning(shapes={**old, **entries})(folder)

    return change


def tensor(ending, value):
    """Another tensor in the place of one of token_pruner; None takes it away."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        (name,) = [name for name in tensors if name.startswith("token_pruner.") and name.endswith(ending)]
        new = value(tensors.pop(name))
        if new is not None:
            tensors[name] = new
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def weights(content):
    """Other bytes in the place of the weights."""
    return lambda folder: (folder / "model.safetensors").write_bytes(content((folder / "model.safetensors").read_bytes()))


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def python_files(**entries):
    """Code that lies in the folder and above it, and a config that leads there."""

    def change(folder):
        for place in (folder, folder.parent, folder.parent.parent):
            for name in ("evil", "modeling_token_pruned", "configuration_bert", "__init__", "conftest"):
                (place / f"{name}.py").write_text(EVIL)
        config(**entries)(folder)

    return change


class Pickled:
    """Executes something when it is unpickled."""

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return os.system, (f"touch {self.where}",)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"bert.x": Pickled(folder / BAIT)}, folder / "pytorch_model.bin")


def linked(name, target):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def shards(place):
    """An index that says that the weights lie elsewhere."""

    def change(folder):
        names = list(load_file(folder / "model.safetensors"))
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        where = place or str((folder.parent / "outside.safetensors").resolve())
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, where)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


NAN, HUGE = float("nan"), 10**15
REFUSED = {  # how -> model, change, error, what it says
    "bins beyond memory": (bins_model, selector(kind="rank_bins", bins=HUGE), "ConfigError", "bins"),
    "bins infinite": (bins_model, selector(kind="rank_bins", bins=float("inf")), "ConfigError", "bins"),
    "bins NaN": (bins_model, selector(kind="rank_bins", bins=NAN), "ConfigError", "bins"),
    "keep NaN": (bins_model, selector(kind="top_k", keep=NAN), "ConfigError", "keep"),
    "keep infinite": (bins_model, selector(kind="top_k", keep=float("inf")), "ConfigError", "keep"),
    "keep negative": (bins_model, selector(kind="top_k", keep=-3), "ConfigError", "keep"),
    "keep as a list": (bins_model, selector(kind="top_k", keep=[1]), "ConfigError", "keep"),
    "a kind that is a path": (bins_model, selector(kind="../../evil"), "ConfigError", "kind"),
    "a setting with a long name": (bins_model, selector(kind="top_k", **{"k" * 10_000: 1}), "ConfigError", "settings"),
    "a setting that is python's": (bins_model, selector(kind="top_k", __class__="os"), "ConfigError", "settings"),
    "a selector that is self": (bins_model, selector(kind="top_k", self=1), "ConfigError", "settings"),
    "a layer that is NaN": (bins_model, pruning(sites=[{"layer": NAN, "selector": {"kind": "top_k"}}]), "ConfigError", "layer"),
    "a layer beyond all": (bins_model, pruning(sites=[{"layer": HUGE, "selector": {"kind": "top_k"}}]), "ConfigError", "layer"),
    "sites without end": (
        bins_model, pruning(sites=[{"layer": i, "selector": {"kind": "rank_bins", "bins": 9999}} for i in range(20_000)]),
        "ConfigError", "sites",
    ),
    "ids without end": (bins_model, pruning(protected_token_ids=list(range(10**6))), "ConfigError", "protected_token_ids"),
    "ids negative": (bins_model, pruning(protected_token_ids=[-1]), "ConfigError", "protected_token_ids"),
    "a version that is NaN": (bins_model, pruning(version=NAN), "ConfigError", "version"),
    "a version beyond all": (bins_model, pruning(version=HUGE), "ConfigError", "Upgrade"),
    "a whole book": (bins_model, config(token_pruning="x" * 10**6), "ConfigError", "not a dictionary"),
    "a wide sampler": (skim_model, selector(kind="skim", hidden=32, width=HUGE), "ConfigError", "width"),
    "a sampler of another model": (skim_model, selector(kind="skim", hidden=10**6, width=10**4), "ConfigError", "hidden units"),
    "a sampler wider than its weights": (skim_model, selector(kind="skim", hidden=32, width=10**4), "RuntimeError", "size"),
    "heads negative": (cut, shapes(layers=[{"layer": 0, "heads": -1, "units": 5}]), "ConfigError", "layer"),
    "units beyond memory": (cut, shapes(layers=[{"layer": 0, "heads": 2, "units": HUGE}]), "ConfigError", "layer"),
    "units NaN": (cut, shapes(layers=[{"layer": 0, "heads": 2, "units": NAN}]), "ConfigError", "layer"),
    "layers without end": (
        cut, shapes(layers=[{"layer": i, "heads": 1, "units": 1} for i in range(10**5)]), "ConfigError", "layers",
    ),
    "a shape map of a path": (cut, pruning(shapes="/etc/passwd"), "ConfigError", "shape"),
    "restore beyond memory": (cut, shapes(restore={"hidden_size": HUGE}), "ConfigError", "restore"),
    "restore of anything": (cut, shapes(restore={"__class__": 1}), "ConfigError", "restore"),
    "dense NaN": (cut, shapes(dense={"hidden_size": NAN}), "ConfigError", "dense"),
    "other units than the weights": (
        cut, shapes(layers=[{"layer": 0, "heads": 1, "units": 1}]), "RuntimeError", "size",
    ),
    "a model of layers without end": (bins_model, config(num_hidden_layers=10**8), "ConfigError", "num_hidden_layers"),
    "layers that a list is made of": (packed("modernbert"), config(num_hidden_layers=10**8), "ConfigError", "num_hidden_layers"),
    "layers under another name": (packed("distilbert"), config(n_layers=10**8), "ConfigError", "n_layers"),
    "layers of a part": (
        packed("siglip", "ForImageClassification"), config(vision_config={"num_hidden_layers": 1e12}),
        "ConfigError", "num_hidden_layers",
    ),
    "groups without end": (packed("albert"), config(num_hidden_groups=10**8), "ConfigError", "num_hidden_groups"),
    "groups within groups": (packed("albert"), config(inner_group_num=10**8), "ConfigError", "inner_group_num"),
    "labels without end": (bins_model, config(num_labels=10**8), "ConfigError", "num_labels"),
    "a vocabulary without end": (bins_model, config(vocab_size=10**12), "RuntimeError", "size"),
    "positions without end": (bins_model, config(max_position_embeddings=10**12), "RuntimeError", "size"),
    "a model wider than its weights": (bins_model, config(hidden_size=4 * 10**9), "RuntimeError", "size"),
    "a model far wider than its weights": (bins_model, config(hidden_size=40_000, num_attention_heads=40), "RuntimeError", "size"),
    "a model of negative width": (bins_model, config(hidden_size=-32), "Exception", ""),
    "words for numbers": (bins_model, config(hidden_size="32"), "Exception", ""),
    "words for layers": (bins_model, config(num_hidden_layers="4"), "Exception", ""),
    "a class of another family": (bins_model, config(architectures=["ViTForImageClassification"]), "UnsupportedModelError", "ViT"),
    "a class that loads others": (bins_model, config(architectures=["RagModel"]), "UnsupportedModelError", "RagModel"),
    "the base of all classes": (bins_model, config(architectures=["PreTrainedModel"]), "UnsupportedModelError", "architectures"),
    "a class without a model in it": (
        bins_model, config(architectures=["BertPreTrainedModel"]), "UnsupportedModelError", "BertPreTrainedModel",
    ),
    "a class by its path": (bins_model, config(architectures=["../../evil.Model"]), "UnsupportedModelError", "architectures"),
    "a model type nobody knows": (
        bins_model, python_files(model_type="evil", auto_map={"AutoConfig": "evil.Model"}), "ValueError", "trust_remote_code",
    ),
    "kept of another length": (bins_model, tensor("1.kept", lambda _: torch.ones(7, dtype=torch.int8)), "RuntimeError", "size"),
    "kept of other numbers": (bins_model, tensor("1.kept", lambda old: old + 6), "ConfigError", "kept"),
    "kept negative": (bins_model, tensor("1.kept", lambda old: -old), "ConfigError", "kept"),
    "kept gone": (bins_model, tensor("1.kept", lambda _: None), "ConfigError", "kept"),
    "offset NaN": (skim_model, tensor("offset", lambda old: old * NAN), "ConfigError", "samplers"),
    "offset of many": (skim_model, tensor("offset", lambda _: torch.ones(3)), "RuntimeError", "size"),
    "a sampler half gone": (skim_model, tensor("net.1.weight", lambda _: None), "ConfigError", "samplers"),
    "weights cut short": (bins_model, weights(lambda old: old[: len(old) // 2]), "SafetensorError", ""),
    "weights that are none": (bins_model, weights(lambda _: b"\x80\x04not weights"), "SafetensorError", ""),
    "a header without end": (bins_model, weights(lambda old: struct.pack("<Q", 2**62) + old), "SafetensorError", ""),
    "a tensor without end": (
        bins_model, weights(lambda _: header(x={"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]})),
        "SafetensorError", "",
    ),
    "pickled weights": (bins_model, pickled, "OSError", "safetensors"),
    "a config that is none": (bins_model, lambda folder: (folder / "config.json").write_bytes(b"\x00\xff" * 99), "Exception", ""),
    "weights that are a link to elsewhere": (bins_model, linked("model.safetensors", "/etc/hostname"), "SafetensorError", ""),
    "weights that are a link to themselves": (bins_model, linked("model.safetensors", "model.safetensors"), "OSError", ""),
    "a config that is a link to elsewhere": (bins_model, linked("config.json", "/etc/hostname"), "ConfigError", ""),
}  # fmt: skip
MAPS = {
    "evil file": {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Model", "AutoModel": "evil.Model"},
    "paths": {"AutoModelForSequenceClassification": "../../evil.Model", "AutoConfig": "/etc/passwd.Model"},
    "another repository": {"AutoModelForSequenceClassification": "someone/evil--evil.Model"},
    "its own code": {"AutoModelForSequenceClassification": "modeling_token_pruned.TokenPrunedBertForSequenceClassification"},
}
OPENED = {  # what changes nothing
    **{f"auto_map: {name}": (bins_model, python_files(auto_map=auto_map)) for name, auto_map in MAPS.items()},
    "paths in the settings": (
        bins_model, pruning(method={"name": "top", "teacher": "../../../etc/passwd", "schedule": ["/etc/shadow"] * 99}),
    ),
    "a name that is a path": (bins_model, config(_name_or_path="/etc/passwd", name_or_path="../../outside")),
    "kept of another type": (bins_model, tensor("1.kept", lambda old: old.double())),
    "files of all kinds": (bins_model, python_files()),
    "a sampler that cannot tell": (
        skim_model, tensor("net.4.weight", lambda old: old * NAN),  # drops nothing rather than everything
    ),
}  # fmt: skip
LIKE_TRANSFORMERS = {  # where transformers itself follows a path, we do as it does and no more
    "shards above": (bins_model, shards("../outside.safetensors")),
    "shards by their path": (bins_model, shards("")),
    "an adapter of another model": (
        bins_model,
        lambda folder: (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "/etc", "peft_type": "LORA"})
        ),
    ),
}
TABLE = {**REFUSED, **OPENED, **LIKE_TRANSFORMERS}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    for name, (make, change, *_) in TABLE.items():
        folder = root / place(name) / "deep" / "model"
        make().save_pretrained(folder)
        change(folder)
    (root / "names.json").write_text(json.dumps([(place(name), name in LIKE_TRANSFORMERS) for name in TABLE]))
    bins_model().save_pretrained(root / "good")
    return root, run_offline(root, INSIDE)


def place(name):
    return f"row{list(TABLE).index(name)}"


@pytest.mark.parametrize("name", TABLE)
def test_nothing_is_run_and_nothing_read_that_transformers_does_not_read(reports, name):
    root, found = reports
    ours, plain = found[place(name)]["ours"], found[place(name)]["plain"]
    assert ours["run"] == []
    assert not list((root / place(name)).rglob(BAIT))
    own = os.path.realpath(root / place(name) / "deep" / "model")
    elsewhere = {path for path in ours["open"] if not path.startswith(own + "/")}
    assert elsewhere <= set(plain["open"])
    assert not [path for path in ours["open"] if path.endswith(".py")]


@pytest.mark.parametrize("name", TABLE)
def test_no_memory_is_taken(reports, name):
    ours = reports[1][place(name)]["ours"]
    assert ours["megabytes"] < 100
    assert not {"MemoryError", "TimeoutError", "RecursionError"} & {*ours.get("error", ())}, ours["trace"]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_words(reports, name):
    ours = reports[1][place(name)]["ours"]
    _, _, error, message = REFUSED[name]
    assert "error" in ours, "it opened"
    assert error in ours["error"], ours["trace"]
    assert message in ours["message"]
    assert 10 < len(ours["message"]) < 3000


@pytest.mark.parametrize("name", OPENED)
def test_what_matters_not_changes_nothing(reports, name):
    ours = reports[1][place(name)]["ours"]
    assert ours.get("class") == "hf_tokenprune.modeling.modeling_token_pruned.TokenPrunedBertForSequenceClassification", ours
    model = build("bert", HEAD) if name == "a sampler that cannot tell" else bins_model()
    inputs = {"input_ids": torch.tensor([[3, 9, 7, 6, 5, 8]]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    torch.testing.assert_close(torch.tensor(ours["logits"]), outputs_of(model, inputs)["logits"], rtol=0, atol=1e-5)


def test_the_ear_hears(tmp_path):
    """With trust, transformers runs what it finds; a test that hears nothing then would hear nothing ever."""
    folder = tmp_path / "deep" / "model"
    bins_model().save_pretrained(folder)
    (tmp_path / "names.json").write_text("[]")
    bins_model().save_pretrained(tmp_path / "good")
    code = (
        INSIDE
        + f"""
heard = None
plain = transformers.AutoModelForSequenceClassification.from_pretrained
with open({str(tmp_path / "heard.json")!r}, "w") as file:
    json.dump(attempt(lambda folder: plain(folder, trust_remote_code=True), {str(folder)!r}), file)
"""
    )
    run_offline(tmp_path, code)
    heard = json.loads((tmp_path / "heard.json").read_text())
    assert any("transformers_modules" in event for event in heard["run"])
    assert any(event.startswith("exec ") for event in heard["run"])
    assert any(path.endswith(".py") for path in heard["open"])
