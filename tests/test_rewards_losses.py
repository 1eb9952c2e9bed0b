"""The losses of reward models: by loops, by numbers written out, and against TRL's RewardTrainer on the same batch."""

import itertools
import math

import numpy as np
import pytest
import torch

import tiny
from rlhfscale.bed import rungs
from rlhfscale.models import loading
from rlhfscale.rewards import Labelled, losses, outcome, scorer

NAN = float("nan")
GOLD = torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 1.0, 1.0, 0.3]])
SCORES = torch.tensor([[0.3, 0.3, -1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [-0.5, 0.0, 0.7, 0.7]])


def pairs(scores, gold):
    """(score, score, gold difference) of every better and worse response to a prompt."""
    for row, labels in zip(scores.tolist(), gold.tolist(), strict=True):
        for i, j in itertools.permutations(range(len(row)), 2):
            if labels[i] > labels[j]:
                yield row[i], row[j], labels[i] - labels[j]


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_bradley_terry_equals_a_loop_over_pairs(margin):
    expected = [math.log1p(math.exp(-(better - worse - margin * gap))) for better, worse, gap in pairs(SCORES, GOLD)]
    assert len(expected) == 10
    assert losses.bradley_terry(SCORES, GOLD, margin=margin).item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_bradley_terry_of_two_responses_is_the_pairwise_loss():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.5, 0.5])
    found = losses.bradley_terry(torch.stack([rejected, chosen], 1), torch.tensor([[0.0, 1.0]] * 2))
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(chosen - rejected).mean())


def test_bradley_terry_raises_the_better_score():
    scores = torch.zeros(1, 2, requires_grad=True)
    losses.bradley_terry(scores, torch.tensor([[1.0, 0.0]])).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-0.5, 0.5]]))


def test_centring_equals_a_loop_over_pairs():
    expected = np.mean([(better + worse) ** 2 for better, worse, _ in pairs(SCORES, GOLD)])
    assert losses.centring(SCORES, GOLD).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [losses.bradley_terry, losses.centring])
def test_flat_scores_with_their_groups_give_the_same_loss(loss):
    """Also where the groups are of unequal size, shuffled and numbered at will: gold that is missing makes no pair."""
    keep = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([7, -3, 40])[:, None].expand(3, 4)[keep][order]
    flat, labels = SCORES[keep][order].requires_grad_(), GOLD[keep][order]
    square = SCORES.clone().requires_grad_()
    expected = loss(square, torch.where(keep, GOLD, NAN))
    found = loss(flat, labels, group=group)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(flat.grad, square.grad[keep][order])
    assert torch.isfinite(square.grad).all() and not square.grad[~keep].any()


def test_laying_out_by_group():
    found = losses.by_group(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5, 2, 5, 5]), -1.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, -1.0, -1.0], [1.0, 3.0, 4.0]]))


