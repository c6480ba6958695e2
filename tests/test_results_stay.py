"""What was measured of a model stays in its card for as long as the weights are those that it was measured of."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import build
from hub_server import run_as_writer, running_hub
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_bench import save
from training_helpers import top, trainer_for

import hf_tokenprune as tp
from hf_tokenprune.bench import bench
from hf_tokenprune.model_card import DATA, PLOT
from hf_tokenprune.publish import push
from hf_tokenprune.readme import write_card
from hf_tokenprune.results import joined, read_results
from hf_tokenprune.trainer_card import complete
from hf_tokenprune.weights import number_of


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a model that its Trainer has evaluated, and the score."""
    folder = tmp_path_factory.mktemp("measured")
    trainer = trainer_for(folder, top(), compute_metrics=lambda _: {"accuracy": 0.625})
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return folder


def card_of(folder):
    return ModelCard((Path(folder) / "README.md").read_text())


def has_results(card):
    found = [DATA in card.data.to_dict(), "model-index" in card.data.to_dict(), "0.6250" in card.text]
    assert len(set(found)) == 1
    return found[0]


def test_results_stay_with_weights_that_are_saved_again(measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "saved")
    (folder / PLOT).write_bytes(b"a picture")
    before = card_of(folder)
    assert has_results(before)
    model = tp.from_pretrained(folder)
    model.save_pretrained(folder)
    assert card_of(folder).data.to_dict()[DATA] == before.data.to_dict()[DATA]
    assert has_results(card_of(folder))
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(folder)
    assert not has_results(card_of(folder))


def test_results_are_of_a_selection_too(tmp_path):
    for keep in (0.5, 0.25):
        model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.TopK(keep)})
        model.token_pruner.evaluation = {"metric": "accuracy", "score": 0.625} if keep == 0.5 else None
        model.save_pretrained(tmp_path)
        assert has_results(card_of(tmp_path)) == (keep == 0.5)


def test_a_picture_stays_with_them(measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "saved")
    write_card(folder, card_of(folder).data.to_dict()[DATA], plot=True)
    assert f"({PLOT})" in card_of(folder).text
    tp.from_pretrained(folder).save_pretrained(folder)
    assert f"({PLOT})" in card_of(folder).text


def test_results_that_others_have_put_beside_the_weights_are_not_pushed(measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "saved")
    assert has_results(ModelCard(push(folder, "user/name", dry_run=True).card))
    model = tp.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    assert not has_results(ModelCard(push(folder, "user/name", dry_run=True).card))


PUSHER = """
import sys
import torch
import hf_tokenprune as tp
from hf_tokenprune.publish import push

push(sys.argv[1], "user/name")
model = tp.from_pretrained("user/name")
model.push_to_hub("user/name")
with torch.no_grad():
    model.classifier.bias.add_(1)
model.push_to_hub("user/name")
"""


def test_results_stay_on_the_hub(measured, tmp_path):
    with running_hub() as hub:
        run_as_writer(hub, PUSHER, shutil.copytree(measured, tmp_path / "saved"), home=tmp_path / "home")
        cards = [ModelCard(files["README.md"].decode()) for _, files in hub.repositories["user/name"].branches["main"]]
    assert [has_results(card) for card in (cards[0], cards[-2], cards[-1])] == [True, True, False]


def test_the_number_of_weights_is_of_what_they_say(tmp_path):
    """However many files they are in, and whatever else is saved with them."""
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.RankBins(bins=4)})
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert number_of(tmp_path / "one") == number_of(tmp_path / "many")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert number_of(tmp_path / "half") != number_of(tmp_path / "one")
    assert number_of(tmp_path) is None


def test_the_card_of_a_push_in_mid_training_is_of_the_weights_that_are_pushed(measured, tmp_path):
    """The Trainer copies them from the checkpoint after it has said that it will push."""
    folder, model = tmp_path / "out", tp.from_pretrained(measured)
    model.save_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.token_pruner.evaluation = {"metric": "accuracy", "score": 0.625}
    model.save_pretrained(folder / "checkpoint-6")
    complete(model, folder, 6)
    shutil.copy(folder / "checkpoint-6" / "model.safetensors", folder)
    tp.from_pretrained(folder).save_pretrained(folder)
    assert has_results(card_of(folder))


