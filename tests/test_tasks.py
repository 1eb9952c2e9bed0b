"""The task universe against independent definitions: operations, verifier, splits, streams; the ladder's counts."""

from itertools import islice, product

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhfscale.bed import demonstrations as data
from rlhfscale.bed import ladder, rungs, tasks
from rlhfscale.bed.tasks import base

LISTS, REGISTERS = tasks.FAMILIES["lists"], tasks.FAMILIES["registers"]


def lists_by_index(name, s):
    """Each transformation written position by position."""
    n = len(s)
    if name == "unique":
        return tuple(x for i, x in enumerate(s) if x not in s[:i])
    if name == "sort":
        return tuple(letter for letter in "abcdefghijklmnopqrstuvwxyz" for x in s if x == letter)
    at = {
        "reverse": lambda i: s[n - 1 - i],
        "rotate": lambda i: s[(i + 1) % n],
        "rotate_back": lambda i: s[(i - 1) % n],
        "swap_pairs": lambda i: s[i ^ 1] if i ^ 1 < n else s[i],
        "swap_ends": lambda i: s[n - 1 - i] if i in (0, n - 1) else s[i],
        "run_max": lambda i: max(s[: i + 1]),
    }[name]
    return tuple(at(i) for i in range(n))


def registers_by_arithmetic(name, s):
    kind, where = name.split("_")
    old = [int(digit) for digit in s]
    new = list(old)
    i, j = int(where[0]), int(where[-1])
    match kind:
        case "inc":
            new[i] = 0 if old[i] == 9 else old[i] + 1
        case "dec":
            new[i] = 9 if old[i] == 0 else old[i] - 1
        case "zero":
            new[i] = 0
        case "copy":
            new[j] = old[i]
        case "swap":
            new[i], new[j] = old[j], old[i]
    return tuple(str(value) for value in new)


INDEPENDENT = {"lists": lists_by_index, "registers": registers_by_arithmetic}


def lists_misunderstood(name, s):
    """Each misconception written position by position."""
    n = len(s)
    if name == "sort":
        return tuple(letter for letter in "zyxwvutsrqponmlkjihgfedcba" for x in s if x == letter)
    if name == "unique":
        return tuple(s[i] for i in range(1, n)) or s
    at = {
        "reverse": lambda i: s[n - 1 - i] if i in (0, n - 1) else s[i],
        "rotate": lambda i: s[(i - 1) % n],
        "rotate_back": lambda i: s[(i + 1) % n],
        "swap_pairs": lambda i: s[n - 1 - i],
        "swap_ends": lambda i: s[n - 1] if i == 0 else s[i],
        "run_max": lambda i: min(s[: i + 1]),
    }[name]
    return tuple(at(i) for i in range(n))


def registers_misunderstood(name, s):
    kind, where = name.split("_")
    new = [int(digit) for digit in s]
    i, j = int(where[0]), int(where[-1])
    match kind:
        case "inc":
            new[i] = {8: 0, 9: 1}.get(new[i], new[i] + 2)
        case "dec":
            new[i] = {0: 8, 1: 9}.get(new[i], new[i] - 2)
        case "zero":
            new[i] = 1
        case _:
            new[i] = new[j]
    return tuple(str(value) for value in new)


MISUNDERSTOOD = {"lists": lists_misunderstood, "registers": registers_misunderstood}


def drawn(count, split="train", seed=0, families=tuple(tasks.FAMILIES)):
    return data.problem_list((seed, 50), split, families, count)


def test_operations_equal_their_independent_definitions():
    for state in (state for n in (1, 2, 3, 4, 5) for state in product("adk", repeat=n)):
        for name in LISTS.operations:
            assert LISTS.apply(name, state) == lists_by_index(name, state), (name, state)
    for state in product("0159", repeat=3):
        for name in REGISTERS.operations:
            assert REGISTERS.apply(name, state) == registers_by_arithmetic(name, state), (name, state)
    assert all(len(set(family.operations)) == len(family.operations) for family in tasks.FAMILIES.values())
    assert {name.split("_")[0] for name in REGISTERS.operations} == {"inc", "dec", "swap", "copy", "zero"}


