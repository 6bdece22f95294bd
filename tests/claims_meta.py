"""The experiments behind the README's tables on contrastive_rm.py and meta_rm.py, in the toy world, with the scripts as
they are.

    python tests/claims_meta.py --jobs 2     run what is missing under runs/claims_meta, then print the tables

Every seed draws new comparisons, for training and for evaluation, new samples for the meta set, and a new reward head.
"""

import argparse
import contextlib
import json
import random
import sys
from pathlib import Path

import numpy as np

from claims import ROOT, over_seeds, run, show, table, verdict

RUNS = Path("runs/claims_meta").absolute()
TOY = "--epochs 3 --batch-size 32 --lr 5e-4 --max-length 64 --micro-tokens 4096"  # the toy's defaults
WORLDS = {  # name: flags of --data and others, that all methods get
    "toy": ("", TOY),
    "1 epoch": ("", f"{TOY} --epochs 1"),
    "40 % turned around": (",flip=0.4", TOY),
    "500 comparisons": (",n=500", f"{TOY} --epochs 8"),
    "random weights": ("", f"{TOY} --model random.json --tokenizer tokenizer"),
}


def meta(source, ascent, update, *etas):
    """{name: flags} of meta_rm.py, its meta set of SFT responses or of better, `shifted` ones."""
    return {f"MetaRM{', shifted' * (source == 'shifted')}, {ascent}, {update}, eta {eta:g}":
            f"meta_rm.py --meta-data {source}.jsonl --ascent {ascent} --update {update} --eta {eta}" for eta in etas}


CONTRASTIVE = {
    "SimCSE": "contrastive_rm.py --method simcse",
    "SimCSE, differences": "contrastive_rm.py --method simcse --on differences",
    "SwAV": "contrastive_rm.py --method swav",
    "SwAV, differences": "contrastive_rm.py --method swav --on differences",
}
METHODS = {  # in every world
    "baseline": "baseline_rm.py", "dropout": "contrastive_rm.py --beta 0", **CONTRASTIVE,
    **meta("sft", "normalized", "restore", 0.01, 0.1), **meta("shifted", "normalized", "restore", 0.01),
}
MORE = {  # in the first alone
    **{f"{name}, beta {beta}": f"{flags} --beta {beta}" for name, flags in CONTRASTIVE.items()
       for beta in (0.01, 0.1) if (name, beta) != ("SwAV", 0.1)},
    **{f"SimCSE, tau {tau}": f"{CONTRASTIVE['SimCSE']} --temperature {tau}" for tau in (0.2, 1)},
    **meta("sft", "plain", "restore", 5e-6, 1e-3, 1e-2, 0.1), **meta("sft", "normalized", "restore", 1e-3, 1),
    **meta("sft", "normalized", "alternate", 1e-4, 1e-3, 1e-2),
    **meta("shifted", "normalized", "restore", 0.1), **meta("shifted", "normalized", "alternate", 1e-3),
}


def cells():
    """{(world, method): (flags of --data, all other flags)}"""
    runs = {(world, method): (data, f"{flags} {more}") for method, flags in METHODS.items()
            for world, (data, more) in WORLDS.items()}
    return runs | {("toy", method): (WORLDS["toy"][0], f"{flags} {WORLDS['toy'][1]}") for method, flags in MORE.items()}


