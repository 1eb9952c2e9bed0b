"""The progress of a grid: a live bar in a terminal or a notebook, and a line now and then elsewhere."""

import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

PLAIN_LINE_S = 15.0  # between progress lines where there is no terminal


class Progress:
    """A line with counts, what runs and the time left: live on a terminal or in a notebook, else now and then."""

    def __init__(self, run: Any, console: Console):
        self.run, self.console = run, console
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.notebook = None
        self.next_line = 0.0

    def line(self) -> str:
        count = Counter(node.status for node in self.run.nodes.values())
        finished = count["done"] + count["cached"]
        running = ", ".join(node.spec.title for node in self.run.running)
        broken = f"[red]{count['failed']} failed, {count['skipped']} skipped[/]  " if count["failed"] else ""
        return (
            f"[green]{finished}/{len(self.run.nodes)} done[/]  {count['running']} under way  {broken}"
            f"{_clock(time.monotonic() - self.run.start)} elapsed, about {_clock(self.run.left_s())} left"
            f"  [dim]{escape(running)}[/]"
        )

    def begin(self) -> None:
        if self.console.is_jupyter:
            from IPython.display import display

            self.notebook = display(self.bundle(), raw=True, display_id=True)
        elif self.live:
            self.live.start()
        self.next_line = time.monotonic() + PLAIN_LINE_S

    def tick(self) -> None:
        if self.notebook:
            self.notebook.update(self.bundle(), raw=True)
        elif self.live:
            self.live.update(self.line(), refresh=True)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PLAIN_LINE_S
            self.run.say(self.line())

    def end(self) -> None:
        if self.notebook:
            self.notebook.update(self.bundle(), raw=True)
        elif self.live:
            self.live.update(self.line(), refresh=True)
            self.live.stop()
        else:
            self.run.say(self.line())

    def bundle(self) -> dict[str, str]:
        return {"text/plain": Text.from_markup(self.line()).plain}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
