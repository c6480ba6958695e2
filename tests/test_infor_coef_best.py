"""InforCoef, whose samplers go on moving while they settle, and the best model at the end."""

import pytest
from training_helpers import Recorder, trainer_for

import hf_tokenprune as tp

SETTLE = 9  # the first step of the last phase in a run of 12 steps


class Loosen(Recorder):
    """With the first model that settles almost nothing is dropped any more."""

    def on_step_end(self, _, state, __, model=None, **___):
        if state.global_step == SETTLE:
            model.token_pruner.objective._set_offset(30.0)


@pytest.mark.parametrize("best", [SETTLE, 12])
def test_a_best_model_that_spends_more_than_was_asked_for_is_told(tmp_path, caplog, best):
    method = tp.InforCoef(static_macs=None, target_macs=0.5, schedule=tp.Schedule(dense=1, anneal=2, settle=1))
    trainer = trainer_for(
        tmp_path, method, callbacks=[Loosen()], eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="mark", greater_is_better=True,
        compute_metrics=lambda _: {"mark": float(trainer.state.global_step == best)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == best
    spent = next(e["eval_macs_realised"] for e in trainer.state.log_history if e.get("step") == best and "eval_mark" in e)
    assert spent > 0.55 or best == 12
    assert (f"the best model, which was loaded, spent {spent:.3f}" in caplog.text) == (spent > 0.55)
