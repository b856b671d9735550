import os
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_mtpd.data.accounting import Tally
from megatron_mtpd.data.stdlib_corpus import stdlib_corpus, stdlib_documents, stdlib_files

ROOT = Path(sysconfig.get_path("stdlib"))


def test_the_library_and_nothing_else():
    files = [Path(file).relative_to(ROOT) for file in stdlib_files()]
    assert {Path("argparse.py"), Path("json/decoder.py")} <= set(files)
    assert all(file.suffix == ".py" for file in files)
    folders = {part for file in files for part in file.parts[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__"}
    assert sum(len(document.text) for document in stdlib_documents()) > 5e6


def test_the_order_depends_on_names_inside_the_library_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = [os.path.relpath(file, ROOT) for file in stdlib_files()]
    assert here != sorted(here)
    elsewhere = tmp_path / "lib"
    for name in reversed(here[:50]):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text("x")
    (elsewhere / "empty.py").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(elsewhere))
    assert [os.path.relpath(file, elsewhere) for file in stdlib_files()] == here[:50]


def test_a_budget_is_used_and_kept():
    documents = list(stdlib_documents(300_000))
    size = sum(len(document.text.encode()) for document in documents)
    assert 290_000 < size <= 300_000
    assert documents == list(stdlib_documents(300_000))
    with pytest.raises(ValueError, match="raise the budget"):
        stdlib_files(1)


def test_tests_on_request():
    with_tests, without = stdlib_files(include_tests=True), stdlib_files()
    assert set(without) <= set(with_tests)
    # a Python may come without its tests
    assert (len(with_tests) > len(without)) == any(ROOT.rglob("tests/*.py")) | (ROOT / "test").is_dir()


def test_the_summary_names_the_python():
    corpus = stdlib_corpus(100_000)
    assert corpus.summary()["inputs"] == [f"standard library of Python {sys.version.split()[0]}"]
    assert list(corpus.documents(Tally(0))) == list(stdlib_documents(100_000))
