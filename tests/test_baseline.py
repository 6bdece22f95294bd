"""baseline_rm.py: its loss, its metrics, and whole runs of it."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, settings, shell
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import baseline_rm
import common


CLOCK = "seconds", "train/pairs_per_sec"


def records(folder="runs/baseline_rm"):
    """The run's metrics, without the clock's."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK and "seconds" not in key} for line in lines]


def losses(folder="runs/baseline_rm"):
    return [line["train/loss"] for line in records(folder)]


def weights(folder="runs/baseline_rm"):
    return load_file(Path(folder) / "model/model.safetensors")


# ---------------------------------------------------------------------------------------------------- loss and metrics
def test_loss_closed_form():
    rewards = torch.tensor([[0, 0], [1, -1], [-3, 5], [200, -200], [-200, 200]], dtype=torch.float64)
    expected = [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(8)), 0.0, 400.0]
    torch.testing.assert_close(baseline_rm.preference_loss(rewards).tolist(), expected, rtol=1e-12, atol=1e-12)
    # the centring term: (r_c + r_r)^2
    expected = [loss + 0.5 * total**2 for loss, total in zip(expected, [0, 0, 2, 0, 0])]
    torch.testing.assert_close(baseline_rm.preference_loss(rewards, 0.5).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_loss_gradient():
    """dL/dr_c = -sigmoid(-margin), dL/dr_r = its negative; no margin, however bad, loses its gradient."""
    rewards = torch.tensor([[0.3, -0.4], [-60.0, 60.0], [60.0, -60.0]], requires_grad=True)
    baseline_rm.preference_loss(rewards).sum().backward()
    expected = torch.sigmoid(rewards[:, 1] - rewards[:, 0])
    torch.testing.assert_close(rewards.grad, torch.stack([-expected, expected], dim=1).detach())
    assert rewards.grad[1, 0] == -1


def test_metric_sums():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    sums = dict(zip(baseline_rm.METRICS, baseline_rm.metric_sums(rewards).tolist()))
    loss = math.log1p(math.exp(-1)) + math.log1p(math.exp(2)) + math.log(2)
    assert sums.pop("loss") == pytest.approx(loss)
    assert sums == {"accuracy": 1, "margin": -1, "tie_rate": 1, "reward_chosen": 4, "reward_rejected": 5}


@pytest.mark.parametrize("right, n, low, high", [
    (80, 100, 0.7112, 0.8666), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)])
def test_accuracy_interval(right, n, low, high, monkeypatch):
    """Wilson's interval, against published values."""
    rewards = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * (n - right))
    monkeypatch.setattr(baseline_rm, "score", lambda *_: rewards)
    metrics = baseline_rm.evaluate(None, {"x": range(n)}, 0)
    assert metrics["eval/x/accuracy"] == right / n
    assert metrics["eval/x/accuracy_low"] == pytest.approx(low, abs=5e-5)
    assert metrics["eval/x/accuracy_high"] == pytest.approx(high, abs=5e-5)


# ------------------------------------------------------------------------------------------------------------- one run
def test_run(script):
    out = script("baseline_rm.py", "--eval-every", 5)
    lines = records()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/id/accuracy" in line] == [5, 10, 12]
    assert [line["pairs"] for line in lines] == list(range(16, 193, 16))
    assert {f"train/{key}" for key in (*baseline_rm.METRICS, "grad_norm", "lr")} | {"step", "pairs"} == set(lines[0])
    assert [line["train/lr"] for line in lines] == pytest.approx([1e-3 * min(1, (12 - i) / 11) for i in range(12)])
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]  # seen and even learned
    assert "toy:n=96: 96 of 96 rows" in out and "id: accuracy " in out
    assert json.loads(Path("runs/baseline_rm/args.json").read_text())["batch_size"] == 16
    assert sorted(path.name for path in Path("runs/baseline_rm").iterdir()) == ["args.json", "metrics.jsonl", "model"]


