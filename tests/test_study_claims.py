"""Tables and verdicts of C3, C4, C8 and C10 from artifacts in which the claim was built in, built out, or is noise."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from planted import RUNG_STEPS, checked, planted
from rlhfscale.bed import flops, ladder, rungs
from rlhfscale.bed.demonstrations import demonstrations
from rlhfscale.claims import c03_training_data as c03
from rlhfscale.claims import c04_prompt_vs_response_diversity as c04
from rlhfscale.claims import c07_data_composition as c07
from rlhfscale.claims import c08_process_supervision as c08
from rlhfscale.claims import c10_pretraining_vs_rlhf as c10
from rlhfscale.claims import ledger
from rlhfscale.models import loading
from rlhfscale.study import ledger as study_ledger


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        (lambda share: 0.08 * (1 - np.exp(-8 * share)), "reproduced"),
        (lambda share: 0.08 * share, "contradicted"),
        (lambda share: 0.0, "inconclusive"),
    ],
)
def test_c3(tmp_path, curve, verdict):
    P, made = planted(tmp_path, "03_training_data", lambda policy: 0.5 + curve(policy.num_updates / 120))
    tables = c03.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    assert found.loc["first_quarter", "estimate"] == pytest.approx(curve(0.25), abs=0.004)
    rest = curve(1) - 1.5 * curve(0.25)
    assert found.loc["rest_minus_half_of_first", "estimate"] == pytest.approx(rest, abs=0.006)
    if verdict == "reproduced":
        assert found.loc["saturated_at_prompts", "estimate"] == pytest.approx(3 / 8 * 120 * 256, rel=0.15)
        assert found.loc["saturation_level", "estimate"] == pytest.approx(0.58, abs=0.006)


def test_the_planted_over_optimisation_is_found(tmp_path):
    P, made = planted(tmp_path, "03_training_data")
    rows = c03.measure(P, made).summary.set_index(["quantity", "form"])["estimate"]
    a, b = (rows[f"over_optimisation_{name}", "d(a - b d)"] for name in "ab")
    assert a == pytest.approx(1.0, abs=0.1) and b == pytest.approx(0.25, abs=0.05)
    assert rows["over_optimisation_r2", "d(a - b d)"] > max(0.98, rows["over_optimisation_r2", "d(a - b log d)"])


@pytest.mark.parametrize(
    ("prompts", "responses", "verdict"),
    [(0.04, 0.01, "reproduced"), (0.01, 0.04, "contradicted"), (0.0, 0.0, "inconclusive")],
)
def test_c4(tmp_path, prompts, responses, verdict):
    def level(model):
        size = model.data[0].num_samples
        return 0.4 + prompts * np.log2(model.num_prompts / 500) + responses * np.log2(size)

    P, made = planted(tmp_path, "04_prompt_vs_response_diversity", pairs=level)
    tables = c04.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    assert found.loc["pair_accuracy_prompts", "estimate"] == pytest.approx(prompts, abs=0.008)
    assert found.loc["pair_accuracy_responses", "estimate"] == pytest.approx(responses, abs=0.008)
    cells = {(row.labelled_prompts, row.responses_per_prompt) for row in found.loc["pair_accuracy"].itertuples()}
    assert len(cells) == 12 and {count * size for count, size in cells} == set(P.labels)


@pytest.mark.parametrize(
    ("preference", "process", "verdict"),
    [(0.0, 1.5, "reproduced"), (0.0, 0.0, "contradicted"), (0.045, 0.0, "inconclusive")],
)
def test_c7(tmp_path, preference, process, verdict):
    P, made = planted(
        tmp_path,
        "07_data_composition",
        lambda policy: 0.5 + 0.1 * policy.reward_model.mix[2],
        lambda model, family: 1.0 + preference * model.mix[0] + process * model.mix[2],
    )
    tables = c07.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    assert len(found.loc["best_of_n_gain"]) == 20 and len(found.loc["ppo_gain"]) == 10
    gains = found.loc["ppo_gain"].sort_values("share_process")["estimate"].to_numpy()
    assert gains[-1] - gains[0] == pytest.approx(0.1, abs=0.01)
    assert found.loc["larger_budget_gain", "estimate"].abs().max() < 0.01


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [(0.8, -0.6, "reproduced"), (0.8, 0.6, "contradicted"), (-0.8, -0.6, "contradicted"), (0.0, 0.0, "inconclusive")],
)
def test_c8(tmp_path, own, other, verdict):
    families = {"lists": 0, "registers": 1}

    def skill(model, family):
        level = 0.8 + 0.1 * RUNG_STEPS[model.rung]
        trained_on = model.data[0].families
        if model.stage == "reward_model" or len(trained_on) > 1:
            return level
        return np.where(family == families[trained_on[0]], level + own, level + other)

    P, made = planted(tmp_path, "08_process_supervision", skill=skill)
    tables = c08.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    differences = found.loc["process_minus_outcome"].set_index("trained_on")["estimate"]
    assert np.sign(round(differences["own"], 3)) == np.sign(own) and np.sign(round(differences["other"], 3)) == np.sign(
        other
    )
    assert abs(differences["both"]) < 1e-9
    # hits are 0.8 in every kind of response
    assert found.loc["first_error_f1", "estimate"].to_numpy() == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    ("pretraining", "rlhf", "verdict"),
    [(0.03, 0.01, "reproduced"), (0.01, 0.03, "contradicted"), (0.0, 0.0, "inconclusive")],
)
def test_c10(tmp_path, pretraining, rlhf, verdict):
    P, made = planted(
        tmp_path,
        "10_pretraining_vs_rlhf",
        lambda policy: 0.5 + rlhf * np.log2(policy.num_updates / 4),
        start=lambda sft: 0.5 + pretraining * np.log2(sft.base.num_documents / 12500),
    )
    tables = c10.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    slopes = checked(tables, tmp_path).loc["slope"].set_index("spent_on")["estimate"]
    assert slopes["pretraining"] == pytest.approx(pretraining, abs=0.002)
    assert slopes["RLHF"] == pytest.approx(rlhf, abs=0.004)
    bill = tables.extra["flops.csv"]
    assert (bill["flops"] > 0).all() and set(bill.loc[bill["spent_on"] == "RLHF", "part"]) == {
        "labels", "reward model", "roll-outs", "reward", "evaluation", "updates"
    }  # fmt: skip


@pytest.mark.parametrize("rung", ["25k", "150k"])
def test_flops_of_adapters_are_those_that_torch_counts(rung):
    from peft import get_peft_model

    documents = demonstrations((0, 1), "train", ("lists",), 16, 0.0)
    rows = torch.from_numpy(documents.ids[documents.lengths == documents.lengths.max()])
    model = rungs.build_rung(ladder.rung(rung), 0)
    model.set_attn_implementation("eager")
    model = get_peft_model(model, loading.lora_config(16, 32.0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=rows).logits.sum().backward()
    counted = counter.get_total_flops()
    assert flops.adapter_train_flops(rung, 16, rows.numel(), rows.shape[1]) == pytest.approx(counted, rel=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.disable_adapter():
        model(input_ids=rows)
    assert flops.read_flops(rung, rows.numel(), rows.shape[1]) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_ledger_draws_every_test_and_says_what_would_settle_it(tmp_path):
    P, made = planted(tmp_path, "04_prompt_vs_response_diversity")
    checked(c04.measure(P, made), tmp_path)
    table = study_ledger.read(tmp_path / "results" / "smoke")
    assert table["claim"].tolist() == ["C4"] and table["threshold"].tolist() == [0.0]
    said = ledger.words(table.iloc[0])
    assert "prompts minus responses" in said and ("settle" in said or table["verdict"][0] != "inconclusive")
    figure = ledger.draw(table)
    assert figure.axes[0].get_title(loc="left").startswith("C4")
    assert figure.axes[0].get_title(loc="right") == table["verdict"][0]


def test_only_distinct_responses_are_counted():
    ids = np.random.default_rng(0).integers(0, 2, (50, 5, 3))
    first = flops._first_of_equals(ids)
    for row, marked in zip(ids, first, strict=True):
        assert set(np.flatnonzero(marked)) == set(np.unique(row, axis=0, return_index=True)[1])
