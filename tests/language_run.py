"""One of the processes of tests/test_language_team.py: makes the artifacts of the study on published checkpoints, here
two tiny ones, by the stages' own functions.

python tests/language_run.py FOLDER CHECKPOINTS     under torchrun's environment, or alone

Several processes read the parents that one process alone has made, so that each stage is compared by itself.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat import stages as chat_stages
from rlhfscale.chat.recipe import CheckpointRecipe
from rlhfscale.models import checkpoints, loading, parallel
from rlhfscale.models.checkpoints import Checkpoint
from rlhfscale.runs.spec import Spec
from test_language_figures import RECIPE, SHAPES, shape


def specs() -> list[Spec]:
    """Every stage, with a reward model of another checkpoint and one on the policy's own base."""
    recipe = CheckpointRecipe(**RECIPE)
    alone = recipe.policy("small", "small", 1, algorithm="grpo")
    policy = recipe.policy("tiny", "small", 1)
    scores = recipe.scores(recipe.evaluation(policy, 1), recipe.reward_model("small", 1))
    return list(dict.fromkeys((*scores.walk(), *alone.walk())))


def in_float32(load, source, dtype="fp32", **options):
    """Instead of bfloat16, in which the order of sums would decide some of what is sampled."""
    return load(source, "fp32" if dtype == "bf16" else dtype, **options)


def main(folder: Path, root: Path) -> None:
    torch.set_num_threads(1)
    parallel.start()
    for name, (width, _) in SHAPES.items():
        checkpoints.CHECKPOINTS[name] = Checkpoint(name=name, repo=f"local/{name}", shape=shape(width))
    checkpoints.download = lambda found: root / found.name
    loading.load_base = partial(in_float32, loading.load_base)
    chat_specs.LARGE = 0  # with what saves memory
    own = folder / f"{parallel.rank()}-of-{parallel.size()}"
    for spec in specs():
        if parallel.size() > 1 and isinstance(spec, chat_specs.Chat):  # takes no GPU, so one process makes it
            continue
        made = own / "tmp" / spec.key
        made.mkdir(parents=True)
        inputs = {parent.key: folder / "0-of-1" / "tmp" / parent.key for parent in spec.parents}
        getattr(chat_stages, spec.runner.partition(":")[2])(spec, inputs, made)
        parallel.barrier()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
