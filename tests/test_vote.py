"""vote_strength.py: the statistics by hand, and whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import launch
from test_run import records

import vote_strength

RUN = Path("runs/vote_strength")


def rows(name="train"):
    return [json.loads(line) for line in (RUN / f"{name}.jsonl").read_text().splitlines()]


def votes(folder=RUN):
    return {path.parent.name: json.loads(path.read_text()) for path in Path(folder).glob("seed-*/votes.json")}


def test_strength_of_the_papers_example():
    """A row of the authors' release: ten votes, mean -0.1331, population std 0.756 (the sample's is 0.797)."""
    margins = [0.172, -0.402, 1.266, 0.337, -1.867, -0.219, 0.336, -0.219, -0.469, -0.266]
    mean, std = vote_strength.strength(np.array([[[margin + 3, 3.0]] for margin in margins]))
    assert mean == pytest.approx([-0.1331]) and std == pytest.approx([0.756], abs=5e-4)


def test_groups_are_sorted_by_strength(capsys):
    """Twenty groups, here of two pairs each; fewer if there are fewer pairs."""
    mean, std, label = np.arange(40.0)[::-1], np.arange(40.0), np.array([1, 0] * 19 + [1, -1])
    vote_strength.print_groups("valid", mean, std, label)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][0] == "valid," and len(table) == 22
    assert table[2] == ["5%", "0.500", "38.500", "1.000"] and table[3] == ["10%", "2.500", "36.500", "0.500"]
    vote_strength.print_groups("valid", mean[:2], std[:2], label[:2])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["100%", "39.000", "0.000", "1.000"]


def test_rows_come_back_with_their_votes(script):
    prompt = "\n\nHuman: name two fruits\n\nAssistant:"
    raw = [{"prompt": prompt, "chosen": f" {word}", "rejected": " dog", "note": word, "tiny": 1e-12}
           for word in ("fig", "dog", "kiwi", "plum")]  # the second row is dropped: identical responses
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    script("vote_strength.py", "--data", "a.jsonl", "--members", 3, "--batch-size", 2)
    back = rows()
    assert [{key: row[key] for key in raw[0]} for row in back] == raw
    assert back[1]["mean preference difference"] is None and back[1]["chosen score list"] is None
    for row in back[:1] + back[2:]:
        margins = np.subtract(row["chosen score list"], row["rejected score list"])
        assert len(set(margins)) == 3
        assert row["mean preference difference"] == pytest.approx(margins.mean(), abs=1e-8)
        assert row["std preference difference"] == pytest.approx(margins.std(), abs=1e-8)


def test_responses_without_a_label_are_voted_on_in_pairs(script):
    row = {"prompt": "\n\nHuman: name two fruits\n\nAssistant:"}
    responses = [" fig", " dog", " kiwi", " plum", " pear"]
    rows = [{**row, "responses": responses}, {**row, "responses": None}]
    Path("policy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script("vote_strength.py", "--members", 2, "--eval-data", "policy=policy.jsonl")
    pairs = [json.loads(line) for line in (RUN / "policy.jsonl").read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(" fig", " dog"), (" kiwi", " plum")]
    assert all(pair["prompt"] == row["prompt"] and len(pair["chosen score list"]) == 2 for pair in pairs)


def test_a_member_is_a_baseline_run(script):
    """With seed 7, from the first step to the scores."""
    script("vote_strength.py", "--members", 2, "--seed", 6)
    script("baseline_rm.py", "--seed", 7)
    ours, theirs = records(RUN / "seed-7"), records("runs/baseline_rm")
    for key in ("train/loss", "train/accuracy", "train/grad_norm", "train/lr"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-6)
    means = [theirs[-1][f"eval/id/reward_{key}"] for key in ("chosen", "rejected")]
    assert np.mean(votes()["seed-7"]["id"], 0) == pytest.approx(means)


def test_processes_share_the_work(script):
    """Members trained one at a time, in any order, count as those of one run; a missing one is trained again."""
    script("vote_strength.py", "--members", 3)
    whole, strengths = votes(), rows()
    for seed in (2, 0):
        script("vote_strength.py", "--members", 1, "--seed", seed, "--resume", "--output-dir", "parts")
    assert set(votes("parts")) == {"seed-0", "seed-2"}
    script("vote_strength.py", "--members", 3, "--resume", "--output-dir", "parts")
    assert votes("parts") == whole
    assert [json.loads(line) for line in Path("parts/train.jsonl").read_text().splitlines()] == strengths


def test_two_ranks_vote_alike(llama, tmp_path, script):
    script("vote_strength.py", "--members", 1, "--output-dir", "one")
    launch(llama, "vote_strength.py", "--members", 1, "--output-dir", "two", ranks=2).finish()
    np.testing.assert_allclose(votes("one")["seed-0"]["train"], votes("two")["seed-0"]["train"], rtol=1e-3, atol=1e-4)
    assert [line["train/loss"] for line in records("two/seed-0")] == pytest.approx(
        [line["train/loss"] for line in records("one/seed-0")], rel=1e-5)


@pytest.mark.parametrize("flags, name", [
    (["--members", "0"], "--members"), (["--eval-data", "train=x.jsonl"], "--eval-data"),
    (["--data", "policy.jsonl"], "policy.jsonl"),  # without labels
    (["--lr", "1e30", "--max-grad-norm", "1e30"], "learning rate")])
def test_bad_input(flags, name, script):
    Path("policy.jsonl").write_text(json.dumps({"prompt": "name", "responses": [" fig", " dog", " pear"]}) + "\n")
    with pytest.raises(SystemExit) as error:
        script("vote_strength.py", *flags)
    assert name in str(error.value) and "\n" not in str(error.value)
