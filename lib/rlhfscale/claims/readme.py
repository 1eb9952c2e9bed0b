"""The README's tables, from results/: ``python -m rlhfscale.claims.readme`` refreshes them, a test compares."""

import json

import pandas as pd

from rlhfscale.claims import throughput
from rlhfscale.runs.paths import project_root
from rlhfscale.study.params import FIGURES

TIER = "laptop"
END = "<!-- end -->"


def figure_table() -> str:
    """A Markdown table: figure, question, claim, estimate with interval, verdict, cost."""
    lines = [
        "| figure | question | claim | estimate, 95% interval | verdict | core-minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, schema in sorted(FIGURES.items()):
        folder = project_root() / "results" / TIER / name
        if not (folder / "manifest.json").is_file():
            continue
        cost = json.loads((folder / "manifest.json").read_text())["artifacts_wall_s"] / 60
        link = f"[{name}](results/{TIER}/{name}/notebook.ipynb)"
        claims_file = folder / "claims.json"
        claims = json.loads(claims_file.read_text()) if claims_file.is_file() else []
        for claim in claims:
            estimate = f"{claim['estimate']:.4f} [{claim['ci_low']:.4f}, {claim['ci_high']:.4f}]"
            cells = (link, schema.title, claim["claim"], estimate, f"**{claim['verdict']}**", f"{cost:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        if not claims:
            lines.append(f"| {link} | {schema.title} | - | - | {_conditions(folder)} | {cost:.0f} |")
    return "\n".join(lines)


def _conditions(folder) -> str:
    """How many of the test bed's conditions are met; a dash for a figure that has none."""
    if not (folder / "conditions.csv").is_file():
        return "-"
    met = [line.rsplit(",", 1)[1] == "True" for line in (folder / "conditions.csv").read_text().splitlines()[1:]]
    return f"{sum(met)} of {len(met)} conditions met"


def speed_table() -> str:
    """A Markdown table of the benchmark."""
    file = project_root() / "results" / TIER / throughput.Params.figure / "summary.csv"
    return (
        throughput.markdown(pd.read_csv(file))
        if file.is_file()
        else f"Not measured yet: `{throughput.report.COMMAND}`."
    )


TABLES = {"figures": figure_table, "speed": speed_table}


def updated(text: str) -> str:
    """The README with its tables made anew. ValueError where a table's markers are missing."""
    for name, table in TABLES.items():
        start = f"<!-- table: {name} (make readme writes it from results/) -->"
        head, _, rest = text.partition(start)
        _, end, tail = rest.partition(END)
        if not end:
            raise ValueError(f"README.md lacks the markers {start} and {END}")
        text = f"{head}{start}\n{table()}\n{END}{tail}"
    return text


if __name__ == "__main__":
    path = project_root() / "README.md"
    path.write_text(updated(path.read_text()))