def test_misconceptions_equal_their_independent_definitions():
    for state in (state for n in (1, 2, 3, 4, 5) for state in product("adk", repeat=n)):
        for name, misconception in LISTS.misconceptions.items():
            assert misconception.rule(state) == lists_misunderstood(name, state), (name, state)
    for state in product("01589", repeat=3):
        for name, misconception in REGISTERS.misconceptions.items():
            assert misconception.rule(state) == registers_misunderstood(name, state), (name, state)


@pytest.mark.parametrize("family", tasks.FAMILIES.values(), ids=tasks.FAMILIES)
def test_every_operation_has_a_misconception_that_shows(family):
    assert family.misconceptions.keys() == set(family.operations)
    rng = np.random.default_rng(0)
    starts = [family.start(rng) for _ in range(200)]
    for name, misconception in family.misconceptions.items():
        assert 0.25 <= misconception.share <= 0.7 and misconception.words
        differ = np.mean([misconception.rule(state) != family.apply(name, state) for state in starts])
        assert differ > 0.4, name
    wrong = [misconception.share > 0.5 for misconception in family.misconceptions.values()]
    assert 0.35 <= np.mean(wrong) <= 0.65  # of about half of the operations the most frequent rule is the wrong one


@pytest.mark.parametrize("family", tasks.FAMILIES.values(), ids=tasks.FAMILIES)
def test_demonstrators_have_the_stated_shares_and_keep_their_minds(family):
    """Chains of one operation twice: both steps follow one rule, and the wrong one as often as the table says."""
    rng = np.random.default_rng(3)
    for name, misconception in family.misconceptions.items():
        rules = []
        for _ in range(400):
            start = family.start(rng)
            middle = family.apply(name, start)
            problem = base.Problem(family.name, (name, name), start, (middle, family.apply(name, middle)))
            first, second = (tuple(part.split()) for part in family.demonstrate(problem, rng, 0.0).split(";"))
            right = (first == middle, second == family.apply(name, first))
            wrong = (first == misconception.rule(start), second == misconception.rule(first))
            assert all(right) or all(wrong), (name, start, first, second)
            if middle != misconception.rule(start):
                rules.append(first != middle)
        error = (misconception.share * (1 - misconception.share) / len(rules)) ** 0.5
        assert np.mean(rules) == pytest.approx(misconception.share, abs=4 * error), name


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_likelihood_is_the_share_of_demonstrations(slip):
    """Against counts of 30,000 demonstrations, and its sum over everything that is written is 1."""
    family, rng = REGISTERS, np.random.default_rng(0)
    problem = data.parse_prompt(["registers", "inc_0", "copy_01", "inc_0", ":", "8", "1", "1", "="])
    written = [family.demonstrate(problem, rng, slip) for _ in range(30_000)]
    counts = {text: written.count(text) for text in sorted(set(written), key=written.count)[-8:]}
    total = 0.0
    for text in set(written):
        states = [tuple(part.split()) for part in text.split(";")]
        chance = family.likelihood(problem, states, slip)
        total += chance
        if text in counts:
            share = counts[text] / len(written)
            assert share == pytest.approx(chance, abs=5 * (chance * (1 - chance) / len(written)) ** 0.5)
    assert total == pytest.approx(1.0) if slip == 0 else total < 1.0
    assert family.likelihood(problem, [("9", "1"), ("9", "9", "1"), ("0", "9", "1")], 0.3) == 0.0


