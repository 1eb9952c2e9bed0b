"""GRPO and RLOO against TRL's trainers: advantages, loss and gradients of the same responses.

TRL scores and evaluates our responses by its own code (`_generate_and_score_completions`), the adapters are then moved
so that ratios leave 1, and its own `compute_loss` is differentiated. TRL's losses are ours as follows: "bnpo", and
"dapo" for a batch in one step, are "token"; "grpo" is "sequence"; "dr_grpo" is "constant". TRL 1.16 weights GRPO's KL
term by the ratio unless told not to (use_bias_correction_kl); ours is that of Shao et al. 2024.
"""

import pytest
import torch

import tiny
import tiny_rl
from rlhfscale.bed import rungs
from rlhfscale.models import loading
from rlhfscale.models.loading import POLICY
from rlhfscale.rl import GRPO, RLOO, rollout

trl = pytest.importorskip("trl", minversion="1.16", reason="compares with TRL 1.16")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS, GROUP, LENGTH, BETA, CLIP = 8, 4, 12, 0.07, 0.1


def ours(algorithm, **options):
    """A run with adapters away from zero, so that the policy that samples is not the reference."""
    run = tiny_rl.trainer(
        algorithm, prompts_per_update=PROMPTS, responses_per_prompt=GROUP, minibatch_size=None, epochs=1,
        max_new_tokens=LENGTH, kl_coefficient=BETA, clip=CLIP, missing_eos_penalty=0.0, **options,
    )  # fmt: skip
    tiny_rl.randomise(run.networks, std=0.1)
    return run


def rollouts_of(run):
    """What one update gives to its steps, and the responses."""
    seen = []
    step = run.step
    run.step = lambda rollouts, *_: seen.append(rollouts) or {"policy_loss": 0.0}
    _, completions = run.update(tiny_rl.prompts(run))
    run.step = step
    return seen[0], completions


def theirs(run, kind, completions, folder, **options):
    """TRL's trainer on a model of its own with the same adapters, and the inputs of its loss for these responses."""
    tokenizer, base = rungs.build_tokenizer(), tiny.model()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tiny_rl.prompts(run) for _ in range(GROUP)]
    repeated = [ids for ids in tiny_rl.prompts(run) for _ in range(GROUP)]
    scores = run.reward.score(rollout.joined(repeated, completions, tokenizer)).tolist()
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=len(texts),
        num_generations=GROUP, max_completion_length=LENGTH, beta=BETA, epsilon=CLIP, gradient_checkpointing=False,
        gradient_accumulation_steps=1, steps_per_generation=1, disable_dropout=True, **options,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=base, args=config, processing_class=tokenizer, reward_funcs=lambda completions, **_: scores,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}), peft_config=loading.lora_config(4, 8.0),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    copy_adapter(run, trainer.model)
    ids = [list(completion.token_ids) for completion in completions]
    trainer._generate_single_turn = lambda *_: (ids, None) if kind == "GRPO" else ids
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions([{"prompt": text} for text in texts])


def copy_adapter(run, model):
    """Our policy's adapter into TRL's."""
    found = run.networks.model.state_dict()
    weights = {name.replace(f".{POLICY}.", ".default."): w for name, w in found.items() if f".{POLICY}." in name}
    assert len(weights) == 28 and not model.load_state_dict(weights, strict=False).unexpected_keys


def gradients(trainer):
    """TRL's, under our names."""
    found = tiny_rl.gradients(trainer.model)
    return {"model." + name.replace(".default.", f".{POLICY}."): gradient for name, gradient in found.items()}


