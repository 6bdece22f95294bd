"""Section 2: votes, what each tenth of the data teaches, and denoising at four rates of flipped labels."""

import numpy as np

from run import TRAIN, compare

FLIPS = [0.1, 0.0, 0.25, 0.4]  # fraction of the annotators' labels that are flipped; docs/toy has the first
METHODS = {
    "baseline": "", "margin": "--margin", "flip": "--flip 0.1", "flip-margin": "--flip 0.1 --margin",
    "S1": "--margin --label-smoothing 0.2 --smooth-on negative", "S3": "--soft-targets 1", "drop": "--drop 0.1"}
NOISY = "baseline", "flip", "S1", "S3", "drop"  # also at the other rates
VOTE = ("vote_strength.py --model {model} --data {dir}/toy-0.1/train.jsonl --eval-data noisy={dir}/toy-0.1/noisy.jsonl "
        "--seed {seed}0 --batch-size 32 --lr 5e-4 --max-length 64 --epochs 3")
VOTED = f"denoise_rm.py {TRAIN} --data {{dir}}/vote-0.1/train.jsonl"

CELLS = {f"vote-{rate}": VOTE.replace("toy-0.1", f"toy-{rate}") for rate in FLIPS}
for name, flags in METHODS.items():
    CELLS.update({f"{name}-{epochs}": f"{VOTED} {flags} --epochs {epochs}" for epochs in (1, 4, 8)})
for name in NOISY:
    CELLS.update({f"{name}-{epochs}-{rate}": CELLS[f"{name}-{epochs}"].replace("vote-0.1", f"vote-{rate}")
                  for epochs in (1, 4) for rate in FLIPS[1:]})
CELLS["again-4"] = f"{VOTED} --epochs 4 --seed 10{{seed}}"  # the effect of the seed alone (Fig. 27)
for low in range(0, 100, 10):  # a tenth of the data, so more epochs
    CELLS[f"decile-{low}"] = f"{VOTED} --percentiles {low} {low + 10} --epochs 8"
for low in (0, 10):
    CELLS[f"decile-{low}-flipped"] = f"{VOTED} --percentiles {low} {low + 10} --epochs 8 --flip 1"
for name, flags in {"plain": "", "margin": "--margin", "soft": "--label-smoothing 0.2",
                    "both": "--margin --label-smoothing 0.2"}.items():
    CELLS[f"strongest-{name}"] = f"{VOTED} --percentiles 90 100 --epochs 16 {flags}"
MEASURED = "baseline-1", "flip-1", "S3-1", "baseline-4", "flip-4", "S3-4", "again-4"
CELLS["voted-eval"] = " ".join([
    "eval.py --max-length 64 --eval-data voted={dir}/vote-0.1/noisy.jsonl wrong={dir}/toy-0.1/wrong.jsonl",
    "--reward-models", *(f"{name}={{dir}}/{name}/model" for name in MEASURED)])

ID, NOISE, LOSS = "eval/id/accuracy", "eval/noisy/accuracy", "eval/noisy/loss"
KEYS = NOISE, ID, "eval/ood/accuracy", LOSS
VOTES = ("wrong", "strength < 0", "wrong if < 0", "< 0 if wrong", "accuracy, weakest", "accuracy, at 0",
         "accuracy, strongest", "std, weakest", "std, 20 to 40 %", "std, strongest")
TABLES = [("votes", [f"vote-{rate}" for rate in FLIPS], VOTES),
          ("part of the data", [name for name in CELLS if name.startswith(("decile", "strongest"))], KEYS)]
TABLES += [(f"all data, {epochs} epochs", [f"{name}-{epochs}" for name in METHODS], KEYS, f"baseline-{epochs}")
           for epochs in (1, 4, 8)]
TABLES += [(f"{rate:.0%} flipped", [f"{name}-{epochs}-{rate}" for name in NOISY], [ID], f"baseline-{epochs}-{rate}")
           for epochs in (1, 4) for rate in FLIPS[1:]]
NORMAL = ",".join(f"decile-{low}" for low in range(40, 100, 10))
ALL = ",".join(f"decile-{low}" for low in range(0, 100, 10))
COMPARISONS = [
    *(("Fig. 2", "vote-0.1", "vote-0.1", f"std, {part}", "std, 20 to 40 %") for part in ("weakest", "strongest")),
    ("Fig. 3", 0.5, "vote-0.1", "accuracy, weakest"), ("Fig. 3", "vote-0.1", 0.95, "accuracy, strongest"),
    ("Fig. 3", 0.55, "vote-0.1", "accuracy, at 0"),
    ("Fig. 4", 0.5, "decile-0", NOISE), ("Fig. 4", 0.5, "decile-10", NOISE),  # the opposite is learnt
    *(("Fig. 4", *sides, NOISE) for x in ("decile-20", "decile-30") for sides in ((x, 0.45), (0.55, x))),  # nothing
    ("Fig. 4", "decile-60,decile-70", "decile-90", NOISE),  # the strongest is not the best
    *(("Fig. 5", f"decile-{low}-flipped", part, NOISE) for low in (0, 10) for part in (ALL, NORMAL)),
    *(("Fig. 6", f"strongest-{a}", f"strongest-{b}", NOISE)
      for a, b in (("margin", "plain"), ("soft", "plain"), ("both", "soft"))),
    ("Fig. 6", "strongest-plain", "strongest-soft", LOSS),
    ("Fig. 7", "margin-8", "baseline-8", NOISE), ("Fig. 8", "baseline-4", "baseline-8", NOISE),
    ("Fig. 8", "baseline-8", "S1-8", LOSS), ("Fig. 8", "baseline-8", "S3-8", LOSS),
    *(("Fig. 8", f"{name}-{epochs}", f"baseline-{epochs}", ID)
      for epochs in (1, 4, 8) for name in ("margin", "flip", "flip-margin", "S1", "S3")),
    *(("Fig. 28", f"baseline-{epochs}", f"{name}-{epochs}", "wrong/accuracy")  # fewer wrong labels are repeated
      for epochs in (1, 4) for name in ("flip", "S3")),
    *(("2509.23564", f"drop-4{rate}", f"flip-4{rate}", ID) for rate in ("-0.0", "", "-0.25", "-0.4"))]


def more_claims(folders):
    def weak_gap(name):  # mean abs(accuracy - baseline's) in the 10 weaker of 20 segments less that in the others
        keys = [f"voted/{i}/accuracy" for i in range(1, 21)]
        gaps = [abs(compare(folders, "", name, "baseline-4", key)[2]) for key in keys]
        return np.mean(gaps[:10], axis=0) - np.mean(gaps[10:], axis=0)
    text = "abs(flip - baseline), weaker - stronger half, less the same for a baseline with another seed"
    return [("Fig. 27", text, weak_gap("flip-4") - weak_gap("again-4"), 100)]