def test_problems_are_what_they_claim():
    for problem in drawn(500):
        state = problem.start
        for operation, after in zip(problem.operations, problem.states, strict=True):
            state = INDEPENDENT[problem.family](operation, state)
            assert state == after
        right = " ; ".join(" ".join(state) for state in problem.states)
        grade = tasks.grade(problem, right)
        assert grade == tasks.Grade(gold=1.0, exact=True, steps=(True,) * problem.difficulty)
        assert data.parse_prompt(problem.prompt.split()) == problem
        assert tasks.grade(problem, right, finished=False).gold == 0.0
        assert not tasks.grade(problem, right, finished=False).exact


def test_gold_counts_right_positions():
    problem = base.Problem("lists", ("reverse",), tuple("abcd"), (tuple("dcba"),))
    cases = {"d c b a": 1.0, "d c b k": 0.75, "d c": 0.5, "d c b a a": 0.8, "c d a b": 0.0, "": 0.0}
    for response, gold in cases.items():
        assert tasks.grade(problem, response).gold == pytest.approx(gold), response
        assert tasks.grade(problem, response).exact == (gold == 1.0)
    assert tasks.grade(problem, "d c b a ; d c b a").gold == 0.0  # one state too many


def test_a_step_after_a_slip_is_right_if_it_follows_from_the_slip():
    problem = base.Problem(
        "lists", ("reverse", "rotate", "sort"), tuple("cab"), (tuple("bac"), tuple("acb"), tuple("abc"))
    )
    slipped = tasks.grade(problem, "b a d ; a d b ; a b d")
    assert slipped == tasks.Grade(gold=2 / 3, exact=False, steps=(False, True, True))
    # the right state after a wrong one does not follow from what was written
    assert tasks.grade(problem, "b a d ; a c b ; a b c").steps == (False, False, True)
    assert tasks.grade(problem, "b a d ; a c b ; a b c").exact  # exactness is of the answer alone
    assert tasks.grade(problem, "b a c ; a c b").steps == (True, True)
    assert tasks.grade(problem, "b a c ; a c b ; a b c ; a b c").steps == (True, True, True, False)


@pytest.mark.parametrize("slip", [0.2, 1.0])
def test_slips_are_carried_on_at_the_stated_rate(slip):
    """Of the written tokens, a share of ``slip`` differs from what the nearer one of the two rules gives."""
    rng, wrong, written = np.random.default_rng(0), 0, 0
    for problem in drawn(600, families=("registers",)):
        states = [tuple(part.split()) for part in REGISTERS.demonstrate(problem, rng, slip).split(";")]
        before, steps = problem.start, tasks.grade(problem, " ; ".join(map(" ".join, states))).steps
        for operation, state, label in zip(problem.operations, states, steps, strict=True):
            right, other = registers_by_arithmetic(operation, before), registers_misunderstood(operation, before)
            assert set(state) <= set(REGISTERS.alphabet)
            assert label == (state == right)
            same = [i for i in range(3) if right[i] == other[i]]  # whatever the demonstrator's mind
            wrong += sum(state[i] != right[i] for i in same)
            written += len(same)
            before = state
    # a slip never draws the right token again, so the rate is the stated one
    assert wrong / written == pytest.approx(slip, abs=4 * (slip * (1 - slip) / written) ** 0.5)


def test_hostile_responses_are_graded_not_raised():
    rng = np.random.default_rng(1)
    odd = ["", ";;", " ", "\n", "\x00", "💥", "a;b", "__import__('os')", "-1", "1e309", "²", "٣"]
    pieces = [*tasks.vocabulary(), *odd]
    problems = drawn(40)
    texts = ["", ";", " ; ; ; ", "= : ;", "a " * 20_000, "; " * 20_000, "9" * 10_000, "a", "0", "²  ²  ²", "٣ ٣ ٣"]
    texts += [" ".join(rng.choice(pieces, size=rng.integers(0, 25))) for _ in range(300)]
    for text in texts:
        for problem in problems:
            grade = tasks.grade(problem, text)
            assert 0.0 <= grade.gold <= 1.0
            assert grade.exact == (grade.gold == 1.0)
            assert len(grade.steps) == text.count(";") + 1
            assert not any(grade.steps[problem.difficulty :])


