"""Does baseline_rm.py compute what TRL's RewardTrainer computes? The same rows, weights, order and optimizer must give
the same loss at every step. In float32 on the CPU.

    pip install trl==1.16.0
    python tests/parity_trl.py [flags of baseline_rm.py]

baseline_rm.py runs as it is, for 50 steps on the toy data if no flags are given, with shared prompts and micro-batches.
TRL gets its initial weights, its batches and its learning rates, and computes a row for each response. Prints both
losses of every step, and exits with 1 if they differ by more than 1e-5 anywhere.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, PrinterCallback  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import baseline_rm  # noqa: E402
import common  # noqa: E402

TOLERANCE = 1e-5
DEFAULTS = "--epochs 0.4 --micro-batch-tokens 256 --eval-every 0 --save-every 0 --dtype float32 --eval-data".split()


def run_baseline(flags, folder):
    """Run baseline_rm.py; -> loss and learning rate of each step."""
    subprocess.run([sys.executable, ROOT / "baseline_rm.py", *flags, "--output-dir", f"{folder}/ours"], check=True)
    records = [json.loads(line) for line in Path(folder, "ours/metrics.jsonl").read_text().splitlines()]
    return [x["train/loss"] for x in records], [x["train/lr"] for x in records]


def run_trl(args, folder, rates):
    """Run TRL on the batches of baseline_rm.py with these learning rates; -> loss of each step."""
    device, tokenizer = common.setup(), common.load_tokenizer(args.model)
    train = common.tokenize(common.load_rows(args.data), args.data, tokenizer, args.max_length)
    common.save_model(f"{folder}/start", common.load_reward_model(args.model, tokenizer, device, args), tokenizer)
    index = [common.batch_indices(len(train), args.batch_size, args.seed, step) for step in range(len(rates))]
    if any(len(batch) < args.batch_size for batch in index[:-1]):
        common.fatal("a batch at the end of an epoch is smaller, which TRL's sampler cannot do: choose fewer --epochs")
    rows = []
    for row in train.select(np.concatenate(index)):
        chosen, rejected = row["response_ids"]
        rows.append({"chosen_ids": row["prompt_ids"] + chosen, "rejected_ids": row["prompt_ids"] + rejected})

    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/start", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*rates, 0.0][step])
    config = RewardConfig(
        f"{folder}/trl", num_train_epochs=1, per_device_train_batch_size=args.batch_size, max_length=None,
        train_sampling_strategy="sequential", max_grad_norm=args.max_grad_norm, bf16=False, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = RewardTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                            optimizers=(optimizer, schedule))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [x["loss"] for x in trainer.state.log_history if "loss" in x]


if __name__ == "__main__":
    flags = [*DEFAULTS, *sys.argv[1:]]
    sys.argv[1:] = flags
    args = baseline_rm.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, rates = run_baseline(flags, folder)
        theirs = run_trl(args, folder, rates)
    print("step   ours       TRL        difference")
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"{step:4}   {a:.7f}  {b:.7f}  {a - b:+.1e}")
    largest = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"largest difference {largest:.1e} over {len(ours)} steps")
    if not largest <= TOLERANCE:
        common.fatal(f"the losses differ by more than {TOLERANCE}")
