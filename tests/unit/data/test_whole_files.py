from pathlib import Path

import pytest

from megatron_mtpd.data.whole_files import WholeFiles


def write(outputs: WholeFiles, content: str) -> None:
    for target in outputs.targets:
        Path(outputs.partial(target)).write_text(content)


@pytest.fixture
def targets(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "new" / name) for name in ("x.bin", "x.idx")]


def names(targets: list[str]) -> list[str]:
    return sorted(path.name for path in Path(targets[0]).parent.iterdir())


def test_files_appear_at_the_end_of_the_block(targets: list[str]):
    with WholeFiles(*targets) as outputs:
        write(outputs, "whole")
        assert not any(Path(target).exists() for target in targets)
    assert names(targets) == ["x.bin", "x.idx"]
    assert [Path(target).read_text() for target in targets] == ["whole", "whole"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_block_raises(targets: list[str], error: type[BaseException]):
    def fail() -> None:
        with WholeFiles(*targets) as outputs:
            write(outputs, "half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(targets) == []


def test_a_file_that_was_not_written_stops_all(targets: list[str]):
    with pytest.raises(FileNotFoundError), WholeFiles(*targets) as outputs:
        Path(outputs.partial(targets[0])).write_text("half")
    assert names(targets) == []


def test_existing_files_are_refused_also_when_they_appear_meanwhile(targets: list[str]):
    def meet() -> None:
        with WholeFiles(*targets) as outputs:
            write(outputs, "mine")
            Path(targets[1]).write_text("another's")

    with pytest.raises(ValueError, match=r"x\.idx exists; .*--force"):
        meet()
    assert names(targets) == ["x.idx"] and Path(targets[1]).read_text() == "another's"
    with pytest.raises(ValueError, match=r"x\.idx exists"):
        WholeFiles(*targets)


def test_force_keeps_the_old_until_the_new_is_whole(targets: list[str]):
    with WholeFiles(*targets) as outputs:
        write(outputs, "old")

    def fail() -> None:
        with WholeFiles(*targets, force=True) as outputs:
            write(outputs, "half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [Path(target).read_text() for target in targets] == ["old", "old"]
    with WholeFiles(*targets, force=True) as outputs:
        write(outputs, "new")
    assert [Path(target).read_text() for target in targets] == ["new", "new"]


def test_replacing_never_shows_an_old_file_beside_a_new_one(targets: list[str], monkeypatch: pytest.MonkeyPatch):
    """As if killed at the first renaming: what made the old files readable is already gone."""
    with WholeFiles(*targets) as outputs:
        write(outputs, "old")

    def killed(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.rename", killed)
    with pytest.raises(KeyboardInterrupt), WholeFiles(*targets, force=True) as outputs:
        write(outputs, "new")
    assert names(targets) == []


def test_leftovers_are_those_of_others(targets: list[str]):
    outputs = WholeFiles(*targets)
    write(outputs, "mine")
    other = Path(targets[0] + ".partial-elsewhere-1")
    other.write_text("")
    assert outputs.leftovers() == [str(other)]


def test_a_prefix_that_is_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="give a name after the folder"):
        WholeFiles(f"{tmp_path}/.bin", f"{tmp_path}/.idx")