def prepare(folder, seed):
    """The files that the flags name: meta sets of 1,000 prompts of the training set, and a configuration."""
    import transformers

    import common
    transformers.AutoConfig.from_pretrained(common.toy_model()).to_json_file(folder / "random.json")
    common.toy_tokenizer().save_pretrained(folder / "tokenizer")
    rng = random.Random(seed)
    prompts = [row["prompt"] for row in common.toy_comparisons(n=1000, seed=seed)]
    args = argparse.Namespace(
        temperature=1.0, max_new_tokens=12, max_length=64, sample_batch=32)
    sft = common.sample_responses(
        common.toy_model(), "--policy", prompts, 5, (seed, 0, 1), args, common.torch.device("cpu"))
    shifted = [{"prompt": prompt, "responses": [common.toy_response(rng, prompt, rng.uniform(0.8, 1))
                                                for _ in range(5)]} for prompt in prompts]
    for name, rows in (("sft", sft), ("shifted", shifted)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


LIKE_THE_RUNS = argparse.Namespace(dtype="float32", seed=0, max_length=64, micro_tokens=4096)


def work(seed, only=None):
    """All runs of one seed, or those whose (world, method) is in `only`, and what `measure` says of each."""
    import torch
    torch.set_num_threads(1)  # the toy model is too small for two
    sys.path.insert(0, str(ROOT))
    folder = RUNS / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    sets = [f"{name}=toy:{name},seed={seed}" for name in ("id", "ood", "shifted", "noisy")]
    with contextlib.chdir(folder):
        if not Path("shifted.jsonl").exists():
            prepare(folder, seed)
        for (world, method), (data, flags) in cells().items():
            if not only or (world, method) in only:
                script, *flags = flags.split()
                out = folder / world / method
                run(script, out, "model", "--data", f"toy:seed={seed}{data}", "--eval-data", *sets, "--seed", str(seed),
                    "--eval-every", "0", "--save-every", "0", *flags)
                if not (out / "more.json").exists():
                    (out / "more.json").write_text(json.dumps(measure(out / "model", seed)))


def measure(path, seed):
    """What a model makes of the meta data held out (Fig. 16), and how much its features overlap (Fig. 11)."""
    import torch

    import common
    import contrastive_rm
    tokenizer = common.load_tokenizer(path, None)
    model = common.load_reward_model(path, tokenizer, torch.device("cpu"), LIKE_THE_RUNS)
    more = {}
    for source in ("sft", "shifted"):
        rows = common.tokenize(common.load_rows(f"{source}.jsonl"), source, tokenizer, 64, ("prompt", "responses"))
        rows = rows.select(range(len(rows) - max(1, len(rows) // 10), len(rows)))
        rewards = common.score(model, rows, 4096)
        i, j = torch.triu_indices(5, 5, 1)
        gaps = (rewards[:, i] - rewards[:, j]).abs()
        more[f"{source}/difference"] = gaps.mean().item()
        more[f"{source}/normalised"] = (gaps / gaps.max()).mean().item()
    for name in ("id", "shifted"):
        rows = common.tokenize(common.load_rows(f"toy:{name},seed={seed}"), name, tokenizer, 64)
        more[f"{name}/overlap"] = contrastive_rm.overlap(common.score(model, rows, 4096, with_features=True)[1])
    return more


# --------------------------------------------------------------------------------------------------------- results
def metric(world, method, key, seeds):
    """A metric of the last record, of more.json, or the mean of a train/ metric over the steps, over the seeds (S,)."""
    values = []
    for seed in range(seeds):
        folder = RUNS / f"{seed}/{world}/{method}"
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if key.startswith("train/"):
            values.append(np.mean([record[key] for record in records]))
        else:
            values.append((records[-1] | json.loads((folder / "more.json").read_text()))[key])
    return np.array(values)


def gain(world, method, name, seeds):
    """Accuracy on a set less the baseline's, over the seeds (S,)."""
    return np.subtract(*(metric(world, x, f"eval/{name}/accuracy", seeds) for x in (method, "baseline")))


def tables(seeds):
    """Print everything but the verdicts."""
    for name in ("id", "ood", "shifted"):
        table([f"gold accuracy on {name}", *WORLDS],
              ["baseline", *(show(metric(world, "baseline", f"eval/{name}/accuracy", seeds)) for world in WORLDS)],
              *([method, *(show(gain(world, method, name, seeds), sign="+") for world in WORLDS)]
                for method in METHODS if method != "baseline"))
    table(["toy", "id", "ood", "shifted", "overlap on id", "overlap on shifted"], *(
        [method, *(show(gain("toy", method, name, seeds), sign="+") for name in ("id", "ood", "shifted")),
         *(show(metric("toy", method, f"{name}/overlap", seeds), 1, 2) for name in ("id", "shifted"))]
        for method in [*METHODS, *MORE] if "Meta" not in method))
    rows = []
    for method in [*METHODS, *MORE]:
        if method == "baseline" or "Meta" in method:
            moved = ["", ""]
            if "Meta" in method:
                shift, update = (metric("toy", method, f"train/{key}", seeds).mean() for key in ("shift", "update"))
                moved = [f"{shift:.1g}", f"{shift / update:.1g}"]
            rows.append([method, *moved,
                         *(show(gain("toy", method, name, seeds), sign="+") for name in ("id", "ood", "shifted")),
                         *(show(metric("toy", method, f"shifted/{key}", seeds), 1, 3)
                           for key in ("difference", "normalised"))])
    table(["toy", "shift", "shift / update", "id", "ood", "shifted", "difference", "difference, 0 to 1"], *rows)


def claims(seeds):
    """Print a verdict for each claim: a quantity that the claim says is above 0, and its interval over the seeds."""
    def less(world, key, a, b):
        return metric(world, a, key, seeds) - metric(world, b, key, seeds)

    literal, turned = "MetaRM, normalized, restore, eta 0.01", "MetaRM, normalized, alternate, eta 0.001"
    shifted = "MetaRM, shifted, normalized, restore, eta 0.01"
    rows = [("Fig. 11", f"SimCSE pulls the features apart, {name}, {world}: overlap of the baseline - SimCSE",
             less(world, f"{name}/overlap", "baseline", "SimCSE"), 1)
            for world in ("toy", "random weights") for name in ("id", "shifted")]
    rows += [("section 3.1", f"{method} separates better, {world}: gold accuracy on id, to the baseline",
              gain(world, method, "id", seeds), 100)
             for method in CONTRASTIVE for world in ("toy", "1 epoch", "random weights")]
    rows += [("section 3.1", "SimCSE is the best of the four, toy: SimCSE - SwAV, id",
              gain("toy", "SimCSE", "id", seeds) - gain("toy", "SwAV", "id", seeds), 100)]
    rows += [("AAAI Fig. 4", f"the meta step costs no accuracy, {method}: gain + half a point, id",
              gain("toy", method, "id", seeds) + 0.005, 100) for method in (literal, shifted, turned)]
    rows += [("AAAI Table 1", f"it helps on what a better policy says, {method}: {world}, shifted",
              gain(world, method, "shifted", seeds), 100)
             for method, world in ((literal, "toy"), (literal, "1 epoch"), (shifted, "toy"), (shifted, "1 epoch"),
                                   (turned, "toy"))]
    rows += [("Fig. 16", f"{method} widens the reward differences on the shifted meta data: to the baseline, {kind}",
              less("toy", f"shifted/{key}", method, "baseline"), 1)
             for method in (literal, shifted, turned)
             for key, kind in (("difference", "as it is"), ("normalised", "0 to 1"))]
    table(["paper", "above 0, if the claim holds", "measured", "verdict"], *(
        [source, text, show(values, scale, 1 if scale == 100 else 3, "+") + " points" * (scale == 100),
         verdict(values, 0.005 * (scale == 100))] for source, text, values, scale in rows))


if __name__ == "__main__":
    seeds = over_seeds(__doc__, work)
    tables(seeds)
    claims(seeds)
