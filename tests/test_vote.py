"""vote_strength.py: the statistics against hand and paper, and whole runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import shell

import vote_strength

RUN = Path("runs/vote_strength")


def rows(name="train", folder=RUN):
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def members(folder=RUN):
    return [json.loads(path.read_text()) for path in sorted((Path(folder) / "members").iterdir())]


# --------------------------------------------------------------------------------------------------------- statistics
def test_strength_of_the_papers_example():
    """The row of the authors' release about the war: ten votes, mean -0.1331, population std 0.756 (sample: 0.797)."""
    votes = [0.172, -0.402, 1.266, 0.337, -1.867, -0.219, 0.336, -0.219, -0.469, -0.266]
    mean, std = vote_strength.strength(np.array([[[vote + 3, 3.0]] for vote in votes]))
    assert mean == pytest.approx([-0.1331]) and std == pytest.approx([0.756], abs=5e-4)


def test_second_label_and_agreement():
    nothing = vote_strength.second_label(["A", [1], [None, 2], {"a": 1}, [], 0.5])
    assert np.isnan(nothing).all()
    votes = vote_strength.second_label([1, 0, -1, None, [4, 1], [0, 5, 2], [2, 2]])
    assert np.array_equal(votes, [1, -1, math.nan, math.nan, 3, -5, 0], equal_nan=True)
    assert vote_strength.agreement(votes) == 0.5  # of the four that take a side
    assert math.isnan(vote_strength.agreement(votes[2:4]))


def test_groups_by_hand():
    table = vote_strength.groups(np.array([3.0, -1, 2, 0]), np.array([1.0, 2, 3, 4]), np.array([1.0, -1, 1, 1]), n=2)
    assert table.tolist() == [[0.5, -0.5, 3, 0.5], [1, 2.5, 2, 1]]


def test_rank_correlation():
    a = np.array([1.0, 5, 2, 9, 4])
    assert vote_strength.rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert vote_strength.rank_correlation(a, -a) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5, squares 4.5 and 5
    assert vote_strength.rank_correlation(np.array([0.0, 1, 1, 2]), np.array([1.0, 3, 2, 4])) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5))
    assert vote_strength.rank_correlation(np.array([0.0, 1, 9]), np.array([math.nan, 0, 1])) == pytest.approx(1)
    assert math.isnan(vote_strength.rank_correlation(a, np.ones(5)))


# --------------------------------------------------------------------------------------------------------------- runs
def test_rows_come_back_with_their_votes(script, tmp_path):
    raw = [{"prompt": "\n\nHuman: name two fruits\n\nAssistant:", "chosen": f" {a}", "rejected": " dog", "note": a}
           for a in ("fig", "dog", "kiwi", "plum")]  # the second row is of no use: identical responses
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    out = script("vote_strength.py", "--data", "a.jsonl", "--members", 3, "--plot", "--batch-size", 2)
    assert "1 dropped: identical responses" in out and "train: mean strength below 0 in" in out
    back = rows()
    assert [{key: row[key] for key in raw[0]} for row in back] == raw
    assert back[1]["mean preference difference"] is None and back[1]["chosen score list"] is None
    for row in back[:1] + back[2:]:
        votes = np.subtract(row["chosen score list"], row["rejected score list"])
        assert len(votes) == 3 and len(set(votes)) == 3
        assert row["mean preference difference"] == pytest.approx(votes.mean(), abs=1e-8)
        assert row["std preference difference"] == pytest.approx(votes.std(), abs=1e-8)
    assert (RUN / "strength.png").stat().st_size > 10_000
    json.loads((RUN / "report.json").read_text(), parse_constant=pytest.fail)


def test_responses_without_a_label_are_voted_on(script):
    """Five responses make two pairs, beside the comparisons that the members learn from."""
    row = {"prompt": "\n\nHuman: name two fruits\n\nAssistant:"}
    Path("meta.jsonl").write_text(json.dumps({**row, "responses": [" fig", " dog", " kiwi", " plum", " pear"]}) + "\n")
    script("vote_strength.py", "--members", 2, "--eval-data", "policy=meta.jsonl")
    pairs = [json.loads(line) for line in (RUN / "policy.jsonl").read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(" fig", " dog"), (" kiwi", " plum")]
    assert all(pair["prompt"] == row["prompt"] and len(pair["chosen score list"]) == 2 for pair in pairs)