def test_pointwise_by_hand():
    """-log sigmoid(2) and -log(1 - sigmoid(-1)); the response without label contributes nothing."""
    scores = torch.tensor([2.0, -1.0, 5.0], requires_grad=True)
    loss = losses.pointwise(scores, torch.tensor([1.0, 0.0, NAN]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2)
    loss.backward()
    sigmoid = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    torch.testing.assert_close(scores.grad, torch.tensor([(sigmoid[0] - 1) / 2, sigmoid[1] / 2, 0.0]))


def test_process_by_hand():
    """Probabilities 0.9, 0.8, 0.4 of labels 1, 0, 1 cost 0.10536, 1.60944, 0.91629 nats; their mean is 0.87703."""
    logits = torch.log(torch.tensor([0.9 / 0.1, 0.8 / 0.2, 0.4 / 0.6, 3.0]))
    found = losses.pointwise(logits, torch.tensor([1.0, 0.0, 1.0, NAN]))
    assert found.item() == pytest.approx(0.87703, abs=1e-5)


def test_multitask_is_the_weighted_sum():
    correct = torch.where(GOLD == 0.5, NAN, (GOLD > 0.4).float())
    compared, labelled = losses.bradley_terry(SCORES, GOLD, margin=0.3), losses.pointwise(SCORES, correct)
    centred = losses.centring(SCORES, GOLD)
    found = losses.multitask(
        SCORES, GOLD, correct, pairs_weight=2.0, pointwise_weight=0.5, margin=0.3, centring_weight=0.1
    )
    torch.testing.assert_close(found, 2.0 * (compared + 0.1 * centred) + 0.5 * labelled)


def test_a_task_without_labels_contributes_nothing():
    none = torch.full_like(GOLD, NAN)
    correct = (GOLD > 0.4).float()
    torch.testing.assert_close(losses.multitask(SCORES, GOLD, none), losses.bradley_terry(SCORES, GOLD))
    torch.testing.assert_close(losses.multitask(SCORES, none, correct), losses.pointwise(SCORES, correct))
    torch.testing.assert_close(losses.multitask(SCORES, none + 1, correct), losses.pointwise(SCORES, correct))
    for weights in ({"pairs_weight": 0.0}, {"pointwise_weight": 0.0}):
        expected = (
            losses.pointwise(SCORES, correct) if "pairs_weight" in weights else losses.bradley_terry(SCORES, GOLD)
        )
        torch.testing.assert_close(losses.multitask(SCORES, GOLD, correct, **weights), expected)


def test_losses_without_anything_to_learn_are_refused():
    none = torch.full_like(GOLD, NAN)
    for gold in (none, torch.ones_like(GOLD)):
        for loss in (losses.bradley_terry, losses.centring):
            with pytest.raises(ValueError, match="nothing to compare"):
                loss(SCORES, gold)
    with pytest.raises(ValueError, match="no response has a label"):
        losses.pointwise(SCORES, none)
    with pytest.raises(ValueError, match="no response has a label"):
        losses.multitask(SCORES, none, none)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        losses.pointwise(SCORES, GOLD)


TEXTS = [
    ("lists reverse : a b c =", "c b a", "a b"),
    ("lists sort : b b a =", "a b b", "b b a ; a"),
    ("registers inc_0 swap_01 : 0 1 2 =", "1 1 2 ; 1 1 2", "1 1 2"),
    ("lists rotate sort : d b a c =", "b a c d ; a b c d", "b a c d ; a b d c"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    rungs.save_model(tiny.model(), folder)
    model = loading.load_scorer(folder, init_seed=0)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def trainer(model, tmp_path_factory):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    rows = [{"prompt": prompt, "chosen": f" {a}", "rejected": f" {b}"} for prompt, a, b in TEXTS]
    return RewardTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=rungs.build_tokenizer()
    )


def gradients(loss, model):
    """Every parameter's gradient, as one vector by name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("centring", [None, 0.3])
@pytest.mark.parametrize("margins", [None, [0.5, 1.5, 0.0, 2.0]])
@pytest.mark.parametrize("tokens", [scorer.TOKENS_PER_MICRO_BATCH, 30])
def test_loss_and_gradients_equal_those_of_trl(model, trainer, monkeypatch, centring, margins, tokens):
    """A margin in TRL is the gap asked of a pair; here it is the margin for each unit of gold times the gap in gold."""
    monkeypatch.setattr(trainer.args, "center_rewards_coefficient", centring)
    examples = [dict(trainer.train_dataset[index]) for index in range(len(TEXTS))]
    for example, value in zip(examples, margins or [], strict=False):
        example["margin"] = value
    theirs = trainer.compute_loss(model, trainer.data_collator(examples))
    expected = gradients(theirs, model)

    data = Labelled.from_pairs(TEXTS, rungs.build_tokenizer())
    for row, ids in enumerate(ids for example in examples for ids in (example["chosen_ids"], example["rejected_ids"])):
        assert data.sequences.ids[row, : data.sequences.lengths[row]].tolist() == ids
    gold = torch.from_numpy(data.gold)
    if margins:
        gold = torch.tensor([[value or 1e-30, 0.0] for value in margins]).view(-1)
    ours = losses.multitask(
        outcome.sequence_scores(model, data.sequences, "last", tokens),
        gold,
        torch.full_like(gold, NAN),
        group=torch.from_numpy(data.group),
        margin=1.0 if margins else 0.0,
        centring_weight=centring or 0.0,
    )
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    found = gradients(ours, model)
    assert found.keys() == expected.keys() and "score.weight" in found
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
