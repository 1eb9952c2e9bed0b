"""A random model with one token for each byte and a chat template, and small benchmarks of the real ones' formats."""

import json
from pathlib import Path


def model_and_tokenizer(width: int = 16, *, backwards: bool = False):
    """``backwards``: other ids for the same bytes, and another chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    line = "{{ m['content'] }}|" if backwards else "{{ m['role'] }}: {{ m['content'] }}\n"
    tokenizer.chat_template = f"{{% for m in messages %}}{line}{{% endfor %}}"
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(alphabet) + 2, pad_token_id=0, eos_token_id=1, **size)
    return LlamaForCausalLM(config).eval(), tokenizer


def save_policy(folder: Path) -> Path:
    model, tokenizer = model_and_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_guesser(folder: Path, tasks: tuple[str, ...], width: int, *, backwards: bool = False) -> Path:
    """A model that was taught to answer questions of these tasks with one digit from 1 to 3, any of them."""
    import numpy as np
    import torch

    from rlhfscale.chat.answers import encode
    from rlhfscale.chat.finetune import response_loss
    from rlhfscale.chat.reasoning import questions
    from rlhfscale.models.sequences import Sequences
    from rlhfscale.rl import networks

    model, tokenizer = model_and_tokenizer(width, backwards=backwards)
    prompts = encode([q for task in tasks for q in questions(task, "train", 64, 0)], tokenizer)
    rng = np.random.default_rng(0)
    digits = [[tokenizer.encode(str(digit))[0], tokenizer.eos_token_id] for digit in rng.integers(1, 4, len(prompts))]
    data = Sequences.join(prompts, digits, np.ones(len(prompts), bool), tokenizer)
    whole = networks.build(model, adapter="none", critic="none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = response_loss(whole, data[rng.choice(len(data), 16)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mt_bench(folder: Path) -> Path:
    categories = ["writing", "math", "stem", "writing"]
    questions = [
        {"question_id": 81 + i, "category": name, "turns": [f"q{i} first", f"q{i} second"]}
        for i, name in enumerate(categories)
    ]
    _write(folder / "question.jsonl", questions)
    _write(folder / "reference_answer/gpt-4.jsonl", [{"question_id": 82, "choices": [{"turns": ["r1", "r2"]}]}])
    ends = {"single": " {answer}", "pair": " {answer_a} {answer_b}"}
    later = {"single": " {answer_1} {answer_2}", "pair": " {answer_a_1} {answer_a_2} {answer_b_1} {answer_b_2}"}
    prompts = []
    for mode, plain in (("single", "single-v1"), ("pair", "pair-v2")):
        for name in (plain, f"{mode}-math-v1"):
            prompts.append({"name": name, "prompt_template": "{question}" + ends[mode]})
            prompts.append({"name": f"{name}-multi-turn", "prompt_template": "{question_1} {question_2}" + later[mode]})
    _write(folder / "judge_prompts.jsonl", [prompt | {"system_prompt": prompt["name"]} for prompt in prompts])
    return folder


def alpaca_eval(folder: Path, count: int = 6) -> Path:
    rows = [{"instruction": f"i{i} do it", "dataset": "toy"} for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alpaca_eval.json").write_text(json.dumps(rows))
    answers = [row | {"output": "base " * (i + 1)} for i, row in enumerate(rows)]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(answers))
    prompt = (
        "<|im_start|>system\nrank\n<|im_end|>\n<|im_start|>user\n{instruction} | {output_1} | {output_2}\n<|im_end|>"
    )
    (folder / "alpaca_eval_clf.txt").write_text(prompt)
    return folder


def arena_hard(folder: Path, count: int = 4) -> Path:
    _write(
        folder / "question.jsonl", [{"question_id": f"a{i}", "turns": [{"content": f"a{i} go"}]} for i in range(count)]
    )
    answers = [{"question_id": f"a{i}", "choices": [{"turns": [{"content": f"base {i}"}]}]} for i in range(count)]
    _write(folder / "baseline.jsonl", answers)
    (folder / "judge.yaml").write_text(
        "system_prompt: judge it\nprompt_template: '{QUESTION} <A> {ANSWER_A} <B> {ANSWER_B}'\n"
    )
    return folder


def gsm8k(folder: Path) -> Path:
    _write(folder / "test.jsonl", [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(5)])
    return folder