def test_run_against_the_plainest_loop(script, llama, tokenizer):
    """The same run with none of what makes it fast: one response at a time, in float64, the optimizer written out."""
    script("baseline_rm.py", "--seed", 3)
    model = common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings(seed=3)).model.double()
    rows, (beta1, beta2), eps, steps, warmup = common.toy_comparisons(n=96), (0.9, 0.95), 1e-6, 12, 1
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step, record in enumerate(records()):
        index, margins = common.step_rows(96, 16, 3, step), []
        for row in (rows[i] for i in index):
            ids = [tokenizer(row["prompt"] + row[key] + " </s>", return_tensors="pt") for key in ("chosen", "rejected")]
            margins.append(model(**ids[0]).logits[0, 0] - model(**ids[1]).logits[0, 0])
        loss = -torch.sigmoid(torch.stack(margins)).log().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        lr = 1e-3 * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        with torch.no_grad():
            for p, g, (m, v) in zip(model.parameters(), gradients, moments):
                g = g / max(1, norm)
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                p -= lr * m / (1 - beta1 ** (step + 1)) / ((v / (1 - beta2 ** (step + 1))).sqrt() + eps)
        assert record["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["train/lr"] == pytest.approx(lr)


def test_saved_model_gives_the_same_scores(script):
    script("baseline_rm.py")
    last = records()[-1]
    model = AutoModelForSequenceClassification.from_pretrained("runs/baseline_rm/model").eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/baseline_rm/model")
    assert set(weights()) == set(model.state_dict())  # under the names that other tools expect
    assert model.config.num_labels == 1 and model.config.pad_token_id != tokenizer.eos_token_id
    rows, rewards = common.toy_comparisons("id", n=40), {}
    for key in ("chosen", "rejected"):  # as anyone would call it: padded text, EOS at the end
        texts = [row["prompt"] + row[key] + tokenizer.eos_token for row in rows]
        with torch.no_grad():
            rewards[key] = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        assert rewards[key].mean().item() == pytest.approx(last[f"eval/id/reward_{key}"], abs=1e-5)
    accuracy = (rewards["chosen"] > rewards["rejected"]).double().mean().item()
    assert accuracy == pytest.approx(last["eval/id/accuracy"])


def test_the_readmes_way_to_score(script, tokenizer, capsys):
    script("baseline_rm.py")
    [block] = re.findall(r"(?:^    .*\n)*    print\(model.*\n", (ROOT / "README.md").read_text(), re.MULTILINE)
    capsys.readouterr()
    exec(textwrap.dedent(block), {})
    cpu, row = torch.device("cpu"), {"prompt": "\n\nHuman: name two fruits\n\nAssistant:", "chosen": " fig plum",
                                     "rejected": " dog"}
    printed = float(capsys.readouterr().out)
    data = common.tokenize(datasets.Dataset.from_list([row]), "x", tokenizer, 64)
    model = common.load_reward_model("runs/baseline_rm/model", tokenizer, cpu, settings())
    assert printed == pytest.approx(common.score(model, data, 64)[0, 0].item(), abs=1e-5)


def test_micro_tokens_are_memory_only(script):
    script("baseline_rm.py", "--micro-tokens", 1, "--output-dir", "one")
    script("baseline_rm.py", "--micro-tokens", 10**6, "--output-dir", "all")
    for one, together in zip(records("one"), records("all")):  # the gradient's norm among them
        assert one == pytest.approx(together, rel=1e-4, abs=1e-6)
    for a, b in zip(weights("one").values(), weights("all").values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_same_seed_same_run(script):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        script("baseline_rm.py", "--output-dir", name, "--seed", seed)
    assert records("a") == records("b") and losses("a") != losses("c")


def test_center_pulls_the_rewards_to_zero(script):
    for center in (0, 10):
        script("baseline_rm.py", "--center", center, "--output-dir", center)
    off, on = (abs(records(center)[-1]["eval/id/reward_chosen"] + records(center)[-1]["eval/id/reward_rejected"])
               for center in ("0", "10"))
    assert on < off / 2


@pytest.mark.parametrize("flags, far", [(["--offload"], 1e-6), (["--dtype", "bfloat16"], 0.02)])
def test_one_process_by_fsdp(flags, far, script, monkeypatch):
    """Host memory changes nothing, bf16 no more than it rounds."""
    policies, policy = [], common.CPUOffloadPolicy
    monkeypatch.setattr(common, "CPUOffloadPolicy", lambda **kwargs: policies.append(policy(**kwargs)) or policies[-1])
    script("baseline_rm.py", "--save-every", 5, *flags, "--output-dir", "fsdp")
    assert len(policies) == ("--offload" in flags)
    script("baseline_rm.py", "--output-dir", "plain")
    for one, other in zip(records("fsdp"), records("plain"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=far)
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=20 * far)
    for name, tensor in weights("fsdp").items():
        assert tensor.dtype == torch.float32 and (tensor - weights("plain")[name]).abs().max() < far


def test_clip(script, llama, tokenizer):
    """A gradient far below AdamW's eps hardly moves a weight; and the norm is reported before it is cut."""
    script("baseline_rm.py", "--clip", 1e-9, "--output-dir", "clipped")
    script("baseline_rm.py", "--output-dir", "free")
    assert records("clipped")[0] == records("free")[0]
    start = common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings()).model.state_dict()
    moved = {run: max((w - start[name]).abs().max().item() for name, w in weights(run).items())
             for run in ("clipped", "free")}
    assert moved["clipped"] < 1e-4 < 1e-3 < moved["free"]


def test_bare_config(script, llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    out = script("baseline_rm.py", "--model", "config.json", "--epochs", 1)
    assert "id: accuracy" in out
    assert len(AutoTokenizer.from_pretrained("runs/baseline_rm/model")) <= 300


# ---------------------------------------------------------------------------------------------------------- bad input
def refused(script, *flags):
    with pytest.raises(SystemExit) as error:
        script("baseline_rm.py", *flags)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("flags, words", [
    (["--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--data", "broken.jsonl"], "broken.jsonl: line 2: JSONDecodeError"),
    (["--data", "column.jsonl"], "column.jsonl: no column 'rejected'"),
    (["--data", "same.jsonl"], "same.jsonl: none of 1 rows can be used"),
    (["--data", "blank.jsonl"], "blank.jsonl: none of 1 rows can be used"),
    (["--data", "row.jsonl"], "row.jsonl: row 2: "),
    (["--eval-data", "toy:id"], "--eval-data toy:id: give every set a name of its own"),
    (["--eval-data", "x=toy:id", "x=toy:ood"], "give every set a name of its own"),
    (["--eval-data", "a/b=toy:id"], "and no / or : in it"),
    (["--eval-data", "x=none.jsonl"], "none.jsonl: no such file"),
    (["--batch-size", "0"], "--batch-size 0 is below 1"),
    (["--data", "same.jsonl:train"], "same.jsonl:train: a file has no splits"),
    (["--data", "folder:test"], "folder:test: no split 'test'"),
    (["--output-dir", "bare.json"], "--output-dir bare.json is a file"),
    (["--attention", "flex"], "--attention flex needs a GPU"),
    (["--epochs", "0"], "--epochs, --lr and --clip are above 0"),
    (["--epochs", "nan"], "--epochs, --lr and --clip are above 0"),
    (["--clip", "0"], "--epochs, --lr and --clip are above 0"),
    (["--lr", "-1"], "--epochs, --lr and --clip are above 0"),
    (["--warmup", "2"], "--warmup is between 0 and 1"),
    (["--seed", "-1"], "--seed -1 is below 0"),
    (["--save-every", "-1"], "--save-every -1 is below 0"),
    (["--max-length", "129"], "--max-length 129 is more than the 128 positions of --model"),
    (["--data", "column.jsonl", "--model", "bare.json"], "column.jsonl: no column 'rejected'"),
    (["--data", "row.jsonl", "--model", "bare.json"], "row.jsonl: row 2: "),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--sede", "1"], "unrecognized arguments: --sede 1"),
    (["--model", "nowhere"], "nowhere is no folder or file here"),
    (["--model", "encoder/config.json"], "not a decoder"),
    (["--lr", "1e30", "--clip", "1e30"], "lower --lr"),
    (["--output-dir", "full"], "--output-dir full is not empty"),
])
def test_bad_input(flags, words, script, tmp_path):
    good = {"prompt": "\n\nHuman: name two fruits\n\nAssistant:", "chosen": " fig", "rejected": " dog"}
    files = {
        "broken": [good, "{"], "column": [{"chosen": "x"}], "same": [{**good, "rejected": " fig"}],
        "blank": [{**good, "rejected": ""}], "row": [good, {**good, "chosen": None}],
    }
    for name, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    datasets.Dataset.from_list([good]).save_to_disk(tmp_path / "folder")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps(
        {"model_type": "bert", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}))
    (tmp_path / "bare.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine")
    assert words in refused(script, *flags)
    assert (tmp_path / "full/thesis.tex").read_text() == "mine"


def test_an_earlier_run_is_kept(script):
    def files():
        return {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}

    script("baseline_rm.py", "--epochs", 1)
    before, first = files(), records()
    refused(script, "--data", "none.jsonl")
    assert files() == before  # a run that cannot begin touches nothing
    assert "is now runs/baseline_rm.1" in script("baseline_rm.py", "--epochs", 1, "--seed", 1)
    second = records()
    refused(script, "--lr", "1e30", "--clip", "1e30")  # one that fails later has moved it aside
    assert records("runs/baseline_rm.1") == first and records("runs/baseline_rm.2") == second


def test_records_after_the_checkpoint_are_written_anew(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "train/lo')  # killed while it wrote
    common.Log(tmp_path, {}, resume=True).start(3, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])


def test_resume_wants_the_same_flags(script):
    script("baseline_rm.py", "--save-every", 5)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    assert "--lr is 0.5, but 0.001" in refused(script, "--resume", "--lr", "0.5")
    with pytest.raises(SystemExit, match="script is meta_rm.py, but baseline_rm.py in the run of runs/baseline_rm"):
        script("meta_rm.py", "--resume", "--output-dir", "runs/baseline_rm", "--eta", "0")
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()} == before


