"""The experiments behind docs/results.md: the papers' claims, over seeds, by today's scripts.

    python docs/claims/run.py denoising --seeds 10 --jobs 2    runs what is missing, then measures
    python docs/claims/run.py denoising --jobs 0               measures what has been run
    python docs/tables.py docs/results.md README.md            fills in the tables of the pages

A run is a command line of one of the scripts. It is done once for each seed, in
runs/claims/<seed>/<run>; finished runs are skipped. A seed has its own comparisons, meta set,
reward heads, data order and samples, but the SFT model is shared. The numbers are written to
docs/claims/results/<experiment>.json. Experiments on real text: real.py.

To add the claim that label smoothing beats the baseline after one epoch, write in denoising.py:

    RUNS["smooth-1"] = f"{VOTED} --label-smoothing 0.2 --epochs 1"
    CLAIMS.append(Claim(
        figure="Fig. 8", text="Label smoothing beats the baseline after one epoch",
        key="eval/id/accuracy", larger="smooth-1", smaller="baseline-1"))

`run.py denoising --runs smooth-1` does this run for every seed and measures all claims again. On a
page, `<!-- claim: denoising/Label smoothing beats the baseline after one epoch --><!-- end -->`
stands for the number and its verdict.

    a ± b         mean over the seeds, half-width of its 95 % interval (Student's t, paired by seed)
    p             two-sided, with Holm's correction for the claims with the same figure
    confirmed     p < 0.05, in the direction of the claim
    opposite      p < 0.05, in the other direction and by more than the threshold
    no effect     the interval at level 1 - 0.05 / (claims with the figure) lies in 0 ± threshold
    undecided     none of these

The threshold is half a point for accuracies and other shares. For any other number it is 5 % of the
number that it is compared with, or what the claim says.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import re
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs"))
import world  # noqa: E402
from measure import measure_claims, measure_runs  # noqa: E402
from tables import RESULTS, read_results, show_table  # noqa: E402


def describe_code():
    """The commit, the versions and the processor that a run is made by."""
    commit = subprocess.getoutput(f"git -C {ROOT} rev-parse --short HEAD")
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    return {
        "commit": commit, "torch": torch.__version__, "transformers": transformers.__version__,
        "processor": processor, "date": time.strftime("%F")}


def run_once(name, command, folder, values):
    """One run of one seed. Its folder has made.json when it has finished."""
    path = folder / name
    if (path / "made.json").exists():
        return
    words = [string.Template(word).substitute(values) for word in command.split()]
    words = [sys.executable, *words, "--output-dir", path]
    began = time.time()
    with open(f"{path}.log", "w") as log:
        process = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log)
    if process.returncode:
        raise SystemExit(f"error: run {name} failed, see {path}.log")
    seconds = round(time.time() - began)
    (path / "made.json").write_text(json.dumps({**describe_code(), "seconds": seconds}))


def run_missing(runs, pattern, folders, values, jobs):
    """Do the missing runs whose names match a regular expression: seeds in parallel, the runs of a
    seed in order, because they need each other. In a command, $dir is the folder of the seed, $seed
    its number and $voter the seed of its first voter."""
    chosen = [name for name in runs if re.fullmatch(pattern, name)]
    bar = tqdm(total=len(chosen) * len(folders), desc="runs")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def run_seed(folder):
        seed = int(folder.name)
        here = {"dir": folder, "seed": seed, "voter": 10 * seed, **values}
        for name in chosen:
            run_once(name, runs[name], folder, here)
            bar.update()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_seed, folders))


def save_results(name, experiment, folders, about):
    """Measure what has been run, write docs/claims/results/<name>.json and print the verdicts."""
    hours = {}  # by which code
    for folder in folders:
        for path in sorted(folder.glob("*/made.json")):
            record = json.loads(path.read_text())
            seconds = record.pop("seconds")
            code = ", ".join(f"{key} {value}" for key, value in record.items())
            hours[code] = round(hours.get(code, 0) + seconds / 3600, 3)
    results = {
        "about": about, "seeds": len(folders), "hours": hours,
        "runs": measure_runs(experiment, folders),
        "claims": measure_claims(experiment.CLAIMS, folders)}
    text = json.dumps(results, indent=1)
    for part in re.findall(r"{[^{}]*}", text):  # a line for each number
        text = text.replace(part, " ".join(part.split()))
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(show_table(read_results(name), "claims"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["denoising", "generalisation", "ppo"])
    parser.add_argument("--seeds", type=int, default=10, help="2 or more")
    parser.add_argument("--jobs", type=int, default=1, help="processes; 0: only measure")
    parser.add_argument("--runs", default=".*", help="regular expression for their names")
    args = parser.parse_args()

    experiment = importlib.import_module(args.experiment)
    folders = [Path(f"runs/claims/{seed}").resolve() for seed in range(args.seeds)]
    if args.jobs:
        for folder, flip in itertools.product(folders, experiment.FLIPS):
            world.make_world(folder / f"toy-{flip}", int(folder.name), flip)
        run_missing(experiment.RUNS, args.runs, folders, {"model": world.MODEL}, args.jobs)
    save_results(args.experiment, experiment, folders, "toy world")
