"""The experiments behind the README's tables on ppo_loop.py, in the toy world, with the scripts as they are.

    python tests/claims_ppo.py --jobs 2      run what is missing under runs/claims_ppo, then print the tables

Reward models are those of claims.py and claims_meta.py; where they are missing, they are trained as there.
Every seed has its comparisons, its voters and reward models, and its own order and samples in PPO.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np

import claims as denoising
import claims_meta
from claims import FIGURE_8, NOISE, ROOT, over_seeds, run, show, table, verdict

RUNS = Path("runs/claims_ppo")
RM = ("--epochs 3 --batch-size 32 --lr 5e-4 --max-length 64 --micro-tokens 4096 --eval-every 0 --save-every 0 "
      "--meta-prompts 1000 --max-new-tokens 12 --ascent normalized")
LONG = "--rounds 1 --iterations 300"
DENOISED = {name: f"{name}, 1 epochs" for name in FIGURE_8}  # reward models, and their runs
CONTRASTIVE = {"baseline, 3 epochs": "baseline", "SimCSE": "SimCSE", "SwAV": "SwAV"}
RACES = {name: f"claims/{NOISE[0]}/{{seed}}/{cell}" for name, cell in DENOISED.items()}
RACES |= {name: f"claims_meta/{{seed}}/toy/{cell}" for name, cell in CONTRASTIVE.items()}
GENTLE = "baseline", "soft targets, S3", *CONTRASTIVE  # also with a KL penalty
KLS = [*((name, 0) for name in RACES), *((name, 0.2) for name in GENTLE)]
LOOPS = {
    "PPO once": f"{LONG} --method baseline",
    "rounds, no meta step": "--rounds 3 --method baseline",
    "rounds, MetaRM": "--rounds 3 --rm-flags={RM} --eta 0.01",
    "rounds, MetaRM, eta 0.1": "--rounds 3 --rm-flags={RM} --eta 0.1",
    "rounds, MetaRM, alternate": "--rounds 3 --rm-flags={RM} --eta 0.001 --update alternate",
}


def flags_of(text):
    """The flags of a row of LOOPS; what follows --rm-flags= is one."""
    plain, _, rm = text.partition("--rm-flags=")
    return [*plain.split(), *([f"--rm-flags={rm.format(RM=RM)}"] if rm else [f"--rm-flags={RM}"])]


def work(seed):
    """All runs of one seed."""
    import torch
    torch.set_num_threads(1)  # the toy model is too small for two
    sys.path.insert(0, str(ROOT))
    denoising.work(seed, NOISE[0], DENOISED.values())
    claims_meta.work(seed, [("toy", name) for name in CONTRASTIVE.values()])
    common = ["--data", f"toy:seed={seed}", "--seed", str(seed), "--save-every", "0",
              "--eval-data", f"id=toy:id,seed={seed}", f"ood=toy:ood,seed={seed}"]
    for name, kl in KLS:
        run("ppo_loop.py", RUNS / f"{seed}/{name}, KL {kl}", "round-1/policy", *common, "--rounds", "1",
            "--iterations", "200", "--eval-every", "0", "--kl", str(kl), "--reward-model",
            str(RUNS.parent / RACES[name].format(seed=seed) / "model"))
    for name, flags in LOOPS.items():
        last = "round-1/policy" if "once" in name else "round-3/policy"
        run("ppo_loop.py", RUNS / f"{seed}/{name}", last, *common, *flags_of(flags))


# --------------------------------------------------------------------------------------------------------- results
@functools.cache
def records(seed, name):
    return [json.loads(line) for line in (RUNS / f"{seed}/{name}/metrics.jsonl").read_text().splitlines()]


def at_kl(seed, name, key, low, high):
    """Mean of a metric over the iterations whose KL lies in a range."""
    values = [x[f"ppo/{key}"] for x in records(seed, name) if low <= x["ppo/kl"] < high and f"ppo/{key}" in x]
    return np.mean(values) if values else np.nan


def last(name, key, seeds):
    return np.array([records(seed, name)[-1].get(key, np.nan) for seed in range(seeds)])


def wins(seed, one, other):
    """Win, tie and lose by gold of what two policies say, two files, to the same prompts: (3,)."""
    ours, theirs = ([json.loads(line)["gold"] for line in (RUNS / f"{seed}/{path}.jsonl").read_text().splitlines()]
                    for path in (one, other))
    return np.array([np.mean(np.sign(np.subtract(ours, theirs)) == sign) for sign in (1, 0, -1)])


def net(seeds, one, other):
    """Win - lose over the seeds (S,)."""
    return np.array([wins(seed, one, other) @ (1, 0, -1) for seed in range(seeds)])


def tables(seeds):
    bins = [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 30)]
    for key in ("gold", "agreement", "spread"):
        table([f"{key}, no KL penalty; KL:", *(f"{low} to {high}" for low, high in bins)], *(
            [name, *(show(np.array(values), 1, 2) if not np.isnan(values).any() else "" for values in (
                [at_kl(seed, f"{name}, KL 0", key, *part) for seed in range(seeds)] for part in bins))]
            for name in RACES))
    keys = "ppo/kl", "eval/id/gold", "eval/ood/gold", "eval/id/perplexity"
    start = [records(seed, "PPO once")[0][f"before/{name}/gold"] for name in ("id", "ood") for seed in range(seeds)]
    print("gold of the SFT model on id and ood:", *(show(x, 1, 2) for x in np.split(np.array(start), 2)), end="\n\n")
    table(["after 200 iterations", *keys], *(
        [name, *(show(last(name, key, seeds), 1, 2) for key in keys)]
        for name in (f"{name}, KL {kl}" for name, kl in KLS)))
    rows = []
    for name in LOOPS:
        for number in [1] if "once" in name else [1, 2, 3]:
            start, end = f"{name}/round-1/before", f"{name}/round-{number}/after"
            outcome = np.array([wins(seed, end, start) for seed in range(seeds)])
            lines = [[x for x in records(seed, name) if x["round"] == number][-1] for seed in range(seeds)]
            rows.append([name, str(number), *(show(np.array([x[key] for x in lines]), 1, 2) for key in keys),
                         " / ".join(f"{100 * x:.0f}" for x in outcome.mean(0)),
                         show(net(seeds, end, start), 100, 1)])
    table(["method", "round", *keys, "win / tie / lose against SFT, %", "win - lose"], *rows)


def claims(seeds):
    """Print a verdict for each claim: a quantity that the claim says is above 0, and its interval over the seeds."""
    def gold(name, key="eval/id/gold"):
        return last(name, key, seeds)

    def over(name, key, *part):
        return np.array([at_kl(seed, f"{name}, KL 0", key, *part) for seed in range(seeds)])

    start = np.array([records(seed, "PPO once")[0]["before/id/gold"] for seed in range(seeds)])
    ends = {name: f"{name}/round-{1 if 'once' in name else 3}/after" for name in LOOPS}
    rows = [("AAAI Fig. 1", "the spread of the scores shrinks as PPO goes on: at KL 0 to 1 - at KL 6 to 8",
             over("baseline", "spread", 0, 1) - over("baseline", "spread", 6, 8)),
            ("2210.10760", "without KL penalty gold falls below SFT's: SFT - baseline, KL 0",
             start - gold("baseline, KL 0")),
            ("section 2.5", "with it gold rises: baseline, KL 0.2 - SFT", gold("baseline, KL 0.2") - start)]
    rows += [("Fig. 9", f"without KL penalty {name} is over-optimised less: gold at KL 6 to 8, to the baseline",
              over(name, "gold", 6, 8) - over("baseline", "gold", 6, 8)) for name in FIGURE_8[1:]]
    rows += [("Fig. 10", f"{when} {name} wins: win - lose by gold, to the baseline",
              net(seeds, f"{name}, KL {kl}/round-1/after", f"baseline, KL {kl}/round-1/after"))
             for when, kl, names in (("without KL penalty", 0, FIGURE_8[1:]), ("with it", 0.2, FIGURE_8[5:]))
             for name in names]
    base, *names = CONTRASTIVE
    rows += [("Fig. 12", f"without KL penalty {name} is over-optimised less: gold at KL 6 to 8, to the baseline",
              over(name, "gold", 6, 8) - over(base, "gold", 6, 8)) for name in names]
    rows += [("Fig. 12", f"and {what} after 200 iterations: {text}", sign * (gold(f"{name}, KL 0", key) - gold(
        f"{base}, KL 0", key))) for name in names for what, text, key, sign in (
            ("is worth more", f"gold on id, {name} - the baseline", "eval/id/gold", 1),
            ("has moved less", f"KL, the baseline - {name}", "ppo/kl", -1))]
    rows += [("Fig. 13", f"with it {name} makes the better policy: gold on {key}, to the baseline",
              gold(f"{name}, KL 0.2", f"eval/{key}/gold") - gold(f"{base}, KL 0.2", f"eval/{key}/gold"))
             for name in names for key in ("id", "ood")]
    rows += [("Fig. 13", f"and wins: win - lose by gold, {name} to the baseline",
              net(seeds, f"{name}, KL 0.2/round-1/after", f"{base}, KL 0.2/round-1/after")) for name in names]
    rows += [("Table 2", "MetaRM's rounds help: round 3 - round 1, gold on id",
              gold("rounds, MetaRM") - np.array([[x for x in records(seed, "rounds, MetaRM") if x["round"] == 1][-1][
                  "eval/id/gold"] for seed in range(seeds)])),
             ("Table 3", "better than PPO once: gold on id", gold("rounds, MetaRM") - gold("PPO once")),
             ("Table 3", "better than the same rounds without meta step: gold on id",
              gold("rounds, MetaRM") - gold("rounds, no meta step")),
             ("Fig. 15", "and out of distribution: gold on ood",
              gold("rounds, MetaRM", "eval/ood/gold") - gold("rounds, no meta step", "eval/ood/gold")),
             *(("Table 3", f"win - lose by gold, MetaRM's third round to {name}",
                net(seeds, ends["rounds, MetaRM"], ends[name])) for name in ("PPO once", "rounds, no meta step"))]
    table(["paper", "above 0, if the claim holds", "measured", "verdict"], *(
        [source, text, show(values, 1, 2, "+"), verdict(values, 0)] for source, text, values in rows))


if __name__ == "__main__":
    seeds = over_seeds(__doc__, work)
    tables(seeds)
    claims(seeds)
