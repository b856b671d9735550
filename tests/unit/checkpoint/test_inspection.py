"""What is said about a checkpoint, against the model that it was made from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.inspection import describe, table
from megatron_mtpd.checkpoint.looping import make_plan
from tests.unit.checkpoint.runs import SLOTS, Model, save_checkpoint

TOOL = Path(__file__).parents[3] / "tools" / "inspect_checkpoint.py"

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def run(one_rank, tmp_path_factory):
    root, model = tmp_path_factory.mktemp("inspected") / "run", Model(heads=2)
    save_checkpoint(root, model, 100)
    save_checkpoint(root, model, 200, world_size=8)
    return model, root


def test_parameters_are_counted_once_by_part(run):
    model, root = run
    found = describe(root)["parameters"]
    assert found["total"] == sum(tensor.numel() for tensor in model.tensors.values())
    assert found["heads"] == [sum(tensor.numel() for tensor in model.head(k).values()) for k in range(2)]
    assert found["embedding"] == found["output"] == 64 * 16
    assert found["total"] == found["trunk"] + found["embedding"] + found["output"] + sum(found["heads"])


def test_everything_else_about_it(run):
    model, root = run
    found = describe(root)
    assert found["iteration"] == 200
    assert found["iterations"] == [{"iteration": n, "state": "complete"} for n in (100, 200)]
    assert (found["heads"], found["layer_pattern"]) == (2, "*-*-/*-/*-")
    assert (found["layout"]["tensor_model_parallel_size"], found["layout"]["world_size"]) == (1, 8)
    assert found["optimizer"] == {"sharding": "not distributed", "by_parameter": True, "slots": sorted(SLOTS)}
    assert found["dtypes"] == {"bfloat16": len(model.tensors)}
    assert found["bytes"]["files"] == sum(found["bytes"][kind] for kind in ("model", "optimizer", "other"))
    assert found["arguments"]["mtp_num_layers"] == 2
    assert found["problems"] == []
    assert describe(root / "iter_0000100")["iteration"] == 100


def test_shared_bytes_are_told(run, tmp_path):
    extend(make_plan(run[1], pattern=[1, 2, 2, 1]), tmp_path / "out")
    found = describe(tmp_path / "out")
    assert found["aliases"] == {3: 2, 4: 1}
    assert found["bytes"]["model"] == describe(run[1])["bytes"]["model"]
    assert found["optimizer"] is None
    assert "(the bytes of head 2)" in table(found)


def test_the_command(run):
    def command(*arguments):
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)

    found = json.loads(command("--load", run[1], "--json").stdout)
    assert found == json.loads(json.dumps(describe(run[1])))
    shown = command("--load", run[1], "--verify", "--arguments", "--tensors").stdout
    for text in ("good (every byte)", "  head 2", "hybrid_layer_pattern = *-*-/*-/*-", "mtp.layers.1.eh_proj.weight"):
        assert text in shown
    missing = command("--load", run[1].parent)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("inspect_checkpoint.py: error: ")


def test_damage_is_shown_and_is_the_exit_status(one_rank, tmp_path):
    directory = save_checkpoint(tmp_path, Model(), 100)
    data = next(directory.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    done = subprocess.run([sys.executable, TOOL, "--load", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"integrity       {data.name}: truncated" in done.stdout
    assert "100 (damaged)" in done.stdout