def compare(run, kind, folder, **options):
    rollouts, completions = rollouts_of(run)
    assert 0 < rollouts.finished.sum() < len(rollouts) and len(set(completions.lengths)) > 3
    trainer, inputs = theirs(run, kind, completions, folder, **options)
    mask = inputs["completion_mask"].bool()
    assert torch.equal(mask, rollouts.mask)
    torch.testing.assert_close(rollouts.advantages[:, 0], inputs["advantages"], rtol=1e-4, atol=1e-4)
    if kind == "GRPO":
        torch.testing.assert_close(inputs["ref_per_token_logps"] * mask, rollouts.ref_logprobs, rtol=0, atol=2e-5)
        assert (rollouts.ref_logprobs - rollouts.logprobs).abs().max() > 0.05
        inputs["old_per_token_logps"] = rollouts.logprobs  # TRL leaves them out where it would train on them at once
    else:
        torch.testing.assert_close(inputs["old_logps"], rollouts.logprobs.sum(1), rtol=0, atol=1e-4)

    tiny_rl.randomise(run.networks, seed=1, std=0.11)  # ratios on both sides of the clip
    copy_adapter(run, trainer.model)
    record, grads = tiny_rl.step_gradients(run, rollouts)
    assert 0.05 < record["clip_fraction"] < 0.95 and abs(record["ratio_kl_nats"]) > 1e-3
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert record["policy_loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert tiny_rl.relative(grads, gradients(trainer)) < 1e-4
    return trainer, record


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    ("weights", "loss_type"), [("token", "bnpo"), ("token", "dapo"), ("sequence", "grpo"), ("constant", "dr_grpo")]
)
def test_grpo_equals_trl(weights, loss_type, scale, tmp_path):
    run = ours(GRPO, loss_weights=weights, scale_advantages=scale)
    options = {"loss_type": loss_type, "scale_rewards": "group" if scale else "none"}
    trainer, record = compare(run, "GRPO", tmp_path, use_bias_correction_kl=False, **options)
    if weights == "token":
        logged = trainer._metrics["train"]
        assert record["entropy_nats"] == pytest.approx(logged["entropy"][0], rel=1e-4)
        assert record["clip_fraction"] == pytest.approx(logged["clip_ratio/region_mean"][0], rel=1e-4)


OPTIONS = {
    "clip-higher": ({"clip_high": 0.3}, {"epsilon_high": 0.3}),
    "two-sided": ({"max_ratio": 1.5}, {"delta": 1.5}),
    "GSPO": ({"ratio": "sequence"}, {"importance_sampling_level": "sequence"}),
    "CISPO": ({"surrogate": "cispo", "clip_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "Lite PPO": ({"scale_advantages": "batch"}, {"scale_rewards": "batch"}),
    "weighted KL": ({"kl_weighted": True}, {"use_bias_correction_kl": True}),
    "weighted KL of sequences": ({"kl_weighted": True, "ratio": "sequence"},
                                 {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_grpo_equal_trl(name, tmp_path):
    here, there = OPTIONS[name]
    compare(ours(GRPO, **here), "GRPO", tmp_path, **{"loss_type": "bnpo", "use_bias_correction_kl": False} | there)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_for_another_sampler_equals_trl(mode, tmp_path):
    """TRL's own code needs vLLM to get there; its loss takes the weights that it would have computed."""
    level, kind = mode.split("_")
    correction = {"sampler_correction": kind, "sampler_correction_level": level, "sampler_max_ratio": 1.2}
    run = ours(GRPO, **correction)
    sample = run.sampler

    def other(*given, **options):
        found = sample(*given, **options)
        found.logprobs[:, ::2] -= 0.3
        found.logprobs[:, 1::2] += 0.2
        return found

    run.sampler = other
    rollouts, completions = rollouts_of(run)
    run.sampler = sample
    trainer, inputs = theirs(run, "GRPO", completions, tmp_path, loss_type="bnpo", use_bias_correction_kl=False)
    gaps = (rollouts.logprobs - rollouts.sampler_logprobs) * rollouts.mask
    ratio = torch.exp(gaps.sum(-1, keepdim=True) if level == "sequence" else gaps)
    inputs["importance_sampling_ratio"] = (
        torch.clamp(ratio, max=1.2) if kind == "truncate" else ratio.masked_fill(ratio > 1.2, value=0.0)
    )
    inputs["old_per_token_logps"] = rollouts.logprobs
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    tiny_rl.randomise(run.networks, seed=1, std=0.11)
    copy_adapter(run, trainer.model)
    record, grads = tiny_rl.step_gradients(run, rollouts)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert record["policy_loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert tiny_rl.relative(grads, gradients(trainer)) < 1e-4


def test_rloo_equals_trl(tmp_path):
    trainer, record = compare(ours(RLOO), "RLOO", tmp_path)
    logged = trainer._metrics["train"]
    assert record["clip_fraction"] == pytest.approx(logged["clip_ratio/region_mean"][0], rel=1e-4)


def test_an_entropy_bonus_equals_trl(tmp_path):
    """There it is a mean over tokens, as ours is for "token"."""
    run = ours(GRPO, entropy_coefficient=0.3)
    rollouts, completions = rollouts_of(run)
    options = {"loss_type": "bnpo", "use_bias_correction_kl": False, "entropy_coef": 0.3}
    trainer, inputs = theirs(run, "GRPO", completions, tmp_path, **options)
    _, grads = tiny_rl.step_gradients(run, rollouts)
    trainer.compute_loss(trainer.model, inputs).backward()
    assert tiny_rl.relative(grads, gradients(trainer)) < 1e-4
