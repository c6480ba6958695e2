"""A disk that is full, for real: an error in the system's words, and what was saved before is there to the byte."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build, make_inputs, outputs_of
from test_shapes import cut_model
from training_helpers import Texts, at_home, top, trainer_for
from transformers import TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.cli import _write_json
from hf_tokenprune.writing import write_file

HEAD = "ForSequenceClassification"
STEPS, FULL = 12, 6  # of a run that saves every second step; it finds the disk full after the checkpoint of step 6


def earlier():
    return tp.attach(build("bert", HEAD), {1: tp.TopK(0.5)})


def later():
    """Other shapes, so that neither's config opens the other's weights."""
    return cut_model("bert", HEAD, "mixed")


SAVES = {  # what is saved over the earlier model
    "a smaller model": later,
    "the same again": earlier,
}


class Disk:
    """The disk of this test, which can be filled up."""

    def __init__(self, root):
        self.root, self.filler = root, root / "filler"

    def fill(self):
        try:
            with self.filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        except OSError:
            assert os.statvfs(self.root).f_bavail == 0

    def free(self):
        self.filler.unlink()


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def refusal(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', ()))}"
    return "it was written"


def logits(folder):
    return outputs_of(at_home(tp.from_pretrained(folder)), make_inputs("bert", HEAD))["logits"]


def opens(folder, expected):
    try:
        return torch.equal(logits(folder), expected)
    except Exception:
        return False


def save_over(disk, name):
    folder = disk.root / "model"
    shutil.rmtree(folder, ignore_errors=True)
    earlier().save_pretrained(folder)
    before, expected = digests(folder), logits(folder)
    model = SAVES[name]()
    with torch.no_grad():
        model.classifier.weight.add_(1)
    disk.fill()
    report = {"said": refusal(model.save_pretrained, folder), "intact": digests(folder) == before}
    report["opens"] = opens(folder, expected)
    report["new folder"] = refusal(model.save_pretrained, disk.root / "new")
    report["left in it"] = len(list((disk.root / "new").rglob("*")))
    disk.free()
    model.save_pretrained(folder)
    report["saved then"] = opens(folder, outputs_of(model, make_inputs("bert", HEAD))["logits"])
    return report


def write_over(disk):
    """The other files that this package writes."""
    report = {}
    for name, write in (
        ("json", lambda file, text: _write_json({"text": text}, file)),
        ("card", lambda file, text: write_file(file, text.encode())),
    ):
        file = disk.root / name
        write(file, "before")
        before = file.read_bytes()
        disk.fill()
        report[name] = {"said": refusal(write, file, "x" * 100_000), "intact": file.read_bytes() == before}
        disk.free()
        report[name]["left"] = [path.name for path in disk.root.iterdir() if path.name.startswith(".")]
    return report


class Filler(TrainerCallback):
    def __init__(self, disk):
        self.disk = disk

    def on_save(self, _, state, *__, **___):
        if state.global_step == FULL:
            self.disk.fill()


def trainer_of(folder, *callbacks):
    torch.manual_seed(0)
    return trainer_for(
        folder, top(), model=build("bert", HEAD), data=Texts(48), callbacks=callbacks, max_steps=STEPS,
        save_strategy="steps", save_steps=2, save_total_limit=2,
    )  # fmt: skip


def train_on(disk):
    folder, whole = disk.root / "run", disk.root / "whole"
    undisturbed = trainer_of(whole)
    undisturbed.train()
    shutil.rmtree(whole)
    report = {"said": refusal(trainer_of(folder, Filler(disk)).train)}
    last = folder / f"checkpoint-{FULL}"
    report["teacher"] = (folder / "_teacher" / "model.safetensors").exists()
    disk.free()
    shutil.rmtree(folder / f"checkpoint-{FULL + 2}", ignore_errors=True)
    resumed = trainer_of(folder)
    resumed.train(resume_from_checkpoint=str(last))
    expected = undisturbed.model.state_dict()
    report["same end"] = all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())
    return report


def main(root):
    disk = Disk(root)
    reports = {name: save_over(disk, name) for name in SAVES}
    for folder in ("model", "new"):
        shutil.rmtree(root / folder)
    return {"saves": reports, "files": write_over(disk), "run": train_on(disk)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What happened in a process that has a small disk of its own."""
    root = tmp_path_factory.mktemp("disk")
    (root / "mount").mkdir()
    here = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=6m tmpfs '{root}/mount'"
    if shutil.which("unshare") is None or subprocess.run([*here, mount], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(tp.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = f"{mount} && '{sys.executable}' '{__file__}' '{root}/mount' '{root}/reports.json'"
    done = subprocess.run([*here, run], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "reports.json").read_text())


@pytest.mark.parametrize("name", SAVES)
def test_a_model_saved_before_stays_as_it_was(reports, name):
    found = reports["saves"][name]
    for said in (found["said"], found["new folder"]):
        assert "No space left on device" in said
    assert "is as it was before" in found["said"]
    assert {key: found[key] for key in ("intact", "opens", "left in it", "saved then")} == {
        "intact": True, "opens": True, "left in it": 0, "saved then": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["json", "card"])
def test_other_files_stay_as_they_were(reports, name):
    found = reports["files"][name]
    assert "No space left on device" in found["said"]
    assert found["intact"]
    assert found["left"] == []


def test_a_run_resumes_from_its_last_checkpoint(reports):
    found = reports["run"]
    assert found["said"] != "it was written"
    assert found["teacher"]
    assert found["same end"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[2]).write_text(json.dumps(main(Path(sys.argv[1]))))
