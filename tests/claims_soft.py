"""The experiment behind the README's row beyond the papers: voters label what a policy says, in the toy world.

    python tests/claims_soft.py --jobs 2     run what is missing under runs/claims_soft, then print the table

Every seed draws new comparisons, for training and for evaluation, new samples, new voters and a new reward head.
"""

import json
import sys
from pathlib import Path

import numpy as np

from claims import ROOT, over_seeds, run, show, table

RUNS = Path("runs/claims_soft")
METHODS = {  # flags of denoise_rm.py
    "baseline": "",
    "twice the epochs": "--epochs 6",
    "voted pairs of the policy": "--unlabelled {folder}/vote/policy.jsonl",
    "soft targets, S3": "--soft-targets 1 --strength {folder}/vote/train.jsonl",
    "both": "--soft-targets 1 --strength {folder}/vote/train.jsonl --unlabelled {folder}/vote/policy.jsonl",
    "twice the labels": "--data toy:seed={seed},n=8000",
}


def work(seed):
    """All runs of one seed."""
    import torch
    torch.set_num_threads(1)  # the toy model is too small for two
    sys.path.insert(0, str(ROOT))
    folder, sets = RUNS / str(seed), [f"{name}=toy:{name},seed={seed}" for name in ("id", "ood", "shifted")]
    shared = ["--data", f"toy:seed={seed}", "--seed", str(seed), "--eval-data", *sets]
    rare = ["--eval-every", "0", "--save-every", "0"]
    run("meta_rm.py", folder / "MetaRM", "model", *shared, *rare, "--meta-prompts", "2000")
    run("vote_strength.py", folder / "vote", "report.json", "--data", f"toy:seed={seed}", "--seed", str(10 * seed),
        "--eval-data", f"policy={folder}/MetaRM/meta.jsonl")
    for name, flags in METHODS.items():
        run("denoise_rm.py", folder / name, "model", *shared, *rare, *flags.format(seed=seed, folder=folder).split())


def accuracy(name, key, seeds):
    """Gold accuracy at the end of a run, over the seeds (S,)."""
    paths = [RUNS / f"{seed}/{name}/metrics.jsonl" for seed in range(seeds)]
    return np.array([json.loads(path.read_text().splitlines()[-1])[f"eval/{key}/accuracy"] for path in paths])


if __name__ == "__main__":
    seeds = over_seeds(__doc__, work)
    names = "id", "ood", "shifted"
    base = {name: accuracy("baseline", name, seeds) for name in names}
    table(["gold accuracy", *names], ["baseline", *(show(base[name]) for name in names)], *(
        [method, *(show(accuracy(method, name, seeds) - base[name], sign="+") for name in names)]
        for method in [*METHODS, "MetaRM"] if method != "baseline"))
