"""A disk that is really full; see tests/small_disk.py, which this runs in a namespace of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.mark.slow
def test_what_a_full_disk_does(tmp_path):
    try:
        subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name("small_disk.py")]
    done = subprocess.run([*NAMESPACE, *tests], capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout + done.stderr
