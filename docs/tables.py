"""The verdicts and tables of the pages, from docs/claims/results/*.json, which docs/claims/run.py
measures. Nobody edits these numbers by hand.

    python docs/tables.py docs/results.md README.md

fills in what stands between two comments:

    <!-- table: denoising/flip-.* --><!-- end -->          runs that match a regular expression
    <!-- table: denoising/vote-.*/tenth .* --><!-- end -->           and columns that match one
    <!-- table: denoising/claims --><!-- end -->           the verdicts of an experiment
    <!-- table: denoising/claims/Fig. 4, Fig. 5 --><!-- end -->     those of two figures
    <!-- pivot: denoising/(.*)-([148])/gold, % --><!-- end -->      a column of runs; the groups of
        the regular expression are the names of its row and its column
    <!-- pivot: denoising/claims/(.*) beats the baseline, (.*) --><!-- end -->        of claims
    <!-- number: denoising/vote-0.1/wrong labels, % --><!-- end -->
    <!-- measured: denoising/Smoothing keeps the loss low --><!-- end -->      a claim's number
    <!-- verdict: denoising/Smoothing keeps the loss low --><!-- end -->       and its verdict
    <!-- hours: denoising --><!-- end -->                  by which code, in how many hours

    a ± b         mean over the seeds, half-width of its 95 % interval (Student's t, paired by seed)
    p             two-sided, with Holm's correction for the claims with the same figure
    confirmed     p < 0.05, in the direction of the claim
    opposite      p < 0.05, in the other direction
    no effect     the interval at level 1 - 0.05 / (claims with the figure) lies in 0 ± threshold
    undecided     none of these

The threshold is half a point for accuracies and other shares. For any other number it is 5 % of the
number that it is compared with, or what the claim says.
"""

import collections
import functools
import json
import re
import sys
from pathlib import Path

import mpmath  # torch depends on it
import numpy as np

RESULTS = Path(__file__).parent / "claims/results"
KINDS = "table|pivot|number|measured|verdict|hours"
MARK = re.compile(rf"(<!-- ({KINDS}): ([^>]+?) -->).*?(<!-- end -->)", re.DOTALL)


# Verdicts.

def two_sided_p(x, df):
    """p of Student's t, with x = df / (df + t^2): a regularised incomplete beta function."""
    return mpmath.betainc(df / 2, 0.5, 0, x, regularized=True)


@functools.cache
def quantile(level, df):
    """Half-width of an interval in standard errors: the t whose two-sided p is 1 - level."""
    def surplus(x):
        return two_sided_p(x, df) - (1 - level)

    x = mpmath.findroot(surplus, (0, 1), solver="bisect", maxsteps=100, verify=False)
    return float(mpmath.sqrt(df / x - df))


