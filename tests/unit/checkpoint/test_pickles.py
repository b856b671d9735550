"""Pickles that are read are not run, and what is written back is what was read."""

import argparse
import collections
import contextlib
import pickle
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_mtpd.checkpoint import pickles

ACCEPT = ("torch", "argparse", "pathlib", "signal", "_codecs.encode")


def torch_metadata() -> dcp.Metadata:
    properties = dcp.TensorProperties(torch.bfloat16)
    chunk = dcp.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    return dcp.Metadata(
        {
            "a": dcp.TensorStorageMetadata(properties, torch.Size([2, 3]), [chunk]),
            "b": dcp.BytesStorageMetadata(),
        },
        None,
        {
            dcp.MetadataIndex("a", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 10),
            dcp.MetadataIndex("b"): _StorageInfo("__0_0.distcp", 10, 5),
        },
    )


VALUES = {
    "metadata": torch_metadata(),
    "arguments": argparse.Namespace(a=1, b=[1.5, None], c=signal.SIGTERM, d=Path("x"), e=(), f={True: b"\x00"}),
    "containers": [set("ab"), frozenset("c"), collections.OrderedDict(a=1), (1, 2, 3, 4), 2**70, -1, "é"],
    "globals": {"dtype": torch.float32, "class": argparse.Namespace},
    # The marks that stand for names while a pickle is written, as data of the pickle itself.
    "marks": [0x6D747064, "JdptmQ", b"JdptmQ", torch.float32, [0x6D747064] * 3],
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_back_is_what_was_read(name, protocol):
    original = pickle.dumps(VALUES[name], protocol)
    assert pickle.loads(pickles.dumps(pickles.loads(original, ACCEPT))) == VALUES[name]


def test_attributes_can_be_read_and_changed():
    arguments = pickles.loads(pickle.dumps(argparse.Namespace(heads=4, old=1)), ACCEPT)
    assert (arguments.heads, type(arguments).global_name) == (4, ("argparse", "Namespace"))
    arguments.heads = 16
    del arguments.old
    assert pickle.loads(pickles.dumps(arguments)) == argparse.Namespace(heads=16)


def test_shared_objects_stay_shared():
    shared = argparse.Namespace(a=1)
    copy = pickle.loads(pickles.dumps(pickles.loads(pickle.dumps([shared, shared, [shared]]), ACCEPT)))
    assert copy[0] is copy[1] is copy[2][0]


class Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("accept", [ACCEPT, ("posix", "builtins")])
def test_a_malicious_pickle_runs_nothing(tmp_path, accept):
    """Refused where its name is not expected; and where it is, still only remembered."""
    import os

    target = tmp_path / "pwned"
    attack = pickle.dumps({"weights": Attack(os.system, f"touch {target}")})
    pickle.loads(attack)
    assert target.exists()  # the attack works on whoever trusts it
    target.unlink()
    if "posix" in accept:
        assert pickles.loads(attack, accept)["weights"].global_name == ("posix", "system")
    else:
        with pytest.raises(pickle.UnpicklingError, match=r"posix\.system, which has no business there"):
            pickles.loads(attack, accept)
    assert not target.exists()


@pytest.mark.parametrize("function", [eval, exec, __import__, getattr, torch.hub.load, torch.load])
def test_names_are_accepted_in_full_only(function):
    attack = pickle.dumps(Attack(function, "x"))
    with pytest.raises(pickle.UnpicklingError, match="no business there"):
        pickles.loads(attack, ("torch.Size", "torch.float32", "torch.distributed.checkpoint"))


@settings(deadline=None)  # of a machine that others use too
@given(st.data())
def test_damaged_pickles_are_named_as_such(data):
    """Whatever the damage, there is one kind of error, or a value; never another exception."""
    original = bytearray(pickle.dumps(VALUES["metadata"]))
    original[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    del original[data.draw(st.integers(1, len(original))) :]
    with contextlib.suppress(pickle.UnpicklingError):
        pickles.loads(bytes(original), ACCEPT)
