"""A stage whose spec needs two GPUs is made by two processes, here on CPUs by gloo."""

import os
import subprocess
import sys
import time

import pytest

from rlhfscale.runs.grid import ensure
from rlhfscale.runs.store import Store
from rlhfscale.runs.team import TeamError
from rlhfscale.runs.worker import make
from test_grid import alive, no_half_artifact, quiet
from toy_stages import Number, Together, read

pytestmark = pytest.mark.xdist_group("parallel")


def test_a_grid_starts_the_processes_and_keeps_what_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # where the grid looks; the processes find none
    store, spec = Store(tmp_path), Together(part=Number(value=3))
    assert read(ensure([spec], store=store, console=quiet(), workers=1)[spec]) == 33
    assert {path.name for path in store.open(spec.key).glob("*.txt")} == {"0.txt"}


@pytest.mark.parametrize(
    ("mood", "message"),
    [("raise", "process 1 of 2: ValueError: loss is NaN at step 3"), ("die", "process 1 of 2: ended with status -9")],
)
def test_one_that_fails_ends_all(tmp_path, mood, message):
    store, part = Store(tmp_path), Number(value=3)
    make(part, store)
    start = time.monotonic()
    with pytest.raises(TeamError, match=message):
        make(Together(part=part, mood=mood), store)
    assert time.monotonic() - start < 100  # and not when the other one has waited long enough
    no_half_artifact(store)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_they_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "starter.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "code = 'import sys; from rlhfscale.runs.team import exit_with; exit_with(int(sys.argv[1]))'\n"
        "print(subprocess.Popen([sys.executable, '-c', code, str(os.getpid())], stdout=2).pid)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 20
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(done.stdout))
