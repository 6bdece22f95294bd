"""The documents name what exists, the scripts are short and plain, and what stands in several of them is the same."""

import argparse
import ast
import collections
import importlib
import io
import re
import shlex
import sys
import tokenize

import pytest
from conftest import ROOT

MAX_TOKENS = {"common.py": 5880, "baseline_rm.py": 1300, "vote_strength.py": 1730, "denoise_rm.py": 2040,
              "contrastive_rm.py": 2370, "meta_rm.py": 2090, "ppo_loop.py": 5120, "eval.py": 4700}
SCRIPTS = sorted({*MAX_TOKENS} - {"common.py"})
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
OWN = {("evaluate", "eval.py"), ("evaluate", "ppo_loop.py")}  # same name, another function


def read(*patterns):
    """Files by name, from the root."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


TEXTS, DOCS = read("*.py", "docs/**/*.py", "tests/*.py"), read("README.md", "docs/**/*.md")


def commands():
    """The shell commands of the documents and of docstrings that start a .py file: (document, file, its arguments)."""
    docstrings = {name: ast.get_docstring(ast.parse(text), clean=False) or "" for name, text in TEXTS.items()}
    for document, text in {**DOCS, **docstrings}.items():
        for line in re.sub(r"\\\n *", " ", text).splitlines():
            if not re.match(r" *(for .*)?(python|torchrun) ", line) or "git checkout" in line:
                continue
            for name, rest in re.findall(r"(?:python|torchrun) [^;&|]*?([\w/]+\.py)([^;&|]*)", line):
                rest = re.split(r"   |  #", rest)[0].replace('"${flags[@]}"', "--max-length 256")  # without a comment
                yield document, name, shlex.split(re.sub(r"\$(\(\(.*?\)\)|\w+|\{\w+\})", "1", rest))


def tokens_per_line(text):
    """Sorted counts of Python's tokens in the lines that have any; comments, docstrings and line ends do not count."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = [token.start[0] for token in tokens if token.type not in NO_CODE and token.start[0] not in docstrings]
    return sorted(collections.Counter(lines).values())


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="an f-string is no longer one token")
@pytest.mark.parametrize("name", MAX_TOKENS)
def test_scripts_are_easy_to_take_in(name):
    counts = tokens_per_line(TEXTS[name])
    assert sum(counts) <= MAX_TOKENS[name]
    assert sum(counts) / len(counts) <= 11 and counts[int(0.9 * len(counts))] <= 20
    assert max(map(len, TEXTS[name].splitlines())) <= 100


def test_files_can_be_read_in_one_sitting():
    lines = {name: text.count("\n") for name, text in {**TEXTS, **DOCS}.items()}
    assert {*MAX_TOKENS} == {path.name for path in ROOT.glob("*.py")}
    assert sum(lines[name] for name in MAX_TOKENS) <= 3750
    assert lines["README.md"] <= 300 and lines["docs/results.md"] <= 650
    assert sum(lines[name] for name in TEXTS if name.startswith("docs/claims/")) <= 650
    assert [name for name, text in TEXTS.items() if max(map(len, text.splitlines())) > 120] == []


@pytest.mark.parametrize("name", TEXTS)
def test_plain_code(name):
    """No walrus, no list or text times a condition, no condition as a statement, no comprehension with three loops;
    nothing unpickled, no remote code; scripts import no file of ours but common."""
    condition = ast.Compare, ast.BoolOp, ast.IfExp
    clever = []
    for node in ast.walk(ast.parse(TEXTS[name])):
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) else []
        literal = any(isinstance(x, (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr))
                      or isinstance(x, ast.Constant) and isinstance(x.value, str) for x in sides)
        if (isinstance(node, ast.NamedExpr) or isinstance(node, ast.Expr) and isinstance(node.value, condition)
                or literal and any(isinstance(x, condition) or "not " in ast.unparse(x)[:4] for x in sides)
                or len(getattr(node, "generators", [])) > 2):
            clever.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name in MAX_TOKENS:
            modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            assert not modules & {x.removesuffix(".py") for x in SCRIPTS}
    assert clever == []
    assert name.startswith("tests/") or not re.search(r"pickle|torch\.(load|save)\(|trust_remote_code", TEXTS[name])


def test_copies_are_copies():
    """Functions, METRICS, and flags with the same help, but for their defaults."""
    copies = collections.defaultdict(dict)
    for name in SCRIPTS:
        tree = ast.parse(TEXTS[name])
        for node in tree.body:
            key = getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
            if isinstance(node, ast.FunctionDef) and key != "parse_args" and (key, name) not in OWN or key == "METRICS":
                copies[key][name] = ast.get_source_segment(TEXTS[name], node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "add":
                words = {x.arg: ast.unparse(x.value) for x in node.keywords if x.arg != "default"}
                copies[f"{node.args[0].value}: {words['help']}"][name] = words
    different = {key: [*found] for key, found in copies.items() if len({str(x) for x in found.values()}) > 1}
    assert different == {}


@pytest.mark.parametrize("document, name, arguments", [*commands()])
def test_commands_parse(document, name, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert name in TEXTS, f"{document}: no file {name}"
    if name in SCRIPTS:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        assert isinstance(importlib.import_module(name.removesuffix(".py")).parse_args(), argparse.Namespace)
    else:
        assert {x for x in arguments if x.startswith("--")} <= {*re.findall(r'"(--[\w-]+)"', TEXTS[name])}


def test_the_documents_name_what_exists():
    flags = {flag for text in TEXTS.values() for flag in re.findall(r'"(--[a-z-]+)"', text)}
    torchrun = {"--nproc_per_node", "--nnodes", "--node_rank", "--rdzv-backend", "--rdzv-endpoint", "--help"}
    assert {*re.findall(r"(?<![\w-])--[a-z][a-z_-]+\b", DOCS["README.md"])} <= flags | torchrun
    for document, text in DOCS.items():
        folder = (ROOT / document).parent
        links = {x.split("#")[0] for x in re.findall(r"\]\(((?!https?:)[^)#]+)", text)}
        assert [x for x in links if not (folder / x).exists()] == [], document
    for name, function in re.findall(r"`(\w+\.py)`?:? `?(\w+)`", DOCS["README.md"]):
        assert re.search(rf"^(def|class) {function}\b", TEXTS[name], re.MULTILINE), (name, function)


def test_every_mark_has_its_row():
    lines = [line for text in DOCS.values() for line in text.splitlines()]
    marks = {(mark, name) for name in MAX_TOKENS for mark in re.findall(r"# (UNSTATED|DEVIATION):", TEXTS[name])}
    assert [x for x in marks if not any(x[0] in line and x[1] in line for line in lines)] == []


def test_ci_runs_the_test_command():
    command = re.search(r"^ *(pip install .*pytest.*)$", DOCS["README.md"], re.MULTILINE).group(1)
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == command
