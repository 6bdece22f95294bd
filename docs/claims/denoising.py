"""Section 2: votes, what each tenth of the data teaches, denoising at four rates of noise."""

from measure import Claim
from world import TOY, TRAIN, VOTE

FLIPS = [0.1, 0.0, 0.25, 0.4]  # fractions of flipped labels; the first where a run's name has none
VOTED = f"denoise_rm.py {TRAIN} --data $dir/vote-0.1/train.jsonl"
METHODS = {
    "baseline": "", "margin": "--margin", "flip": "--flip 0.1", "drop": "--drop 0.1",
    "flip-margin": "--flip 0.1 --margin", "S3": "--soft-targets 1",
    "S1": "--margin --label-smoothing 0.2 --smooth-on negative"}
STRONGEST = {
    "plain": "", "margin": "--margin", "soft": "--label-smoothing 0.2",
    "both": "--margin --label-smoothing 0.2"}
ID = "eval/id/accuracy"
NOISY = "eval/noisy/accuracy"  # the annotators' labels
LOSS = "eval/noisy/loss"
COLUMNS = {
    "annotators' labels, %": NOISY, "gold, %": ID, "gold, `ood`, %": "eval/ood/accuracy",
    "loss, annotators' labels": LOSS, "wrong labels repeated, %": "wrong/accuracy",
    "wrong labels, %": "share wrong", "strength < 0, %": "share below 0",
    "wrong, % of those": "share wrong below 0",
    "strength < 0, % of wrong labels": "share below 0 of wrong",
    "area under the curve": "area under the curve",
    "right labels, weakest twentieth, %": "accuracy, weakest",
    "nearest to 0, %": "accuracy, at 0", "strongest, %": "accuracy, strongest",
    "std, weakest": "std, weakest", "std, 20 to 40 %": "std, 20 to 40 %",
    "std, strongest": "std, strongest"}
for i in range(1, 11):
    COLUMNS[f"tenth {i}, %"] = f"share wrong, tenth {i}"

RUNS = {}
BASES = {}  # the run over which the accuracies of a run are gains
for rate in FLIPS:
    RUNS[f"vote-{rate}"] = VOTE.replace("toy-0.1", f"toy-{rate}")
for epochs in (1, 4, 8):
    for name, flags in METHODS.items():
        RUNS[f"{name}-{epochs}"] = f"{VOTED} {flags} --epochs {epochs}"
        BASES[f"{name}-{epochs}"] = f"baseline-{epochs}"
for rate in FLIPS[1:]:
    for epochs in (1, 4):
        for name in ("baseline", "flip", "S1", "S3", "drop"):
            command = RUNS[f"{name}-{epochs}"]
            RUNS[f"{name}-{epochs}-{rate}"] = command.replace("vote-0.1", f"vote-{rate}")
            BASES[f"{name}-{epochs}-{rate}"] = f"baseline-{epochs}-{rate}"
for low in range(0, 100, 10):  # a tenth of the data, so more epochs
    RUNS[f"tenth-{low}"] = f"{VOTED} --percentiles {low} {low + 10} --epochs 8"
for low in (0, 10):
    RUNS[f"tenth-{low}-flipped"] = f"{VOTED} --percentiles {low} {low + 10} --epochs 8 --flip 1"
for name, flags in STRONGEST.items():
    RUNS[f"strongest-{name}"] = f"{VOTED} --percentiles 90 100 --epochs 16 {flags}"
MODELS = ["baseline-1", "flip-1", "S3-1", "baseline-4", "flip-4", "S3-4"]
FILES = " ".join(f"{name}=$dir/{name}/model" for name in MODELS)
RUNS["eval-denoising"] = (
    f"eval.py --eval-data wrong={TOY}/wrong.jsonl --max-length 64 --reward-models {FILES}")