def test_a_member_is_a_baseline_run(script):
    """Seed 7, from start to scores: neither script can change alone."""
    script("vote_strength.py", "--members", 2, "--seed", 6)
    script("baseline_rm.py", "--seed", 7)
    ours = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()][12:]
    theirs = [json.loads(line) for line in Path("runs/baseline_rm/metrics.jsonl").read_text().splitlines()]
    assert {line["member"] for line in ours} == {1}
    for key in ("train/accuracy", "train/grad_norm", "train/lr"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    assert [line["train/loss"] for line in ours] == pytest.approx([line["train/loss"] for line in theirs], rel=1e-6)
    votes = np.array(members()[1]["id"])
    assert votes.mean(0) == pytest.approx([theirs[-1][f"eval/id/reward_{key}"] for key in ("chosen", "rejected")])


def test_killed_members_are_made_anew(script):
    script("vote_strength.py", "--members", 3)
    whole, report = members(), rows()
    (RUN / "members/1.json").unlink()
    script("vote_strength.py", "--members", 3, "--resume")
    assert members() == whole and rows() == report
    script("vote_strength.py", "--members", 4, "--resume")  # and one may come later
    assert members()[:3] == whole and len(members()) == 4
    (RUN / "members/1.json").write_text(json.dumps(whole[1])[:200])  # cut off half-way
    with pytest.raises(SystemExit, match=r"members/1.json does not hold the votes"):
        script("vote_strength.py", "--members", 4, "--resume")
    assert json.loads((RUN / "members/0.json").read_text()) == whole[0]


def test_cross_fitting_judges_only_what_is_not_known(script):
    """Labels are pure chance: who is trained on them accepts them all, who is not can only guess. 96 guesses miss the
    band once in ten thousand runs."""
    flags = ["--data", "toy:n=96,flip=0.5", "--eval-data", "--members", 1, "--epochs", 60, "--lr", "3e-3"]
    refused = {}
    for parts in (0, 2):
        script("vote_strength.py", *flags, "--cross-fit", parts, "--output-dir", parts)
        refused[parts] = json.loads(Path(f"{parts}/report.json").read_text())["train"]["refused"]
    assert refused[0] < 0.1 and 0.3 < refused[2] < 0.7


def test_other_sets_get_the_mean_of_the_parts(script):
    """Models that learn nothing are all the same, so their mean is any of them."""
    for parts in (0, 2):
        script("vote_strength.py", "--members", 1, "--lr", "1e-30", "--clip", "1e-30", "--cross-fit", parts,
               "--output-dir", parts)
    np.testing.assert_allclose(members("2")[0]["id"], members("0")[0]["id"], rtol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_two_processes_vote_alike(flags, llama, tmp_path, script):
    script("vote_strength.py", "--members", 2, "--output-dir", "one")
    process = shell(llama, "vote_strength.py", "--members", 2, "--output-dir", "two", *flags, ranks=2, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error
    for one, two in zip(members("one"), members("two"), strict=True):
        for name in ("train", "id"):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4)
    one, two = ([json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
                for run in ("one", "two"))
    assert {line["member"] for line in two} == ({0, 1} if flags else {0})  # rank 0 writes of its own
    assert [line["train/loss"] for line in two] == pytest.approx(
        [line["train/loss"] for line in one[: len(two)]], rel=1e-3)


@pytest.mark.parametrize("flags, words", [
    (["--members", "0"], "--members 0"),
    (["--cross-fit", "1"], "--cross-fit 1"),
    (["--cross-fit", "97"], "--cross-fit 97: there are only 96 rows"),
    (["--label", "votes"], "--label votes: toy:n=96 has only"),
    (["--eval-data", "train=toy:id"], "give every set a name of its own"),
    (["--lr", "1e30", "--clip", "1e30"], "lower --lr"),
])
def test_bad_input(flags, words, script):
    with pytest.raises(SystemExit) as error:
        script("vote_strength.py", *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
