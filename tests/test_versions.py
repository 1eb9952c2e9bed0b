"""Guards `Spec.version`: where the code behind a stage changed, somebody must decide whether its artifacts did.

Each stage's modules are hashed as syntax trees without docstrings, so comments, layout and prose are free to change.
After a change, raise the stage's version in specs.py if its artifacts change; then ``python tests/test_versions.py``.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lib" / "rlhfscale"
RECORD = Path(__file__).with_name("code_versions.json")

TASKS = ("bed/tasks/__init__", "bed/tasks/base", "bed/tasks/lists", "bed/tasks/registers", "bed/ladder")
DOCUMENTS = (*TASKS, "bed/demonstrations", "models/documents")
MODELS = ("models/parallel", "models/sharding", "models/loading")
TRAINING = (*DOCUMENTS, *MODELS, "models/lora", "models/packing", "models/llama", "models/lm", "models/optim")
SAMPLING = (*DOCUMENTS, *MODELS, "models/lora", "models/packing", "models/llama", "samplers/base", "samplers/hf", "samplers/together",
            "bed/responses")  # fmt: skip
REWARD = (
    *SAMPLING, "models/lm", "models/optim", "models/sequences", "rewards/base", "rewards/losses", "rewards/labelled",
    "rewards/metrics", "rewards/scorer", "rewards/training", "rewards/outcome",
)  # fmt: skip
TRAINERS = ("models/files", *(
    f"rl/{name}"
    for name in ("config", "ppo", "grpo", "rloo", "loop", "learner", "rollout", "logprobs", "kl", "advantages",
                 "losses", "metrics")
))  # fmt: skip
EVALS = tuple(f"evals/{name}" for name in ("benchmarks", "evaluate", "judge", "mt_bench", "revisions", "sources"))
ANSWERS = ("chat/answers", "chat/reasoning", "models/smollm2", "rl/networks")
LANGUAGE = {
    "chat": (*TASKS, "chat/checkpoints", *MODELS, "models/smollm2"),
    "answers": (*REWARD, *ANSWERS),
    "tuned": (*REWARD, *ANSWERS, "chat/finetune", "rl/learner", "rl/logprobs", "models/files"),
    "answer_reward": (*REWARD, *ANSWERS, "rewards/shared"),
    "aligned": (*REWARD, *ANSWERS, "rewards/shared", *TRAINERS),
    "answer_scores": (*REWARD, *ANSWERS, "rewards/shared"),
}
MODULES = {
    "pretrain": TRAINING,
    "sft": TRAINING,
    "samples": SAMPLING,
    "reward_model": REWARD,
    "policy": (*REWARD, "rewards/process", "rewards/shared", "rl/networks", *TRAINERS),
    "mixed_reward_model": (*REWARD, "rewards/process", "rewards/mixed"),
    "process_reward_model": (*REWARD, "rewards/process"),
    "scores": (*REWARD, "rewards/process"),
    "mt_bench": (*SAMPLING, "models/smollm2", "samplers/vllm", *EVALS),
    "coverage": ("evals/planted", "evals/alpaca_eval", "stats/bootstrap"),
    **LANGUAGE,
}
"""The modules that decide what each stage makes; of stages.py or language_stages.py, the stage's function and what it
calls there counts."""


def spec_classes():
    """Stage name to class, of every concrete spec of specs.py and language.py."""
    from rlhfscale.bed import specs
    from rlhfscale.chat import specs as chat_specs
    from rlhfscale.runs.spec import Spec

    items = [*vars(specs).values(), *vars(chat_specs).values()]
    found = [item for item in items if isinstance(item, type) and issubclass(item, Spec)]
    return {cls.stage: cls for cls in found if hasattr(cls, "stage")}


def tree_without_prose(source: str) -> ast.Module:
    """The syntax tree with docstrings, and strings that stand alone below an attribute, taken out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            prose = [s for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            node.body = [s for s in node.body if s not in prose or not isinstance(s.value.value, str)]
    return tree


def code_hash(stage: str, folder: Path = PACKAGE) -> str:
    """16 hexadecimal digits over the stage's modules and its part of the module that holds its function."""
    digest = hashlib.sha256()
    for name in MODULES[stage]:
        digest.update(ast.dump(tree_without_prose((folder / f"{name}.py").read_text())).encode())
    for node in called(stage, tree_without_prose((folder / f"{home(stage)}.py").read_text())):
        digest.update(ast.dump(node).encode())
    return digest.hexdigest()[:16]


def home(stage: str) -> str:
    """The module with the stage's function."""
    return "language_stages" if stage in LANGUAGE else "stages"


def called(stage: str, tree: ast.Module) -> list[ast.stmt]:
    """The module's constants, the stage's function and every function of the module that it names, directly or not."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    reached, todo = set(), {stage}
    while todo:
        name = todo.pop()
        reached.add(name)
        names = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        todo |= (names & functions.keys()) - reached
    constants = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return constants + [functions[name] for name in sorted(reached)]


def current() -> dict[str, dict]:
    return {stage: {"version": cls.version, "code": code_hash(stage)} for stage, cls in sorted(spec_classes().items())}


def test_every_stage_is_guarded():
    assert spec_classes().keys() == MODULES.keys()
    for stage, cls in spec_classes().items():
        assert cls.runner == f"rlhfscale.{home(stage)}:{stage}"


@pytest.mark.parametrize("stage", MODULES)
def test_the_code_behind_a_stage_is_that_of_its_version(stage):
    recorded, now = json.loads(RECORD.read_text()).get(stage), current()[stage]
    assert recorded == now, (
        f"the code behind stage {stage} changed: raise its version in specs.py if its artifacts change, then refresh"
        " with `python tests/test_versions.py`"
    )


@pytest.mark.parametrize("stage", MODULES)
def test_the_list_of_modules_is_complete(stage):
    """Every module of the package that the listed ones import at run time is listed too, or makes no numbers."""
    harmless = {
        "__init__",
        "data/__init__",
        "samplers/__init__",
        "rewards/__init__",
        "rl/__init__",
        "runs/spec",
        "specs",
        "models/allocator",
        "models/shapes",
    }
    if stage == "mt_bench":  # other benchmarks, intervals, and judges that it does not take
        harmless |= {f"evals/{name}" for name in ("__init__", "alpaca_eval", "arena_hard", "verifiers")}
        harmless |= {"study/results", "runs/paths", "stats/bootstrap", "study/rules", "models/sequences"}
    for name in MODULES[stage]:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhfscale"):
                where = node.module.replace(".", "/").removeprefix("rlhfscale").removeprefix("/")
                for alias in node.names:
                    options = [f"{where}/{alias.name}".removeprefix("/"), where, f"{where}/__init__".removeprefix("/")]
                    module = next(option for option in options if (PACKAGE / f"{option}.py").exists())
                    assert module in {*MODULES[stage], *harmless}, f"{name} imports {module}: add it to MODULES"


def test_prose_is_free_and_code_is_not(tmp_path):
    for name in (*MODULES["policy"], "stages"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text((PACKAGE / f"{name}.py").read_text())
    module = tmp_path / "rl" / "losses.py"
    source = module.read_text()
    module.write_text(source.replace('"""', '"""Other words. ', 1) + "\n# a comment\n")
    assert code_hash("policy", tmp_path) == code_hash("policy")
    module.write_text(source.replace("torch.minimum", "torch.maximum"))
    assert code_hash("policy", tmp_path) != code_hash("policy")
    assert code_hash("samples", tmp_path) == code_hash("samples")
    module.write_text(source)
    stages = tmp_path / "stages.py"
    stages.write_text(stages.read_text().replace('"responses.safetensors"', '"other.safetensors"'))
    assert code_hash("samples", tmp_path) != code_hash("samples")  # in a function that the stage calls
    assert code_hash("pretrain", tmp_path) == code_hash("pretrain")


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE.parent))
    RECORD.write_text(json.dumps(current(), indent=2) + "\n")
    print(f"wrote {RECORD.relative_to(Path.cwd()) if RECORD.is_relative_to(Path.cwd()) else RECORD}")
