"""Write tests/data/trl_ppo_1_12.json: what TRL's PPOTrainer computes on two small batches. Run by hand.

    python tests/make_trl_vectors.py      # in an environment with trl==1.12.0, the last release with a PPOTrainer

The trainer's own ``train`` runs on tiny models; its local variables are read where it whitens advantages and where it
calls ``accelerator.backward``, so every number is the trainer's.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OUTPUT = Path(__file__).parent / "data" / "trl_ppo_1_12.json"
VOCABULARY, RESPONSE = 14, 6
SETTINGS = {"gamma": 0.97, "lam": 0.9, "cliprange": 0.05, "cliprange_value": 0.05, "kl_coef": 0.2, "vf_coef": 0.1}


def tokenizer():
    words = {word: index for index, word in enumerate(["<p>", "<s>", "</s>", *"abcdefghijk"])}
    built = Tokenizer(models.WordLevel(words, unk_token="<p>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<p>", bos_token="<s>", eos_token="</s>")


def tiny(kind, seed):
    torch.manual_seed(seed)
    model = kind(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            num_labels=1, attention_dropout=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    return model


def plain(value):
    """Tensors as nested lists of their exact float32 values."""
    return value.detach().tolist() if isinstance(value, torch.Tensor) else value


def run(estimator, ragged, seed):
    """One update of the trainer, two epochs of two minibatches; its variables."""
    record, steps = {}, []

    def whiten(values, mask, shift_mean=True):
        found = original(values, mask, shift_mean)
        names = "logprobs ref_logprobs values scores padding_mask padding_mask_p1 rewards advantages returns"
        local = sys._getframe(1).f_locals
        record.update({name: plain(local[name]) for name in names.split()})
        record["whitened"] = plain(found)
        return found

    def backward(loss, **_):
        local = sys._getframe(1).f_locals
        grads = torch.autograd.grad(loss, [local["new_logprobs"], local["vpred"]], retain_graph=True)
        names = "micro_batch_inds new_logprobs vpred pg_loss vf_loss loss"
        step = {name: plain(torch.as_tensor(local[name])) for name in names.split()}
        steps.append(step | {"d_new_logprobs": plain(grads[0]), "d_vpred": plain(grads[1])})
        loss.backward()

    original = ppo_trainer.masked_whiten
    policy, reference = tiny(LlamaForCausalLM, seed), tiny(LlamaForCausalLM, seed + 1)
    bias = torch.zeros(VOCABULARY)
    bias[0], bias[2] = -1e4, 1.5 if ragged else -1e4  # padding is never drawn; some responses end, or none
    for model in (policy, reference):
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    words = tokenizer()
    prompts = [words(f"{a} {b} {c}")["input_ids"] for a, b, c in zip("abcdefgh", "hgfedcba", "aabbccdd", strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, report_to="none", use_cpu=True, bf16=False, seed=seed, num_sample_generations=0,
            save_strategy="no", per_device_train_batch_size=8, gradient_accumulation_steps=1, num_mini_batches=2,
            num_ppo_epochs=2, total_episodes=8, response_length=RESPONSE, temperature=0.9, stop_token="eos",
            kl_estimator=estimator, whiten_rewards=False, missing_eos_penalty=0.5, learning_rate=0.01, **SETTINGS,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, words, policy, reference, tiny(LlamaForSequenceClassification, seed + 2),
            Dataset.from_dict({"input_ids": prompts}), value_model=tiny(LlamaForSequenceClassification, seed + 3),
            eval_dataset=Dataset.from_dict({"input_ids": prompts}),
        )  # fmt: skip
        trainer.accelerator.backward = backward
        ppo_trainer.masked_whiten = whiten
        try:
            trainer.train()
        finally:
            ppo_trainer.masked_whiten = original
    return {"kl_estimator": estimator, "steps": steps} | record


if __name__ == "__main__":
    assert trl.__version__ == "1.12.0", trl.__version__
    OUTPUT.parent.mkdir(exist_ok=True)
    cases = {"full": run("k1", ragged=False, seed=0), "ragged": run("k3", ragged=True, seed=20)}
    OUTPUT.write_text(json.dumps({"trl": trl.__version__, "settings": SETTINGS, "cases": cases}) + "\n")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")