CLAIMS = [
    Claim("Fig. 3", "Of the weakest labels, less than half are right", "accuracy, weakest",
          larger=0.5, smaller="vote-0.1"),
    Claim("Fig. 3", "Of the strongest labels, more than 95 % are right", "accuracy, strongest",
          larger="vote-0.1", smaller=0.95),
    Claim("Fig. 3", "Of the labels near 0, at most 55 % are right", "accuracy, at 0",
          larger=0.55, smaller="vote-0.1"),
    Claim("Fig. 4", "The weakest tenth teaches the opposite", NOISY, 0.5, "tenth-0"),
    Claim("Fig. 4", "The second weakest tenth teaches the opposite", NOISY, 0.5, "tenth-10"),
    Claim("Fig. 4", "The third weakest tenth ends above 45 %", NOISY, "tenth-20", 0.45),
    Claim("Fig. 4", "The third weakest tenth ends below 55 %", NOISY, 0.55, "tenth-20"),
    Claim("Fig. 4", "The fourth weakest tenth ends above 45 %", NOISY, "tenth-30", 0.45),
    Claim("Fig. 4", "The fourth weakest tenth ends below 55 %", NOISY, 0.55, "tenth-30"),
    Claim("Fig. 4", "The strongest tenth is worse than normal ones", NOISY,
          larger=["tenth-60", "tenth-70"], smaller="tenth-90"),
    Claim("Fig. 6", "Margins help on strong labels", NOISY, "strongest-margin", "strongest-plain"),
    Claim("Fig. 6", "Smoothing helps on strong labels", NOISY, "strongest-soft", "strongest-plain"),
    Claim("Fig. 6", "Margins help beside smoothing", NOISY, "strongest-both", "strongest-soft"),
    Claim("Fig. 6", "Smoothing keeps the loss low", LOSS, "strongest-plain", "strongest-soft"),
    Claim("Fig. 7", "The margin helps after 8 epochs", NOISY, "margin-8", "baseline-8"),
    Claim("Fig. 8", "The baseline falls from 4 to 8 epochs", NOISY, "baseline-4", "baseline-8"),
    Claim("Fig. 8", "S1 has a lower loss after 8 epochs", LOSS, "baseline-8", "S1-8"),
    Claim("Fig. 8", "S3 has a lower loss after 8 epochs", LOSS, "baseline-8", "S3-8")]
for part in ("weakest", "strongest"):
    CLAIMS.append(Claim(
        "Fig. 2", f"Voters disagree more about the {part} labels than about weak ones",
        f"std, {part}", larger="vote-0.1", smaller="vote-0.1", smaller_key="std, 20 to 40 %"))
for low, words in ((0, "weakest"), (10, "second weakest")):
    for group, start in (("all", 0), ("the upper six", 40)):
        text = f"The {words} tenth, flipped, beats the mean of {group} tenths"
        tenths = [f"tenth-{x}" for x in range(start, 100, 10)]
        CLAIMS.append(Claim("Fig. 5", text, NOISY, f"tenth-{low}-flipped", tenths))
for epochs in (1, 4, 8):
    for name in ("margin", "flip", "flip-margin", "S1", "S3"):
        text = f"{name} beats the baseline, epochs: {epochs}"
        CLAIMS.append(Claim("Fig. 8", text, ID, f"{name}-{epochs}", f"baseline-{epochs}"))
for epochs in (1, 4):
    for name in ("flip", "S3"):
        text = f"{name} repeats fewer wrong labels, epochs: {epochs}"
        CLAIMS.append(Claim(
            "Fig. 28", text, "wrong/accuracy", f"baseline-{epochs}", f"{name}-{epochs}"))
for rate in FLIPS:
    end = "4" if rate == FLIPS[0] else f"4-{rate}"
    text = f"Dropping beats flipping, labels flipped: {rate:.0%}"
    CLAIMS.append(Claim("arXiv 2509.23564", text, ID, f"drop-{end}", f"flip-{end}"))
