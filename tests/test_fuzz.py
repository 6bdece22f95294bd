"""Rows in every form, broken in every way: refused in one line, dropped and counted, or kept; never a traceback."""

import json
import random
from pathlib import Path

import pytest
from conftest import toy

import common

PROMPT = "\n\nHuman: name two fruits\n\nAssistant:"
JUNK = [None, "", " ", 0, 3.5, True, [], [None], {}, [[]], [{}], [""], "\n\nHuman:", "\n\nAssistant:", "\x00",
        "fig " * 99, "é🙂", ["a", "b"], [{"role": "user"}], [{"role": "assistant", "content": None}], {"a": [1]}, [1, 2]]


def make_row(form, rng):
    """A good row in one of the forms."""
    texts = rng.sample([" fig plum", " fig", " dog cat saw", " apple"], 2)
    chat, pair = [{"role": "user", "content": PROMPT}], [[{"role": "assistant", "content": text}] for text in texts]
    return {
        "transcript": {"chosen": PROMPT + texts[0], "rejected": PROMPT + texts[1]},
        "prompt": {"prompt": PROMPT, "chosen": texts[0], "rejected": texts[1]},
        "responses": {"prompt": PROMPT, "responses": texts},
        "messages": {"prompt": chat, "chosen": pair[0], "rejected": pair[1]},
        "conversation": {"chosen": chat + pair[0], "rejected": chat + pair[1]},
        "release": {"chosen": ["name two fruits", texts[0]], "rejected": ["name two fruits", texts[1]]},
    }[form]


def break_row(row, rng):
    """Lose a key, put junk in the place of a value or of an item in it, or make two values equal."""
    key, junk, way = rng.choice([*row]), rng.choice(JUNK), rng.choice(["lost", "junk", "item", "equal"])
    if way == "lost":
        del row[key]
    elif way == "item" and isinstance(row[key], list):
        row[key][rng.randrange(len(row[key]))] = rng.choice([junk, {"role": "assistant", "content": junk}])
    elif way == "equal":
        row[rng.choice([*row])] = row[key]
    else:
        row[rng.choice([key, "prompt", "extra"])] = junk


@pytest.mark.parametrize("form", ["transcript", "prompt", "responses", "messages", "conversation", "release"])
def test_broken_rows(form, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, rng, outcomes = toy.make_tokenizer(), random.Random(form), set()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    for i in range(25):
        name, rows = f"{i}.jsonl", [make_row(form, rng) for _ in range(6)]
        break_row(rng.choice(rows), rng)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            k = None if form == "responses" else 2
            data = common.tokenize(common.load_rows(name), name, tokenizer, 64, k)
            assert f"{name}: {len(data)} of 6 rows" in capsys.readouterr().out and len(data) >= 5, rows
            outcomes.add(len(data))
        except SystemExit as error:
            assert str(error).startswith(f"error: {name}: ") and "\n" not in str(error), rows
            outcomes.add("refused")
    assert {5, "refused"} <= outcomes  # or the test would not try much


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.parquet"])
def test_broken_files(name, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    for junk in (b"", b"\n", b"{", b"[1, 2]\n", b'"x"\n', b"\xff\xfe\x00", b'{"chosen": "a"}\n{"chosen": 1}\n',
                 b'{"chosen": "a", "rejected": "b"}\nnull\n', b'{"a": NaN}\n', b"\x1f\x8b\x00"):
        Path(name).write_bytes(junk)
        with pytest.raises(SystemExit, match=f"^error: {name}: [^\n]*$"):
            common.tokenize(common.load_rows(name), name, tokenizer, 64)
