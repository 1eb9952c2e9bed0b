"""The ledger: every claim, its test and its verdict on one page, read from the results of the other figures."""

from typing import ClassVar

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhfscale.runs import paths
from rlhfscale.runs.spec import Spec
from rlhfscale.study import ledger as study_ledger
from rlhfscale.study import rules, style, tables
from rlhfscale.study.figure import RecipeFigure
from rlhfscale.study.results import ResultsFolder


class Params(RecipeFigure):
    """Every claim's verdict on one page, from the results of the other figures."""

    figure: ClassVar[str] = "99_claims"
    title: ClassVar[str] = "The ledger: every claim, its test and its verdict"
    reads_results: ClassVar[bool] = True

    def specs(self) -> tuple[Spec, ...]:
        return ()


COLORS = {"reproduced": style.CATEGORIES[2], "contradicted": style.CATEGORIES[3], "inconclusive": "0.45"}


def read(P: Params) -> pd.DataFrame:
    """The tier's ledger, see `study.ledger.read`. Raises FileNotFoundError where no claim has been measured."""
    root = paths.results_root() / P.recipe
    table = study_ledger.read(root)
    if table.empty:
        raise FileNotFoundError(f"results/{P.recipe} holds no claims.json; run: make figures TIER={P.recipe}")
    return table


def words(row: pd.Series) -> str:
    """What the verdict rests on, and what would change it, in a sentence."""
    side = {"below": "below", "above": "above"}[row.side]
    test = (
        f"{row.interval}: {row.estimate:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}], claimed {side} {row.threshold:g}"
    )
    if row.verdict != "inconclusive" or row.premise:
        return test
    if pd.isna(row.seeds_to_settle):
        return f"{test}; more seeds alone would not settle it" if row.ci_low <= row.threshold <= row.ci_high else test
    return f"{test}; about {row.seeds_to_settle:.0f} seeds would settle it"


@style.styled
def draw(table: pd.DataFrame) -> Figure:
    """A strip for each test: estimate, 95% interval, and the side of the threshold on which the claim places it.

    Args:
        table: see `study.ledger.read`.
    """
    tests = [
        (key, group) for key, group in table.groupby(["claim", "figure", "interval"], sort=False)
    ]  # two parts on one interval, below and above, are one strip
    counts = table.drop_duplicates(["claim", "figure"])["verdict"].value_counts()
    caption = (
        "Points and bars: estimates with 95% intervals (98.3% where three differences must hold together). "
        "Dashed: the rule's "
        "threshold; shaded: where the claim places "
        f"the statistic. {', '.join(f'{counts.get(name, 0)} {name}' for name in rules.VERDICTS)}."
    )
    columns = 2
    rows = -(-len(tests) // columns)
    picture, axes, _ = style.new_figure(rows, columns, 0.66 * rows + 0.2, caption)
    axes = axes.reshape(rows, columns)
    for axis, ((claim, _, name), parts) in zip(axes.T.flat, tests, strict=False):
        row = parts.iloc[0]
        color = COLORS[row.verdict]
        reach = [row.ci_low, row.ci_high, row.estimate, *parts["threshold"]]
        margin = 0.15 * max(max(reach) - min(reach), 1e-9)
        axis.set_xlim(min(reach) - margin, max(reach) + margin)
        low, high = axis.get_xlim()
        for part in parts.itertuples():
            axis.axvline(part.threshold, color="0.3", linestyle="--", linewidth=0.9)
            low, high = (low, min(high, part.threshold)) if part.side == "below" else (max(low, part.threshold), high)
        # "above" the higher or "below" the lower: either will do; above the lower and below the higher: both must hold
        strips = [(low, high)] if low < high else [(axis.get_xlim()[0], high), (low, axis.get_xlim()[1])]
        for strip in strips:
            axis.axvspan(*strip, color=style.CATEGORIES[2], alpha=0.12, linewidth=0)
        error = [[row.estimate - row.ci_low], [row.ci_high - row.estimate]]
        axis.errorbar([row.estimate], [0], xerr=error, color=color, marker="o", capsize=2, elinewidth=1.4)
        premise = " (premise)" if parts["premise"].all() else ""
        title = f"{claim}  {name}{premise}"
        axis.set_title(title, fontsize=6.5 if len(title) < 36 else 5.6, fontweight="normal")  # beside the verdict
        axis.set_title(row.verdict, loc="right", fontsize=6.5, fontweight="bold", color=color)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=6)
        axis.spines["left"].set_visible(False)
    for axis in list(axes.T.flat)[len(tests) :]:
        axis.remove()
    return picture


def save(P: Params, table: pd.DataFrame, picture: Figure, wall_s: float) -> list[str]:
    """Write ledger.csv, the figure and a manifest to results/<tier>/99_claims/, and return the names of the files."""
    folder = ResultsFolder(P.figure, tier=tables.tier(P))
    folder.write_table("ledger.csv", table)
    folder.write_figure(picture, "figure")
    folder.write_manifest(P.resolved(), {}, command=tables.command(P), seeds=(), wall_s=wall_s)
    return folder.files()