def test_weights_of_modules_beside_the_model_count(tmp_path):
    """Those of sentence-transformers; not those of other checkpoints."""
    tensor = {"linear.weight": torch.ones(2, 2)}
    save_file(tensor, tmp_path / "model.safetensors")
    alone = number_of(tmp_path)
    for name in ("2_Dense", "checkpoint-5"):
        (tmp_path / name).mkdir()
    save_file(tensor, tmp_path / "checkpoint-5" / "model.safetensors")
    assert number_of(tmp_path) == alone
    save_file(tensor, tmp_path / "2_Dense" / "model.safetensors")
    both = number_of(tmp_path)
    save_file({"linear.weight": torch.zeros(2, 2)}, tmp_path / "2_Dense" / "model.safetensors")
    assert len({alone, both, number_of(tmp_path)}) == 3


# Results that are named for a push


def dense_run(place, task="imdb", split="test", metric="accuracy"):
    """What a run of the benchmark tells of a dense model."""
    counts = {
        "reduction": {"true_length": 1.0, "padded": 2.0},
        "max_length": 64,
        "tokens": 20.0,
        "tokens_per_layer": [20.0] * 4,
    }
    run = {"method": "dense", "settings": None, "score": 0.875, "task": task, "split": split, "metric": metric, **counts}
    place.write_text(json.dumps(run))
    return place


def test_a_dense_score_on_something_else_is_refused(measured, tmp_path):
    """A Trainer's evaluation does not say what it is on; before anything else is done, so that a dry run tells."""
    other = dense_run(tmp_path / "stsb.json", "stsb", metric="pearson")
    for file in (other, dense_run(tmp_path / "imdb.json")):
        with pytest.raises(tp.errors.ConfigError, match=r"the score on the model's card is in accuracy \(task not known"):
            push(measured, "user/name", results=[file], dry_run=True)
    found = read_results([other])
    with pytest.raises(tp.errors.ConfigError, match=r"in pearson \(stsb, test\)"):
        joined({"metric": "pearson", "task": "stsb", "split": "validation", "score": 0.5}, found)
    same = joined({"metric": "pearson", "task": "stsb", "split": "test", "score": 0.5}, found)
    assert (same["score"], same["dense_score"]) == (0.5, 0.875)
    assert joined({"metric": "accuracy", "score": 0.5}, {"latency": {}})["metric"] == "accuracy"


def test_a_dense_score_goes_when_a_score_on_something_else_comes():
    before = {"metric": "accuracy", "score": 0.5, "dense_score": 0.75}
    run = {"metric": "pearson", "task": "stsb", "split": "test", "score": 0.25}
    assert joined(before, run) == run
    assert joined({**run, "dense_score": 0.5}, run) == {**run, "dense_score": 0.5}


def test_times_of_other_weights_or_another_selection_are_refused(tmp_path):
    folders = [tmp_path / name for name in ("one", "trained", "selects")]
    for folder, shift, keep in zip(folders, (0, 1, 0), (0.5, 0.5, 0.25), strict=True):
        model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.TopK(keep)})
        model.classifier.bias.data += shift
        save(folder, model)
    file = tmp_path / "bench.json"
    result = bench(folders[0], ["the cat"], batch_sizes=[1], repeats=1)
    file.write_text(json.dumps(result))
    assert "Milliseconds per text" in push(folders[0], "user/name", results=[file], dry_run=True).card
    for other in folders[1:]:
        with pytest.raises(tp.errors.ConfigError, match="another model: of other weights"):
            push(other, "user/name", results=[file], dry_run=True)
    del result["weights"]  # of an earlier version
    file.write_text(json.dumps(result))
    assert push(folders[1], "user/name", results=[file], dry_run=True)
