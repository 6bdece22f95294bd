"""What the runs of docs/claims say: the numbers of a run, and their means over the seeds."""

import collections
import json
import math
from typing import NamedTuple

import numpy as np

from tables import quantile, two_sided_p


class Claim(NamedTuple):
    """The claim that a number is larger in one run than in another."""
    figure: str                     # claims with the same figure are corrected together
    text: str                       # the claim in words, which is its name on the page
    key: str                        # name of the number, see `read_run`
    larger: str | list | float      # a run, a list of runs, which are averaged, or a constant
    smaller: str | list | float
    smaller_key: str | None = None  # if it is not `key`
    plus: float = 0.0               # is added to the difference
    threshold: float | None = None  # a difference that does not matter; see `find_threshold`


def read_lines(path):
    """The rows of a .jsonl file; none if it is missing."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measure_votes(rows):
    """Comparisons with strengths -> the quantities of Figs. 1 to 3. Column `gold`: 1 if a label is
    right, 0 if it is wrong, -1 if gold has no preference. Accuracies leave out the last kind."""
    rows = [row for row in rows if row["mean preference difference"] is not None]
    rows.sort(key=lambda row: row["mean preference difference"])
    strength = np.array([row["mean preference difference"] for row in rows])
    std = np.array_split([row["std preference difference"] for row in rows], 20)
    numbers = {
        "share below 0": np.mean(strength < 0),
        "std, weakest": np.mean(std[0]),
        "std, 20 to 40 %": np.mean(np.concatenate(std[4:8])),
        "std, strongest": np.mean(std[-1])}
    if "gold" not in rows[0]:
        return numbers

    gold = np.array([row["gold"] for row in rows])
    wrong = gold == 0
    numbers["share wrong"] = np.mean(wrong)
    numbers["share wrong below 0"] = np.mean(wrong[strength < 0])
    numbers["share below 0 of wrong"] = np.mean(strength[wrong] < 0)
    for i, tenth in enumerate(np.array_split(wrong, 10), 1):
        numbers[f"share wrong, tenth {i}"] = np.mean(tenth)
    # under the ROC curve: how often a right label has a higher strength than a wrong one
    wrong_below = np.cumsum(wrong)[gold == 1]
    numbers["area under the curve"] = np.mean(wrong_below) / np.sum(wrong)

    size = len(rows) // 20
    nearest = np.argsort(abs(strength))[:size]
    parts = {
        "weakest": gold[:size],
        "strongest": gold[-size:],
        "at 0": gold[nearest]}
    for name, part in parts.items():
        numbers[f"accuracy, {name}"] = np.mean(part[part >= 0])
    return numbers


def measure_eval(records, run):
    """What eval.json says of a run, a reward model or a policy."""
    numbers = {}
    for record in records:
        if run not in (record.get("model"), record.get("policy")):
            continue
        place = record.get("set")
        if record["table"] == "reward models":
            numbers.update({f"{place}/{key}": value for key, value in record.items()})
        elif record["table"] == "differences":  # a histogram from 0 to 1, of 20 bins
            key = f"{place}/normalized_difference"
            mass = record["density"] / 20
            numbers[key] = numbers.get(key, 0) + record["size"] * mass
        elif record["table"] == "best of n":
            numbers[f"{place}/best of {record['n']}"] = record["score"]
        elif record["table"] == "wins":
            numbers[f"net wins over {record['against']}"] = record.get("net", math.nan)
    return numbers


def read_run(folder, run):
    """The numbers of a run of a seed, by name: the last record of its metrics.jsonl; with a prefix,
    the first one and means over several; and what vote_strength.py and eval.py found."""
    path = folder / run
    numbers = {"minutes": json.loads((path / "made.json").read_text())["minutes"]}
    records = read_lines(path / "metrics.jsonl")
    parts = {
        "": records[-1:],
        "first/": records[:1],
        "mean/": records,
        "KL 0 to 1/": [x for x in records if x.get("ppo/kl", 99) < 1],
        "KL 6 to 8/": [x for x in records if 6 <= x.get("ppo/kl", 99) < 8]}
    for prefix, part in parts.items():
        for name in {name for record in part for name in record}:
            values = [record[name] for record in part if name in record]
            numbers[prefix + name] = np.mean(values)

    if (path / "train.jsonl").exists():
        numbers.update(measure_votes(read_lines(path / "train.jsonl")))
    for file in folder.glob("*/eval.json"):
        numbers.update(measure_eval(json.loads(file.read_text()), run))
    return numbers


def read_numbers(experiment, folders, old):
    """-> {run: {key: {seed: number}}} of the keys that the experiment uses; `old`, the same of an
    earlier measurement, where a folder lacks the run."""
    keys = {"minutes", *experiment.COLUMNS.values()}
    for claim in experiment.CLAIMS:
        keys.update([claim.key, claim.smaller_key or claim.key])
    numbers = {}
    for run in experiment.RUNS:
        numbers[run] = {key: dict(by_seed) for key, by_seed in old.get(run, {}).items()}
        for folder in folders:
            if not (folder / run / "made.json").exists():
                continue
            found = read_run(folder, run)
            for key in sorted(keys & found.keys()):
                if math.isfinite(found[key]):
                    by_seed = numbers[run].setdefault(key, {})
                    by_seed[folder.name] = float(f"{found[key]:.6g}")
    return {run: by_key for run, by_key in numbers.items() if by_key}


def read_values(numbers, runs, key):
    """A number by seed (S,), NaN where it is missing. Several runs are averaged."""
    seeds = sorted({seed for run in numbers.values() for seed in run["minutes"]}, key=int)
    if isinstance(runs, float):
        return np.full(len(seeds), runs)
    values = []
    for run in [runs] if isinstance(runs, str) else runs:
        by_seed = numbers.get(run, {}).get(key, {})
        values.append([by_seed.get(seed, math.nan) for seed in seeds])
    return np.mean(values, axis=0)


def summarise(values):
    """Values over the seeds (S,), NaN where missing -> mean, half-width of its 95 % interval,
    two-sided p for a mean of 0, and number of values; None if there are fewer than two. Equal values
    say nothing about their variance: p is 1."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    df = len(values) - 1
    mean = np.mean(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    if error < 1e-12:  # but for rounding
        error = 0.0
        p = 1.0
    else:
        t = mean / error
        p = two_sided_p(df / (df + t**2), df)
    summary = {"mean": mean, "half": quantile(0.95, df) * error, "p": p}
    return {name: float(f"{float(x):.6g}") for name, x in summary.items()} | {"n": len(values)}


def is_share(key):
    """Accuracies and shares are shown in percent, and their differences in points."""
    return "accuracy" in key or "share" in key


def find_threshold(claim, smaller):
    """The largest difference that does not matter, if the claim does not say: half a point for
    shares, otherwise 5 % of the values `smaller` (S,)."""
    if claim.threshold is not None:
        return claim.threshold
    return 0.005 if is_share(claim.key) else round(0.05 * abs(float(np.nanmean(smaller))), 6)


def measure_claims(claims, numbers):
    """-> a record for each claim whose runs are there for two seeds or more; see docs/tables.py."""
    asked = collections.Counter(claim.figure for claim in claims)
    records = []
    for claim in claims:
        larger = read_values(numbers, claim.larger, claim.key)
        smaller = read_values(numbers, claim.smaller, claim.smaller_key or claim.key)
        summary = summarise(larger - smaller + claim.plus)
        if summary:
            records.append({
                "figure": claim.figure, "asked": asked[claim.figure], "text": claim.text, **summary,
                "threshold": find_threshold(claim, smaller), "percent": is_share(claim.key),
                "signed": True})
    return records


def measure_runs(experiment, numbers):
    """-> {run: {name of a column: summary}}. Accuracies are gains over the run's base, if any."""
    runs = {}
    for run in numbers:
        base = experiment.BASES.get(run)
        runs[run] = {}
        for name, key in experiment.COLUMNS.items():
            values = read_values(numbers, run, key)
            is_gain = "accuracy" in key and base not in (None, run)
            if is_gain:
                values = values - read_values(numbers, base, key)
            summary = summarise(values)
            if summary:
                runs[run][name] = {**summary, "percent": is_share(key), "signed": is_gain}
    return {run: columns for run, columns in runs.items() if columns}