def holm(p_values, m):
    """Holm's correction of the p of m claims: the smallest times m, the next times m - 1, and so
    on, never falling and at most 1. Claims that are not measured yet count as the largest."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for i, index in enumerate(np.argsort(p_values)):
        largest = max(largest, p_values[index] * (m - i))
        corrected[index] = min(1.0, largest)
    return corrected


def find_verdict(mean, half, p, threshold):
    """Mean, half-width of the corrected interval, corrected p -> one of the four verdicts."""
    if p < 0.05 and mean > 0:
        return "confirmed"
    if p < 0.05 and mean < 0:
        return "opposite"
    if abs(mean) + half < threshold:
        return "no effect"
    return "undecided"


def judge(claims):
    """Records of claims (mean, half, p, n, threshold) -> the same with verdicts, and with p
    corrected for the claims with the same figure."""
    judged = []
    for figure in dict.fromkeys(claim["figure"] for claim in claims):
        family = [claim for claim in claims if claim["figure"] == figure]
        asked = family[0].get("asked", len(family))
        corrected = holm([claim["p"] for claim in family], asked)
        for claim, p in zip(family, corrected):
            df = claim["n"] - 1
            wider = quantile(1 - 0.05 / asked, df) / quantile(0.95, df)
            verdict = find_verdict(claim["mean"], claim["half"] * wider, p, claim["threshold"])
            judged.append({**claim, "p": p, "verdict": verdict})
    return judged


# Tables.

@functools.cache
def read_results(experiment):
    """The results file of an experiment, its claims with their verdicts."""
    results = json.loads((RESULTS / f"{experiment}.json").read_text())
    results["claims"] = judge(results["claims"])
    return results


def show(entry, seeds, unit=""):
    """A mean over the seeds -> "mean ± half", with the number of seeds if some are missing."""
    if entry is None:
        return "-"
    sign = "+" if entry["signed"] else ""
    if entry["percent"]:
        text = f"{100 * entry['mean']:{sign}.1f} ± {100 * entry['half']:.1f}{unit}"
    else:
        text = f"{entry['mean']:{sign}.3g} ± {entry['half']:.2g}"
    return text if entry["n"] == seeds else f"{text} ({entry['n']} seeds)"


def markdown(head, rows):
    if not rows:
        raise ValueError("an empty table")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_p(p):
    return "<0.0001" if p < 0.0001 else f"{p:.2g}"


def show_claims(results, figures):
    rows = []
    for claim in results["claims"]:
        if claim["figure"] in figures or not figures:
            measured = show(claim, results["seeds"], " points")
            p = show_p(claim["p"])
            rows.append([claim["figure"], claim["text"], measured, p, claim["verdict"]])
    return markdown(["figure", "claim", "measured", "p", "verdict"], rows)


def show_runs(results, runs, columns):
    """Those runs and columns whose names match regular expressions, without empty columns."""
    chosen = {run: x for run, x in results["runs"].items() if re.fullmatch(runs, run)}
    names = dict.fromkeys(name for numbers in chosen.values() for name in numbers)
    names = [name for name in names if re.fullmatch(columns, name)]
    rows = []
    for run, numbers in chosen.items():
        rows.append([run, *(show(numbers.get(name), results["seeds"]) for name in names)])
    return markdown(["run", *names], rows)


def show_table(results, name):
    runs, _, columns = name.partition("/")
    if runs == "claims":
        return show_claims(results, columns.split(", ") if columns else [])
    return show_runs(results, runs, columns or ".*")


def show_pivot(results, name):
    pattern, _, rest = name.partition("/")
    texts = {}
    if pattern == "claims":
        pattern = rest
        for claim in results["claims"]:
            measured = show(claim, results["seeds"], " points")
            texts[claim["text"]] = f"{measured}, p {show_p(claim['p'])}: {claim['verdict']}"
    else:
        for run, numbers in results["runs"].items():
            texts[run] = show(numbers.get(rest), results["seeds"])

    cells = {}
    for key, text in texts.items():
        match = re.fullmatch(pattern, key)
        if match:
            cells[match.groups()] = text
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = []
    for row in dict.fromkeys(row for row, _ in cells):
        rows.append([row, *(cells.get((row, column), "-") for column in columns)])
    return markdown(["", *columns], rows)


def show_number(results, place):
    run, _, column = place.partition("/")
    return show(results["runs"][run][column], results["seeds"])


def find_claim(results, text):
    return next(claim for claim in results["claims"] if claim["text"] == text)


def show_measured(results, text):
    return show(find_claim(results, text), results["seeds"], " points")


def show_verdict(results, text):
    return find_claim(results, text)["verdict"]


def show_hours(results, _):
    commits = collections.defaultdict(list)  # by versions and processor
    for code in results["code"]:
        commit, _, versions = code.partition(", ")
        commits[versions].append(commit.removeprefix("commit "))
    parts = [f"commit {', '.join(names)}; {versions}" for versions, names in commits.items()]
    return f"{results['hours']:.1f} hours of one core ({'; '.join(parts)})"


SHOW = {
    "table": show_table, "pivot": show_pivot, "number": show_number, "measured": show_measured,
    "verdict": show_verdict, "hours": show_hours}


def render(text):
    """A page -> the page with what its comments ask for. Raises ValueError if it is not there."""
    def fill(match):
        start, kind, name, end = match.groups()
        experiment, _, rest = name.partition("/")
        try:
            content = SHOW[kind](read_results(experiment), rest)
        except (OSError, KeyError, StopIteration, ValueError):
            raise ValueError(f"{RESULTS} has no {kind} {name}") from None
        return f"{start}\n{content}\n{end}" if "\n" in content else f"{start}{content}{end}"

    return MARK.sub(fill, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(render(page.read_text()))
