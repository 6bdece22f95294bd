"""The suite runs offline, on the CPU and in a cache of its own, and leaves nothing behind."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
HOME = tempfile.TemporaryDirectory(prefix="rm-tests-")
os.environ |= {"XDG_CACHE_HOME": HOME.name, "HF_HOME": HOME.name, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402

TINY = {"vocab_size": len(common.WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128}


@pytest.fixture(scope="session")
def tokenizer():
    return common.toy_tokenizer()


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer):
    """A folder with a random two-layer Llama and the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script(llama, tmp_path, monkeypatch, capsys):
    """Run a script in this process on the tiny Llama and a little toy data, in an empty folder; -> what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *small(llama), *map(str, flags)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / name), run_name="__main__")
        return "".join(capsys.readouterr())

    return run


def settings(**changes):
    """What `load_reward_model` and its like ask of a script's flags."""
    return SimpleNamespace(**{"dtype": "float32", "seed": 0, "max_length": 64, "micro_tokens": 256, **changes})


def small(llama):
    """Flags of a run of 12 steps that takes about a second."""
    return ["--model", str(llama), "--data", "toy:n=96", "--eval-data", "id=toy:id,n=40", "--epochs", "2",
            "--batch-size", "16", "--lr", "1e-3", "--max-length", "64", "--micro-tokens", "256"]


def shell(llama, *flags, ranks=0, cwd=None, **kwargs):
    """Start a script as a user does, with `ranks` under torchrun; -> the process, which runs."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    script, *flags = map(str, flags)
    return subprocess.Popen([*start, str(ROOT / script), *small(llama), *flags], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