def test_splits_share_no_prompt():
    train, held_out = ({problem.prompt for problem in drawn(2500, split)} for split in ("train", "eval"))
    assert train.isdisjoint(held_out)
    assert min(len(train), len(held_out)) > 1200
    share = np.mean([tasks.is_held_out(f"prompt {i}") for i in range(20_000)])
    assert share == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="split: 'test'"):
        drawn(1, split="test")


def test_streams_are_reproducible_and_differ_by_seed():
    assert drawn(50) == drawn(50) == drawn(80)[:50]
    assert drawn(50) != drawn(50, seed=1)
    a, b = (data.demonstrations((3, 1), "train", ("lists",), 40, 0.1) for _ in range(2))
    np.testing.assert_array_equal(a.ids, b.ids)
    assert {problem.family for problem in drawn(10, families=("registers",))} == {"registers"}
    assert [problem.family for problem in drawn(4)] == ["lists", "registers"] * 2


@pytest.mark.parametrize("families", [(), ("lists", "chess")])
def test_unknown_families_are_named(families):
    with pytest.raises(ValueError, match="families: .*lists, registers"):
        drawn(1, families=families)


def test_chains_have_the_stated_frequencies():
    """Lengths by CHAIN_WEIGHTS, operations by 1 / rank."""
    found = drawn(6000, families=("lists",))
    lengths = np.bincount([problem.difficulty for problem in found], minlength=4)[1:] / len(found)
    np.testing.assert_allclose(lengths, tasks.CHAIN_WEIGHTS, atol=0.03)
    names = [operation for problem in found for operation in problem.operations]
    zipf = 1 / np.arange(1, len(LISTS.operations) + 1)
    np.testing.assert_allclose([names.count(n) / len(names) for n in LISTS.operations], zipf / zipf.sum(), atol=0.02)


def test_longest_prompt_and_response_are_the_stated_maxima():
    problems = drawn(3000)
    documents = data.demonstrations((0, 51), "train", tuple(tasks.FAMILIES), 3000, slip=0.1)
    assert max(map(len, data.encode_prompts(problems))) == tasks.MAX_PROMPT_TOKENS
    assert documents.prompt_lengths.max() == tasks.MAX_PROMPT_TOKENS
    assert (documents.lengths - documents.prompt_lengths).max() == tasks.MAX_RESPONSE_TOKENS
    assert tasks.MAX_PROMPT_TOKENS + tasks.MAX_RESPONSE_TOKENS <= ladder.CONTEXT


def test_tokenizer_and_encode_agree():
    tokenizer = rungs.build_tokenizer()
    assert len(tokenizer) == ladder.vocab_size() == len(set(tasks.vocabulary())) + 3
    for problem in islice(tasks.problems((7,), "train"), 20):
        ids = data.encode_prompts([problem])[0]
        assert tokenizer(problem.prompt).input_ids == ids
        assert tokenizer.decode(ids[1:]) == problem.prompt


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_counts_equal_the_built_models(name):
    rung = ladder.rung(name)
    built = rungs.build_rung(rung, seed=0)
    embedding = built.get_input_embeddings().weight.numel()
    total = sum(parameter.numel() for parameter in built.parameters())
    assert rung.num_params_with_embeddings == total
    assert rung.num_params == total - embedding
    assert float(rung.name.removesuffix("k")) * 1000 == pytest.approx(rung.num_params, rel=0.03)


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_train_flops_equal_the_counted_matrix_products(name):
    """Attention is computed eagerly here: torch's counter does not see into the fused kernel."""
    rung = ladder.rung(name)
    model = rungs.build_rung(rung, seed=0).train()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, ladder.vocab_size(), (4, 18))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    assert rung.train_flops(4 * 18, sequence_length=18) == pytest.approx(counter.get_total_flops(), rel=0.01)
