"""Rows in every form, broken in every way: never a traceback, never a row lost without a word."""

import copy
import json
import random
import re
from pathlib import Path

import pytest

import common

PROMPT = "\n\nHuman: name two fruits\n\nAssistant:"
CHAT = [{"role": "user", "content": "name two fruits"}]


def rows_of(form, rng):
    """A good row in one of the forms."""
    a, b = (common.toy_response(rng, PROMPT, 0.7) for _ in "ab")
    said = [[{"role": "assistant", "content": text}] for text in (a, b)]
    return {
        "transcript": {"chosen": PROMPT + a, "rejected": PROMPT + b},
        "prompt": {"prompt": PROMPT, "chosen": a, "rejected": b},
        "repeated": {"prompt": PROMPT, "chosen": PROMPT + a, "rejected": PROMPT + b},
        "messages": {"prompt": CHAT, "chosen": said[0], "rejected": said[1]},
        "conversation": {"chosen": CHAT + said[0], "rejected": CHAT + said[1]},
        "turns": {"chosen": ["name two fruits", a], "rejected": ["name two fruits", b]},
    }[form]


JUNK = [None, "", " ", 0, -1, 3.5, True, [], [None], {}, [[]], [{}], [""], "\n\nHuman:", "\n\nAssistant:", "\x00",
        "é🙂" * 9, "apple " * 500, ["a", "b", "c"], [{"role": "user"}], [{"role": "assistant", "content": None}],
        [{"role": "system", "content": "be good"}], {"role": "user", "content": "x"}, [1, 2], {"a": [1]}]


def broken(row, rng):
    """The row with one thing wrong: a key lost, junk at a random depth, sides swapped or made equal."""
    row = copy.deepcopy(row)
    key = rng.choice([*row])
    way = rng.randrange(5)
    if way == 0:
        del row[key]
    elif way == 1:
        row[key] = copy.deepcopy(rng.choice(JUNK))
    elif way == 2 and isinstance(row[key], list) and row[key]:
        place = rng.randrange(len(row[key]))
        if isinstance(row[key][place], dict) and rng.random() < 0.5:
            row[key][place]["content"] = copy.deepcopy(rng.choice(JUNK))
        else:
            row[key][place] = copy.deepcopy(rng.choice(JUNK))
    elif way == 3:
        row["chosen"] = copy.deepcopy(row["rejected"])
    else:
        row[rng.choice(["prompt", "extra", "responses"])] = copy.deepcopy(rng.choice(JUNK))
    return row


@pytest.mark.parametrize("form", ["transcript", "prompt", "repeated", "messages", "conversation", "turns"])
def test_broken_rows(form, tmp_path, capsys, monkeypatch):
    """Thirty files of five good rows and a broken one: either all six are accounted for, or one line says what is wrong
    and where."""
    monkeypatch.chdir(tmp_path)
    tokenizer, rng, outcomes = common.toy_tokenizer(), random.Random(form), []
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    for number in range(30):
        rows = [rows_of(form, rng) for _ in range(5)]
        rows.insert(rng.randrange(6), broken(rows_of(form, rng), rng))
        path = Path(f"{number}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        try:
            data = common.tokenize(common.load_rows(str(path)), str(path), tokenizer, 64)
        except SystemExit as error:
            assert re.match(rf"error: {path}: ", str(error)) and "\n" not in str(error), rows
            outcomes.append("refused")
            continue
        said = capsys.readouterr().out
        kept, total = (int(x) for x in re.search(r": (\d+) of (\d+) rows", said).groups())
        lost = sum(int(x) for x in re.findall(r"(\d+) dropped", said))
        assert total == 6 == kept + lost and len(data) == kept, said
        outcomes.append("kept" if kept == 6 else "dropped")
        for row in data:
            assert all(len(ids) and ids[-1] == tokenizer.eos_token_id for ids in row["response_ids"])
            assert len(row["prompt_ids"]) + max(map(len, row["response_ids"])) <= 64
    assert {"refused", "dropped"} <= set(outcomes)  # or the test would not try much


@pytest.mark.parametrize("junk", [b"", b"\n", b"{", b"[1, 2]\n", b'"x"\n', b"\xff\xfe\x00",
                                  b'{"chosen": "a"}\n{"chosen": 1}\n',
                                  b'{"chosen": "a", "rejected": "b"}\nnull\n', b"\x1f\x8b\x00", b'{"a": NaN}\n'])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.parquet"])
def test_broken_files(junk, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(junk)
    with pytest.raises(SystemExit) as error:
        common.tokenize(common.load_rows(name), name, common.toy_tokenizer(), 64)
    assert str(error.value).startswith(f"error: {name}: ") and "\n" not in str(error.value)