def test_resume_wants_the_same_data(script):
    rows = [json.dumps(row) + "\n" for row in common.toy_comparisons(n=96)]
    Path("d.jsonl").write_text("".join(rows))
    script("baseline_rm.py", "--data", "d.jsonl", "--save-every", 5)
    before = weights()
    turned = json.loads(rows[0])
    turned |= {"chosen": turned["rejected"], "rejected": turned["chosen"]}
    for others in (rows[::-1], [json.dumps(turned) + "\n", *rows[1:]]):
        Path("d.jsonl").write_text("".join(others))
        assert "the data are not those of the run" in refused(
            script, "--resume", "--data", "d.jsonl", "--save-every", 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights().items())
    Path("d.jsonl").write_text("".join(rows))
    script("baseline_rm.py", "--resume", "--data", "d.jsonl", "--save-every", 5)


def test_what_a_run_reads_is_not_moved_aside(script):
    script("baseline_rm.py")
    Path("runs/baseline_rm/d.jsonl").write_text(json.dumps(common.toy_comparisons(n=1)[0]) + "\n")
    inside = "runs/baseline_rm/d.jsonl"
    assert f"--data {inside} lies in --output-dir runs/baseline_rm" in refused(script, "--data", inside)
    assert f"--eval-data x={inside} lies in" in refused(script, "--eval-data", f"x={inside}")
    assert Path(inside).exists()
    assert "--output-dir .: name a folder of its own" in refused(script, "--output-dir", ".")


