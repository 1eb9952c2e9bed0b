"""Guards `Spec.version`: where the code behind a stage changed, somebody must decide whether its artifacts did.

Each stage's modules are hashed as syntax trees without docstrings, so comments, layout and prose are free to change.
After a change, raise the stage's version in its spec if its artifacts change; then ``python tests/test_versions.py``.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lib" / "rlhfscale"
RECORD = Path(__file__).with_name("code_versions.json")


def in_room(room: str, names: str) -> tuple[str, ...]:
    return tuple(f"{room}/{name}" for name in names.split())


TASKS = in_room("bed", "tasks/__init__ tasks/base tasks/lists tasks/registers ladder")
DOCUMENTS = (*TASKS, "bed/demonstrations", "models/documents")
MODELS = in_room("models", "parallel sharding loading")
LAYERS = in_room("models", "lora packing llama llama_layer")
TRAINING = (*DOCUMENTS, *MODELS, *LAYERS, "models/lm", "models/optim", "bed/rungs")
SAMPLING = (*DOCUMENTS, *MODELS, *LAYERS, *in_room("samplers", "base hf together"), "bed/responses")
REWARD = (
    *SAMPLING,
    *in_room("models", "lm optim sequences"),
    *in_room("rewards", "base losses labelled metrics conversations scorer training outcome"),
)
LABELS = ("bed/labels", "bed/rungs")
TRAINERS = (
    "models/files",
    "models/recomputation",
    "samplers/prompts",
    *in_room("rl", "config ppo grpo rloo loop outer prompts dynamic logs learner rollout logprobs"),
    *in_room("rl", "kl advantages losses metrics networks"),
)
EVALS = in_room("evals", "benchmarks mt_judged evaluate judge endpoint local_judges mt_bench revisions sources")
ANSWERS = ("chat/answers", "chat/reasoning", "rl/networks", *in_room("models", "smollm2 recomputation checkpoints"))
LANGUAGE = {
    "chat": (*MODELS, "models/smollm2", "models/checkpoints"),
    "answers": (*REWARD, *ANSWERS),
    "tuned": (*REWARD, *ANSWERS, "chat/finetune", "rl/learner", "rl/logprobs", "models/files"),
    "answer_reward": (*REWARD, *ANSWERS, "rewards/shared"),
    "aligned": (*REWARD, *ANSWERS, "rewards/shared", *TRAINERS),
    "answer_scores": (*REWARD, *ANSWERS, "rewards/shared"),
}
BENCHMARKS = {
    "mt_bench": (*SAMPLING, "models/smollm2", "samplers/vllm", "models/files", *EVALS),
    "coverage": ("evals/planted", "evals/alpaca_eval", "evals/logistic", "stats/bootstrap"),
}
MODULES = {
    "pretrain": TRAINING,
    "sft": TRAINING,
    "samples": SAMPLING,
    "reward_model": (*REWARD, *LABELS),
    "policy": (*REWARD, *LABELS, "rewards/process", "rewards/shared", *TRAINERS),
    "mixed_reward_model": (*REWARD, *LABELS, "rewards/process", "rewards/mixed"),
    "process_reward_model": (*REWARD, *LABELS, "rewards/process"),
    "scores": (*REWARD, *LABELS, "rewards/process"),
    **LANGUAGE,
    **BENCHMARKS,
}
"""The modules that decide what each stage makes; of the ``stages.py`` with the stage's function, that function and what
it calls there counts."""


def home(stage: str) -> str:
    """The module with the stage's function."""
    return f"{'chat' if stage in LANGUAGE else 'evals' if stage in BENCHMARKS else 'bed'}/stages"


def spec_classes():
    """Stage name to class, of every concrete spec."""
    from rlhfscale.bed import specs
    from rlhfscale.chat import specs as chat_specs
    from rlhfscale.evals import specs as evals_specs
    from rlhfscale.runs.spec import Spec

    items = [item for module in (specs, chat_specs, evals_specs) for item in vars(module).values()]
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
        assert cls.runner == f"rlhfscale.{home(stage).replace('/', '.')}:{stage}"


@pytest.mark.parametrize("stage", MODULES)
def test_the_code_behind_a_stage_is_that_of_its_version(stage):
    recorded, now = json.loads(RECORD.read_text()).get(stage), current()[stage]
    assert recorded == now, (
        f"the code behind stage {stage} changed: raise its version in its spec if its artifacts change, then refresh"
        " with `python tests/test_versions.py`"
    )


@pytest.mark.parametrize("stage", MODULES)
def test_the_list_of_modules_is_complete(stage):
    """Every module of the package that the listed ones import at run time is listed too, or makes no numbers."""
    harmless = {"__init__", "samplers/__init__", "rewards/__init__", "rl/__init__", "models/allocator", "models/shapes"}
    harmless |= {"runs/spec", "runs/paths", "bed/specs", "chat/specs", "evals/specs"}
    if stage == "mt_bench":  # other benchmarks, intervals, and judges that it does not take
        harmless |= {f"evals/{name}" for name in ("__init__", "alpaca_eval", "arena_hard", "verifiers")}
        harmless |= {"stats/bootstrap", "models/sequences", "evals/logistic"}
    for name in MODULES[stage]:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhfscale"):
                where = node.module.replace(".", "/").removeprefix("rlhfscale").removeprefix("/")
                for alias in node.names:
                    inner = f"{where}/{alias.name}".removeprefix("/")
                    options = [inner, f"{inner}/__init__", where, f"{where}/__init__".removeprefix("/")]
                    module = next(option for option in options if (PACKAGE / f"{option}.py").is_file())
                    assert module in {*MODULES[stage], *harmless}, f"{name} imports {module}: add it to MODULES"


def test_prose_is_free_and_code_is_not(tmp_path):
    for name in (*MODULES["policy"], "bed/stages"):
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
    stages = tmp_path / "bed" / "stages.py"
    stages.write_text(stages.read_text().replace('"responses.safetensors"', '"other.safetensors"'))
    assert code_hash("samples", tmp_path) != code_hash("samples")  # in a function that the stage calls
    assert code_hash("pretrain", tmp_path) == code_hash("pretrain")


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE.parent))
    RECORD.write_text(json.dumps(current(), indent=2) + "\n")
    print(f"wrote {RECORD.relative_to(Path.cwd()) if RECORD.is_relative_to(Path.cwd()) else RECORD}")
