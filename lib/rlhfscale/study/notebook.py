"""Papermill's command line in a process that ends within a second of the one that started it.

    python -m rlhfscale.study.notebook DRIVER_PID IN.ipynb OUT.ipynb ...

A run that is killed leaves nothing behind that goes on computing and writing results: the kernel ends with papermill.
"""

import sys
import threading

from papermill.__main__ import papermill

from rlhfscale.runs.team import exit_with


def main() -> None:
    driver = int(sys.argv.pop(1))
    threading.Thread(target=exit_with, args=(driver,), daemon=True).start()
    papermill()


if __name__ == "__main__":
    main()