def test_a_folder_of_the_users_stays(script):
    """Only complete checkpoints make way for the next one."""
    script("baseline_rm.py", "--save-every", 5)
    assert [path.name for path in Path("runs/baseline_rm").glob("checkpoint-*")] == ["checkpoint-10"]
    Path("runs/baseline_rm/checkpoint-10").rename("runs/baseline_rm/checkpoint-best")
    script("baseline_rm.py", "--save-every", 5, "--resume")
    names = {path.name for path in Path("runs/baseline_rm").glob("checkpoint-*")}
    assert names == {"checkpoint-best", "checkpoint-10"}


def test_a_checkpoint_in_many_files(llama, tokenizer, tmp_path):
    """None holds more than it should, and all comes back: weights, moments, steps, also if a weight was never used, as
    in models that could read images as well."""
    args = settings()
    runs = []
    for _ in range(2):
        model = common.load_reward_model(llama, tokenizer, torch.device("cpu"), args)
        runs.append((model, torch.optim.AdamW(model.parameters(), lr=1e-2)))
    (model, optimizer), (other, fresh) = runs
    model.model.score.weight.sum().backward()
    optimizer.step()
    common.save_checkpoint(tmp_path, model, optimizer, 7, file_size=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint-7").glob("*.safetensors")]
    largest = max(w.nbytes for w in model.parameters())
    assert len(sizes) > 4 and max(sizes) < 20_000 + largest + 10_000  # names and shapes
    assert common.load_checkpoint(tmp_path, other, fresh) == 7
    expected, found = (common.run_state(*run) for run in runs)
    for part in expected:
        assert all(torch.equal(x, found[part][key]) for key, x in expected[part].items())


# ------------------------------------------------------------------------------------------------- processes, kill -9
def test_two_processes_train_alike(llama, tmp_path, script):
    """And one goes on from what two have saved."""
    script("baseline_rm.py", "--output-dir", "one")
    process = shell(llama, "baseline_rm.py", "--save-every", 10, "--output-dir", "two", ranks=2, cwd=tmp_path)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.count("id: accuracy") == 1  # rank 0 speaks
    for again in (False, True):
        for one, two in zip(records("one"), records("two"), strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
        for name, tensor in weights("one").items():
            torch.testing.assert_close(tensor, weights("two")[name], rtol=0, atol=1e-4)
        if not again:
            assert "going on after step 10 of 12" in script("baseline_rm.py", "--resume", "--output-dir", "two")


def kill_when(sign, process):
    """kill -9 to it and, as torchrun's workers survive torchrun, to all that name the run's folder."""
    while not sign.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # some end meanwhile
            if str(sign.parent).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.communicate()


def finished(process):
    """Wait until it ends well."""
    _, error = process.communicate()
    assert process.returncode == 0, error


def ends_alike(start, whole, broken, sign):
    """The run start(broken), killed soon after `sign` is in its folder and then resumed, ends as the one in `whole`,
    which was left alone, bit for bit."""
    kill_when(broken / sign, start(broken))
    steps = len(records(whole))
    assert len(records(broken)) < steps
    finished(start(broken, "--resume"))
    assert records(broken) == records(whole)
    for path in whole.rglob("model.safetensors"):
        expected, found = load_file(path), load_file(broken / path.relative_to(whole))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_and_resumed(ranks, llama, tmp_path):
    def start(folder, *more):
        return shell(llama, "baseline_rm.py", "--epochs", 30, "--save-every", 60, "--eval-every", 0, "--output-dir",
                     folder, *more, ranks=ranks, cwd=tmp_path)

    finished(start(tmp_path / "whole"))
    ends_alike(start, tmp_path / "whole", tmp_path / "broken", "checkpoint-60")


def test_errors_of_a_real_process(llama, tmp_path):
    """Exit code 1, one line, no traceback; with two ranks still one line."""
    (tmp_path / "broken.jsonl").write_text('{"chosen": "x"}\n{"chosen": "y", "rejected"\n')
    process = shell(llama, "baseline_rm.py", "--data", "broken.jsonl", cwd=tmp_path)
    error = process.communicate()[1]
    assert re.fullmatch("error: broken.jsonl: line 2: JSONDecodeError: .*\n", error) and process.returncode == 1
    process = shell(llama, "baseline_rm.py", "--epochs", 1000, cwd=tmp_path)
    while not (tmp_path / "runs/baseline_rm/metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert "error: interrupted\n" in error and "Traceback" not in error and process.returncode == 1
    process = shell(llama, "baseline_rm.py", "--batch-size", 15, ranks=2, cwd=tmp_path)
    error = process.communicate()[1]
    assert process.returncode == 1 and error.count("error: --batch-size 15 cannot be divided among 2 ranks") == 1


# ---------------------------------------------------------------------------------------------------------- toy world
def test_toy_world(tmp_path):
    """A run without flags. Over ten seeds `id` was 0.857, standard deviation 0.011: the bar is five below."""
    subprocess.run([sys.executable, ROOT / "baseline_rm.py"], cwd=tmp_path, check=True, capture_output=True)
    last = records(tmp_path / "runs/baseline_rm")[-1]
    assert last["eval/id/accuracy"] > 0.8
    assert {key.split("/")[1] for key in last if key.startswith("eval/")} == {"id", "ood", "shifted", "noisy"}
    assert last["eval/noisy/accuracy"] < last["eval/id/accuracy"] - 0.05
