"""Importance that is learned: scorers at the sites of ToP foresee what the teacher's judgement hangs on."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from families import build, make_inputs, outputs_of
from reference import DEPTH, Reference, Rule, bins
from test_pruning import LENGTHS, PATTERN, SUMMARY, assert_same_samples
from torch.nn.functional import layer_norm, normalize
from training_helpers import Rows, Texts, no_dropout, put_checkpoint, spent_share, stack, top, trainer_for
from transformers import TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.methods import saliency
from hf_tokenprune.methods.saliency import SaliencyLoss, _said, from_here_on
from hf_tokenprune.schedule import Moment
from hf_tokenprune.surgery import operate
from hf_tokenprune.trainer import group_of

HEAD = "ForSequenceClassification"
# Where the context of all heads is read.
READERS = {
    "bert": "attention.output.dense",
    "distilbert": "attention.out_lin",
    "modernbert": "attn.Wo",
    "qwen3": "self_attn.o_proj",
    "mpnet": "attention.attn.o",  # in MPNet what this makes of it is what attention gives
    "deberta-v2": "attention.output.dense",
}
CASES = [
    *((name, "ForTokenClassification") for name in READERS), ("bert", "ForQuestionAnswering"), ("bert", HEAD), ("bert", "Model"),
]  # fmt: skip


def learning(**settings):
    return top(importance="learned", rank_weight=0.0, **settings)


def learned(seed, hidden=32, width=32, near=0):
    """A selector whose scorer was trained: attention counts, and the states count for as much."""
    torch.manual_seed(seed + 70)
    selector = tp.RankBins(len(PATTERN), hidden, width, near)
    selector.set_kept(PATTERN)
    with torch.no_grad():
        for parameter in selector.scorer.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return selector


def pruned(name, head, make=learned):
    model = tp.pack(build(name, head, **no_dropout(name)))
    width = model.get_submodule(reader_paths(model, name)[0]).in_features
    return tp.attach(model, {layer: make(layer, width=width) for layer in model.token_pruner.possible_sites()})


def reader_paths(model, name):
    return [path for path, _ in model.named_modules() if path.endswith(READERS[name])]


class LearnedReference(Reference):
    """The masked dense model, in which the scores are written out."""

    def __init__(self, model, name, selectors):
        super().__init__(model, {layer: Rule(bins(PATTERN), SUMMARY[name]) for layer in selectors}, causal=SUMMARY[name] < 0)
        self.selectors = selectors
        for path in reader_paths(model, name):
            model.get_submodule(path).register_forward_hook(
                lambda _, args, output: setattr(self, "context", output if name == "mpnet" else args[0])
            )

    def _received(self, row, living):
        scorer = self.selectors[self.number].scorer
        score = scorer.received * (len(living) * super()._received(row, living)).log()  # the length shifts all of a text alike
        entered, context = (layer_norm(states[row], states[row].shape[-1:]) for states in (self.entered, self.context))
        score = score + entered @ scorer.entered[0] + context @ scorer.context[0]
        if scorer.near:
            told = entered @ scorer.entered[1] + context @ scorer.context[1]
            for number, place in enumerate(living):
                some = living[max(number - scorer.near, 0) : number + scorer.near + 1]
                score[place] = score[place] + told[some].mean()
        return score


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("near", [0, 2])
@pytest.mark.parametrize(("name", "head"), CASES)
def test_pruned_equals_masked(name, head, near):
    model = pruned(name, head, lambda layer, **sizes: learned(layer, near=near, **sizes))
    inputs = make_inputs(name, head, LENGTHS)
    dense = build(name, head, **no_dropout(name))
    dense.config._attn_implementation = "eager"
    reference = LearnedReference(dense, name, {int(layer): site for layer, site in model.token_pruner.sites.items()})
    assert_same_samples(run(model, inputs), reference, inputs)
    assert sum(model.token_pruner.trace[2].survived) < 0.6 * sum(model.token_pruner.trace[0].arrived)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_before_training_it_is_attention_received(name, head):
    def untrained(_, **sizes):
        selector = tp.RankBins(len(PATTERN), **({"hidden": 32, **sizes} if sizes["width"] else {}))
        selector.set_kept(PATTERN)
        return selector

    inputs = make_inputs(name, head, LENGTHS)
    found = outputs_of(pruned(name, head, untrained), inputs)
    expected = outputs_of(pruned(name, head, lambda layer, **_: untrained(layer, width=None)), inputs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_it_costs_what_it_reads():
    model, inputs = pruned("bert", "ForTokenClassification"), make_inputs("bert", "ForTokenClassification", LENGTHS)
    run(model, inputs)
    with_scorers, entered = sum(tp.cost.trace_macs(model)), [sum(layer.entered) for layer in model.token_pruner.trace]
    assert with_scorers - sum(tp.cost.trace_macs(free(model))) == 64 * sum(entered)
    for site in model.token_pruner.sites.values():
        site.set_kept([1] * len(PATTERN))
    run(model, inputs)
    assert tp.cost.trace_macs(model) == tp.cost.dense_macs(model, LENGTHS), "where nobody goes, nobody is looked at"


def free(model):
    """The same model and its trace, without scorers."""
    model = copy.deepcopy(model)
    for site in model.token_pruner.sites.values():
        site.scorer = None
    return model


@pytest.mark.parametrize("near", [0, 3])
def test_it_is_saved_and_loaded(tmp_path, near):
    model = pruned("bert", "ForQuestionAnswering", lambda layer, **sizes: learned(layer, near=near, **sizes))
    inputs = make_inputs("bert", "ForQuestionAnswering", LENGTHS)
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    found = outputs_of(tp.from_pretrained(tmp_path), inputs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "sizes", [(32, None), (None, 32), (0, 32), (32, 2.0), (True, 32), ("32", 32), (None, None, 3), (32, 32, -1), (32, 32, 2.0)]
)
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(tp.errors.ConfigError, match="RankBins"):
        tp.RankBins(4, *sizes)


# What it is taught.


@pytest.mark.parametrize("head", [HEAD, "ForQuestionAnswering"])
def test_saliency_is_the_gradient_of_what_the_dense_model_says(tmp_path, head):
    labels = {"start_positions": 1, "end_positions": 2} if head != HEAD else {"labels": 1}
    model = build("bert", head, **no_dropout())
    data = Rows("bert", head, lambda _: {name: torch.full((6,), value) for name, value in labels.items()})
    trainer = trainer_for(
        tmp_path, learning(teacher=build("bert", head, seed=5), schedule=tp.Schedule(dense=0)), model=model,
        max_steps=1, data=data, data_collator=stack,
    )  # fmt: skip
    seen = []
    take = SaliencyLoss.trace

    class Spy(TrainerCallback):
        def on_step_begin(self, *_, model=None, **__):
            loss = model.token_pruner.objective.helpers[-1]
            assert isinstance(loss, SaliencyLoss)

            def trace(objective, taught):
                take(loss, objective, taught)
                seen.append((objective.pruner.last_forward.input_ids, loss.targets))

            loss.trace = trace

    trainer.add_callback(Spy())
    trainer.train()
    ids, found = seen[0]
    dense = build("bert", head, seed=5, **no_dropout())
    dense.config._attn_implementation = "eager"
    states = []
    for layer in dense.base_model.encoder.layer:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    output = dense(input_ids=ids, attention_mask=(ids != 0).long())
    said = 0
    for name in [name for name in output if name.endswith("logits")]:
        for row, text in zip(output[name], ids, strict=True):
            row = row if head == HEAD else row[: int((text != 0).sum())]
            above = row.softmax(0).detach() - 1 / len(row)
            said = said + (above / above.norm() * row).sum()
    norms = [gradient.norm(dim=-1).masked_fill(ids == 0, 0) for gradient in torch.autograd.grad(said, states)]
    shares = [norm / norm.sum(1, keepdim=True) for norm in norms]
    assert list(found) == list(range(DEPTH if head != HEAD else DEPTH - 1))
    for site, target in found.items():
        torch.testing.assert_close(target, sum(shares[site:]), atol=1e-5, rtol=0)


def trained(folder, resume=None, **arguments):
    settings = arguments.pop("settings", {})
    trainer = trainer_for(folder, learning(**settings), **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_scorers_learn_to_foresee_and_the_budget_is_met(tmp_path):
    torch.manual_seed(0)
    trainer = trained(tmp_path, max_steps=90, per_device_train_batch_size=16, logging_steps=5, data=Texts(320))
    losses = [entry["importance"] for entry in trainer.state.log_history if "importance" in entry]
    assert len(losses) == 12, "while annealing and while settling"
    assert losses[-1] < 0.6 * losses[0]
    assert spent_share(trainer.model, Texts(64, seed=2)) < 0.53


def test_scorers_have_a_gradient_in_every_step(tmp_path):
    """As distributed training wants."""

    class Gradients(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, *_, model=None, **__):
            self.seen.append([p.grad is not None for site in model.token_pruner.sites.values() for p in site.parameters()])

    look = Gradients()
    trained(tmp_path, callbacks=[look])
    assert look.seen == [[True] * 9] * 12


@pytest.mark.parametrize("step", [2, 6, 10])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(tmp_path, step):
    def go(folder, resume=None):
        torch.manual_seed(0)
        saves = {"save_strategy": "steps", "save_steps": 1, "data": Texts(48), "model": build("bert", HEAD)}
        return trained(folder, resume, **saves).model.state_dict()

    expected = copy.deepcopy(go(tmp_path / "whole"))
    found = go(tmp_path / "again", put_checkpoint(tmp_path / "whole", tmp_path / "again", step, dense=0))
    assert any(".scorer." in name for name in expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2"])
def test_families_that_compute_attention_themselves_learn_it_too(tmp_path, name):
    torch.manual_seed(0)
    model = build(name, HEAD, **no_dropout(name))
    trainer = trained(tmp_path, model=model, max_steps=60, per_device_train_batch_size=16, logging_steps=5, data=Texts(320))
    losses = [entry["importance"] for entry in trainer.state.log_history if "importance" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert spent_share(trainer.model, Texts(64, seed=2)) < 0.53


@pytest.mark.parametrize(("name", "layer_weight"), [("bert", 0.0), ("bert", 1.0), ("deberta-v2", 1.0)])
def test_activation_checkpointing_changes_nothing(tmp_path, name, layer_weight):
    states = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        asked = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
        settings = {"layer_weight": layer_weight, "gate_lr": 2.0}
        model = build(name, HEAD)
        states.append(trained(tmp_path, settings=settings, model=model, **(asked if checkpointing else {})).model.state_dict())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_pruned_model_may_be_trained_further_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model, inputs = pruned("bert", HEAD).train(), make_inputs("bert", HEAD, LENGTHS)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert sum(model.token_pruner.trace[2].survived) < sum(model.token_pruner.trace[0].arrived)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())


def test_a_model_that_has_it_can_be_trained_on_and_opened_for_evaluation(tmp_path):
    model = trained(tmp_path).model
    before = {name: value.clone() for name, value in model.token_pruner.sites.state_dict().items()}
    tp.TokenPruneCallback(learning()).attach(model)
    found = model.token_pruner.sites.state_dict()
    assert sorted(model.token_pruner.sites) == [str(layer) for layer in range(DEPTH - 1)]
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_a_text_that_is_not_finite_matters_to_no_other():
    model = pruned("bert", "Model", lambda layer, **sizes: learned(layer, near=2, **sizes))
    inputs = {"input_ids": torch.full((2, 12), 9), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    inputs["input_ids"][0, 3] = 5
    good = run(model, {key: value[1:] for key, value in inputs.items()}).last_hidden_state
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] = float("nan")
    # Beside another text it may be computed by other kernels; on one kind of CPU it is off by 1e-6.
    torch.testing.assert_close(run(model, inputs).last_hidden_state[1:], good, rtol=0, atol=1e-5)


def test_a_model_with_neighbours_keeps_its_selection():
    model = build("bert", HEAD)
    tp.TokenPruneCallback(tp.ToP(target_macs=0.6, neighbours=3)).attach(model)
    for site in model.token_pruner.sites.values():
        site.set_kept([1] * 20 + [0] * 30)
    tp.TokenPruneCallback(tp.ToP(target_macs=0.6)).attach(model)
    assert [(site.near, int(site.kept.sum())) for site in model.token_pruner.sites.values()] == [(3, 20)] * (DEPTH - 1)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"importance": "hidden"}, "importance"),
        ({"importance": "learned", "teacher": None}, "teacher"),
        ({"importance": "learned", "rank_weight": 0.1}, "rank_weight"),
        ({"importance_weight": -1}, "importance_weight"),
        ({"importance": "attention", "importance_weight": 2.0}, "importance_weight"),
        ({"importance": "attention", "neighbours": 2}, "neighbours"),
        ({"neighbours": -1}, "neighbours"),
        ({"neighbours": 2.0}, "neighbours"),
        ({"site_gates": 0.0}, "site_gates"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(tp.errors.ConfigError, match=why):
        tp.ToP(target_macs=0.4, **settings)


def test_by_default_it_is_learned_where_it_can_be():
    sites = {}
    for name, settings in (("bert", {}), ("bert", {"teacher": None}), ("bert", {"rank_weight": 0.1}), ("deberta-v2", {})):
        model = build(name, HEAD)
        tp.ToP(target_macs=0.4, **settings).attach(model)
        sites[name, *settings] = {int(layer): site.scorer is not None for layer, site in model.token_pruner.sites.items()}
    learned, others = [sites.pop((name,)) for name in ("bert", "deberta-v2")], list(sites.values())
    assert learned == [dict.fromkeys(range(DEPTH - 1), True)] * 2
    assert others == [dict.fromkeys(range(1, DEPTH - 1), False)] * 2


def test_where_it_is_not_there_it_is_refused():
    with pytest.raises(tp.errors.ConfigError, match="learned"):
        tp.Compose(tp.StructuredPruning(), tp.ToP(importance="learned"), target_macs=0.4, teacher=None)
    with pytest.raises(tp.errors.ConfigError, match=r"neighbours.*from a teacher"):
        tp.Compose(tp.StructuredPruning(), tp.ToP(neighbours=3), target_macs=0.4, teacher=None)
    with pytest.raises(tp.errors.ConfigError, match="importance_weight"):
        tp.ToP(target_macs=0.5, rank_weight=0.1, importance_weight=2.0).attach(build("bert", HEAD))


@pytest.mark.parametrize(
    ("say", "separate"),
    [
        (lambda x: (normalize(x), None), False),  # an embedding of constant length
        (lambda x: (layer_norm(x, x.shape[-1:]), None), False),
        (lambda x: (5 + 0.01 * x, torch.ones_like(x, dtype=torch.bool)), True),  # sure of every label
        (lambda x: (x[:, :1], torch.ones_like(x[:, :1], dtype=torch.bool)), True),
    ],
)
def test_whatever_is_said_has_a_gradient(say, separate):
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(_said(*say(x), separate), x)
    assert (gradient.norm(dim=-1) > 1e-3).all()


def test_scorers_want_gradients_only_where_they_are_taught():
    model = pruned("bert", HEAD)
    assert not any(p.requires_grad for p in model.token_pruner.sites.parameters())
    tp.TokenPruneCallback(learning()).attach(model)
    assert all(p.requires_grad for p in model.token_pruner.sites.parameters())


def test_the_teacher_goes_when_the_run_is_over(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, model=None, **__):
            teacher = model.token_pruner.objective.teacher
            if teacher is not None and not seen:
                seen.append(weakref.ref(teacher))

    trainer = trainer_for(tmp_path, learning(), callbacks=[Watch()])
    trainer.train()
    gc.collect()
    assert [reference() for reference in seen] == [None]


def test_the_rate_is_that_of_the_group_with_the_gates():
    model = build("bert", HEAD)
    tp.TokenPruneCallback(learning()).attach(model)
    pruner = model.token_pruner
    gates, scorers = list(pruner.training_state.parameters()), list(pruner.sites.parameters())
    optimizer = torch.optim.AdamW([{"params": scorers, "lr": 1e-2}, {"params": gates, "lr": 1e-4}])
    assert group_of(optimizer, gates, [*gates, *scorers], given=True)["lr"] == 1e-4


def test_after_surgery_a_site_is_taught_by_the_layer_that_it_was(monkeypatch):
    head = "ForTokenClassification"
    model, inputs = pruned("bert", head), make_inputs("bert", head, LENGTHS)
    loss = SaliencyLoss(model, 1.0)
    heads, units = ([range(count), [], range(count), range(count)] for count in (4, 48))
    operate(model, heads=heads, units=units)
    teacher = tp.pack(build("bert", head))
    for one in (model, teacher):
        one.token_pruner.remembers = True
        run(one, inputs)
    calls = teacher.token_pruner.last_forward.calls
    objective = SimpleNamespace(model=model, pruner=model.token_pruner, teacher=teacher)
    gradients = [torch.full_like(call.entered, 3.0) for call in calls]
    loss.targets = saliency._targets(loss._who_learns(objective), calls, gradients)
    seen = []
    monkeypatch.setattr(saliency, "listwise", lambda scores, salient, _: seen.append(salient) or scores.sum())
    loss.losses(objective)
    # Each layer's shares add up to 1 per text: from the last one on that is 1, from the first on one for each.
    assert [salient.sum(1).round().unique().tolist() for salient in seen] == [[DEPTH - number] for number in (0, 2, 3)]


def test_what_a_site_is_taught_is_shares_of_its_own_layer_and_of_those_after_it():
    saliency = torch.tensor([[[1.0, 3, 0, 0], [2, 2, 4, 0]], [[5, 5, 0, 0], [1, 1, 8, 0]], [[0, 7, 0, 0], [1, 0, 1, 0]]])
    found = from_here_on(list(saliency))
    torch.testing.assert_close(found[2], torch.tensor([[0, 1.0, 0, 0], [0.5, 0, 0.5, 0]]))
    torch.testing.assert_close(found[1], torch.tensor([[0.5, 1.5, 0, 0], [0.6, 0.1, 1.3, 0]]))
    torch.testing.assert_close(found[0], torch.tensor([[0.75, 2.25, 0, 0], [0.85, 0.35, 1.8, 0]]))


@pytest.mark.parametrize(("idle", "layers"), [((), 4), ((0,), 3), ((0, 1), 2), ((1,), 4), ((0, 1, 2), None)])
def test_the_teacher_is_asked_about_no_layer_below_all_that_learn(monkeypatch, idle, layers):
    """While settling, a site that keeps every token has no importance to be taught."""
    callback = tp.TokenPruneCallback(learning(layer_weight=0.0))
    model, objective = callback.attach(build("bert", HEAD, **no_dropout())).train(), callback.objective
    for layer, site in model.token_pruner.sites.items():
        site.set_kept([1] * 8 if int(layer) in idle else [1, 0] * 4)
    objective.teacher, objective.moment = (
        tp.pack(build("bert", HEAD, seed=5)).eval().requires_grad_(False),
        Moment("settle", 0.5),
    )
    asked, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda said, states: asked.append(len(states)) or real(said, states))
    loss = model(**make_inputs("bert", HEAD, LENGTHS), labels=torch.arange(len(LENGTHS)) % 3).loss
    loss.backward()
    assert asked == ([] if layers is None else [layers])
    assert ("importance" in objective.pop_log()) == (layers is not None)
