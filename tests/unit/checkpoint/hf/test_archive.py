"""Archives that torch reads, and rows read out of pieces as any run's layout may leave them."""

from __future__ import annotations

import io
import zipfile
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mtpd.checkpoint.hf.archive import checksum, place_of, write_archive
from megatron_mtpd.checkpoint.hf.torch_dist import Reader
from megatron_mtpd.checkpoint.metadata import CheckpointError, Payload
from megatron_mtpd.checkpoint.metadata import Tensor as Described


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_torch_and_zipfile_read_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    rows, path = torch.randn(6, 4).to(dtype), tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"before")
        write_archive(file, rows, (1, 6, 4), checksum(rows))
        end = file.tell()
        file.write(b"behind")
    data = path.read_bytes()[6:end]
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert found.shape == (1, 6, 4) and found.dtype == dtype
    assert torch.equal(found[0].view(torch.uint8), rows.view(torch.uint8))
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    place = place_of(path, Payload("file", 6, end - 6), rows.nbytes)
    assert place is not None
    assert path.read_bytes()[place : place + rows.nbytes] == bytes(rows.view(torch.uint8).flatten().tolist())


def test_an_archive_whose_records_are_not_where_its_directory_says_is_refused(tmp_path: Path) -> None:
    """Of a header that was overwritten: rows read from behind it would be the neighbours'."""
    rows, path = torch.randn(6, 4), tmp_path / "file"
    with path.open("wb") as file:
        write_archive(file, rows, (6, 4), checksum(rows))
    good = path.read_bytes()
    header = good.index(b"PK\3\4", good.index(b"archive/version"))
    for offset, byte in ((0, ord("X")), (26, 9), (35, ord("x"))):  # signature, length of the name, the name
        bad = bytearray(good)
        bad[header + offset] = byte
        path.write_bytes(bad)
        with pytest.raises(zipfile.BadZipFile, match="not what the directory says"):
            place_of(path, Payload("file", 0, len(bad)), rows.nbytes)


def test_what_is_no_plain_tensor_is_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for value in (torch.nn.Parameter(torch.randn(6, 4)), {"a": 1}):
        torch.save(value, path)
        assert place_of(path, Payload("file", 0, path.stat().st_size), 96) is None
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(96))
    assert place_of(path, Payload("file", 0, path.stat().st_size), 96) is None


def test_records_as_those_of_4_gib_and_more_are(tmp_path: Path) -> None:
    """Zip64: their sizes stand behind the name."""
    rows, plain, path = torch.randn(6, 4), io.BytesIO(), tmp_path / "file"
    torch.save(rows, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            with target.open(zipfile.ZipInfo(info.filename), "w", force_zip64=True) as record:
                record.write(source.read(info))
    place = place_of(path, Payload("file", 0, path.stat().st_size), rows.nbytes)
    assert place is not None
    assert path.read_bytes()[place : place + rows.nbytes] == rows.numpy().tobytes()


def contents(directory: Path, tensors: dict[str, Tensor], cuts: dict[str, list[list[int]]], transposed: bool) -> Any:
    """A checkpoint of tensors that are cut at these places in each dimension, as a parallel run would write them."""
    described, raw = {}, {}
    with (directory / "data").open("wb") as file:
        for key, tensor in tensors.items():
            payloads, chunks = {}, []
            bounds = [list(pairwise([0, *cut, size])) for cut, size in zip(cuts[key], tensor.shape, strict=True)]
            for box in product(*bounds):
                piece = tensor[tuple(slice(*side) for side in box)].clone()
                start = file.tell()
                torch.save(piece.mT.contiguous().mT if transposed and piece.dim() > 1 else piece, file)
                offset = tuple(side[0] for side in box)
                payloads[offset] = Payload("data", start, file.tell() - start)
                sizes = (SimpleNamespace(arguments=(tuple(size),)) for size in (offset, piece.shape))
                chunks.append(SimpleNamespace(**dict(zip(("offsets", "sizes"), sizes, strict=True))))
            described[key] = Described(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), payloads)
            raw[key] = SimpleNamespace(chunks=chunks)
    return SimpleNamespace(directory=directory, tensors=described, raw=SimpleNamespace(state_dict_metadata=raw))


@pytest.mark.parametrize("transposed", [False, True])
def test_any_rows_come_out_of_any_pieces(transposed: bool, tmp_path: Path) -> None:
    tensors = {"bias": torch.randn(9), "weight": torch.randn(9, 8), "experts": torch.randn(3, 4, 8)}
    cuts = {"bias": [[4]], "weight": [[5], [3]], "experts": [[2], [3], [1, 6]]}
    reader = Reader(contents(tmp_path, tensors, cuts, transposed))
    for key, tensor in tensors.items():
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
        for first, last in ((0, len(rows)), (3, 7), (5, 6), (len(rows) - 1, len(rows))):
            out = torch.empty(last - first, rows.shape[1], dtype=torch.bfloat16 if first == 3 else torch.float32)
            reader.read(key, first, out)
            assert torch.equal(out, rows[first:last].to(out.dtype)), (key, first, last)


def test_a_piece_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(64, 32)}
    made = contents(tmp_path, tensors, {"weight": [[32], []]}, False)
    path = tmp_path / "data"
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)  # the directory of the second archive
    path.write_bytes(data)
    out = torch.empty(64, 32)
    with pytest.raises(CheckpointError, match=r"data: bytes .* a part of weight, are damaged"):
        Reader(made).read("weight", 0, out)
    Reader(made).read("weight", 0, out[:32])
    del made.tensors["weight"].chunks[32, 0]
    with pytest.raises(CheckpointError, match="no bytes of a part of tensor weight"):
        Reader(made).read("weight", 0, out)
    with pytest.raises(CheckpointError, match="has no tensor other"):
        Reader(made).read("other", 0, out)
