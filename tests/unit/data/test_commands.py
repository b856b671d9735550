"""The commands in tools/, called as functions: what they print and the status they end with."""

import json
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_mtpd.data import text

TOOLS = Path(__file__).parents[3] / "tools"
Command = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def preprocess_data() -> Command:
    return runpy.run_path(str(TOOLS / "preprocess_data.py"))["main"]


@pytest.fixture(scope="module")
def train_tokenizer() -> Command:
    return runpy.run_path(str(TOOLS / "train_tokenizer.py"))["main"]


@pytest.fixture
def code(tmp_path: Path, sources: list[str]) -> Path:
    """A folder with Python files, an empty one among them, a compressed one, and others."""
    folder = tmp_path / "code"
    folder.mkdir()
    for number, source in enumerate(sources):
        (folder / f"{number:03}.py").write_text(source, encoding="utf-8")
    (folder / "__init__.py").write_text("")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


def test_from_a_folder_of_code_to_a_dataset(
    preprocess_data, train_tokenizer, code, sources, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    corpus = ["--input", str(code), "--suffix", ".py"]
    assert train_tokenizer([*corpus, "--vocab-size", "500", "--output-prefix", "out/tok"]) == 0
    assert "500 bpe pieces" in capsys.readouterr().out
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "out/tok.model"]
    assert preprocess_data([*corpus, *flags, "--output-prefix", "out/code", "--strict"]) == 0
    out = capsys.readouterr().out
    assert f"skipped 1 of {len(sources) + 1} records\n  empty document: 1\n    {code / '__init__.py'}\n" in out
    assert f"{len(sources)} documents, " in out
    assert len(IndexedDataset("out/code")) == len(sources)
    assert json.loads(Path("out/code.json").read_text())["options"]["max_bad"] == "0"


def test_the_standard_library_by_name(train_tokenizer, tmp_path):
    flags = ["--vocab-size", "400", "--max-bytes", "1e5", "--output-prefix", str(tmp_path / "tok")]
    assert train_tokenizer(["--input", "python-stdlib", *flags]) == 0
    result = json.loads((tmp_path / "tok.json").read_text())
    assert result["options"]["max_bytes"] == 100_000 and result["text_bytes"] > 5e6
    assert result["source"]["inputs"][0].startswith("standard library of Python")


@pytest.mark.parametrize("tool", ["preprocess_data", "train_tokenizer"])
def test_help_has_an_example_that_parses(request, tool, capsys):
    with pytest.raises(SystemExit) as end:
        request.getfixturevalue(tool)(["--help"])
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert f"python tools/{tool}.py --input" in help_text and "--output-prefix" in help_text


def flags_of(spec, code: Path, tmp_path: Path, **changed: str) -> list[str]:
    flags = {
        "input": str(code),
        "tokenizer_type": spec.tokenizer_type,
        "tokenizer_model": spec.tokenizer_model,
        "output_prefix": str(tmp_path / "out" / "data"),
    } | changed
    return [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "nowhere.txt"}, "--input nowhere.txt: no such file or folder"),
        ({"input": "empty"}, "--input empty: the folder holds no file"),
        ({"suffix": ".rs"}, "holds no file ending in .rs"),
        ({"tokenizer_type": "SentencePiece"}, "did you mean SentencePieceTokenizer?"),
        ({"tokenizer_model": "nowhere.model"}, "--tokenizer-model nowhere.model: no such file"),
        ({"max_bad": "few"}, "--max-bad few: give a number of records"),
        ({"workers": "0"}, "--workers 0: at least 1"),
        ({"output_prefix": "empty/"}, "--output-prefix empty/: give a name after the folder"),
    ],
)
def test_typos_are_named_in_one_line(
    preprocess_data, sentencepiece_spec, code, tmp_path, monkeypatch, capsys, changed, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert preprocess_data(flags_of(sentencepiece_spec, code, tmp_path, **changed)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == 1 and captured.out == ""
    assert not (tmp_path / "out" / "data.bin").exists()


def test_sigterm_ends_a_run_as_ctrl_c_does(preprocess_data, sentencepiece_spec, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text.TextFiles, "records", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert preprocess_data(flags_of(sentencepiece_spec, code, tmp_path)) == 130
    assert "interrupted; no output was written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
