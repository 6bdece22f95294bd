"""The tests run offline, on the CPU and in a cache of their own. `toy` is docs/toy/make.py."""

import gc
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
HOME = tempfile.TemporaryDirectory(prefix="rm-tests-")
os.environ.update(
    HF_HOME=HOME.name, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
    PYTHONIOENCODING="ascii")  # for new processes: a terminal without "±"
sys.path[:0] = [str(ROOT), str(ROOT / "docs/toy")]

import make as toy  # noqa: E402
import pytest  # noqa: E402

import common  # noqa: E402
from launch import Launch  # noqa: E402

sys.modules["toy"] = toy
common.setup()
gc.freeze()  # or each gc.collect of load_reward_model would look at all of torch
TINY = {"vocab_size": len(toy.WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128}
tokenizer = pytest.fixture(toy.make_tokenizer, scope="session")


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer):
    """A folder with a two-layer Llama, as good as random, and the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    toy.make_model(tokenizer, steps=1, hidden_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data(split="train", n=96):
    """-> name of a .jsonl file with n comparisons of the toy world."""
    path = Path(HOME.name, f"{split}-{n}.jsonl")
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in toy.make_comparisons(split, n)))
    return str(path)


def settings(**changes):
    """What load_reward_model and its like ask of a script's flags."""
    return SimpleNamespace(**{"seed": 0, "dtype": "float32", "max_length": 64, "micro_batch_tokens": 256,
                              "gradient_checkpointing": False, "offload": False, **changes})


def small(script, model):
    """Flags for a run of 12 steps that takes a second, as far as the script has them."""
    flags = {"--model": model, "--data": data(), "--eval-data": f"id={data('id', 40)}", "--epochs": 2, "--lr": 1e-3,
             "--batch-size": 16, "--max-length": 64, "--micro-batch-tokens": 256}
    text = (ROOT / script).read_text()
    return [str(x) for flag, value in flags.items() if f'add("{flag}"' in text for x in (flag, value)]


@pytest.fixture
def script(llama, tmp_path, monkeypatch, capsys):
    """Run a script in this process, in an empty folder, on the tiny Llama and a little data -> what it printed."""
    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *small(name, llama), *map(str, flags)])
        runpy.run_path(str(ROOT / name), run_name="__main__")
        return "".join(capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    return run


def launch(model, script, *flags, ranks=1):
    """Start a script in processes of its own, in this folder -> Launch."""
    words = [str(ROOT / script), *small(script, model), *map(str, flags)]
    return Launch(words, ranks)
