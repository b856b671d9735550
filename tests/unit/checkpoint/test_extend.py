"""Extended checkpoints: what is in them, how they are written, what is refused, and what a kill leaves behind."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_mtpd.checkpoint import extend as extend_module
from megatron_mtpd.checkpoint import files
from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.files import Progress
from megatron_mtpd.checkpoint.inspection import describe
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import TRACKER, read_tracker, resolve
from megatron_mtpd.checkpoint.looping import make_plan, zeros
from megatron_mtpd.checkpoint.metadata import CheckpointError, read_metadata
from tests.unit.checkpoint.runs import SLOTS, Model, load_weights, save_checkpoint
from tests.unit.checkpoint.sparse import HEADS, SHARD, make_sparse_checkpoint, norm

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "loop_extend.py"

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def run(tmp_path):
    """A model with three heads, and the directory of the run that saved it."""
    model = Model(heads=3)
    save_checkpoint(tmp_path / "run", model, tp=2)
    return model, tmp_path / "run"


def looped(model, sources):
    """The model that an extension is to give: every head a copy of its source."""
    tensors = {key: tensor for key, tensor in model.tensors.items() if not key.startswith("mtp.")}
    for head, source in enumerate(sources):
        tensors |= {f"mtp.layers.{head}.{name}": tensor for name, tensor in model.head(source).items()}
    return Model(heads=len(sources), kind=model.kind, tensors=tensors)


def assert_holds(root, model, tp=1):
    directory = resolve(root)[1]
    assert verify(directory) == []
    loaded = load_weights(directory, model, tp)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.tensors.items())
    found = {key for key in read_metadata(directory).tensors if not key.startswith("optimizer.")}
    assert found == set(model.tensors)  # and nothing else
    return directory


def common_state(directory):
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(str(directory))


# --- what is in them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ({"num_heads": 6}, [0, 1, 2, 0, 1, 2]),
        ({"num_heads": 8}, [0, 1, 2, 0, 1, 2, 0, 1]),  # no multiple
        ({"num_heads": 3}, [0, 1, 2]),
        ({"num_heads": 1}, [0]),  # dropped
        ({"pattern": [1, 2, 3, 3, 3]}, [0, 1, 2, 2, 2]),
        ({"pattern": [3, 1]}, [2, 0]),
    ],
)
@pytest.mark.parametrize("mode", ["link", "copy", "materialize"])
def test_every_head_has_the_weights_of_its_source(run, tmp_path, options, sources, mode):
    """Loaded through Megatron at tensor-parallel sizes other than the one that it was saved with."""
    model, root = run
    extend(make_plan(root, **options), tmp_path / "out", mode)
    for tp in (1, 4):
        assert_holds(tmp_path / "out", looped(model, sources), tp)


def test_heads_of_a_gpt_model(tmp_path):
    model = Model(heads=2, kind="gpt")
    save_checkpoint(tmp_path / "run", model)
    extend(make_plan(tmp_path / "run", 5), tmp_path / "out")
    directory = assert_holds(tmp_path / "out", looped(model, [0, 1, 0, 1, 0]))
    arguments = common_state(directory)["args"]
    assert (arguments.mtp_num_layers, arguments.hybrid_layer_pattern) == (5, None)


def test_objects_of_a_head_come_along(run, tmp_path):
    from megatron.core.dist_checkpointing import ShardedObject, load

    extend(make_plan(run[1], 5), tmp_path / "out")
    key = "mtp.layers.4.eh_proj._extra_state"
    loaded = load({"x": ShardedObject(key, None, (1,), (0,))}, str(tmp_path / "out" / "release"))
    assert loaded["x"] == {"amax": 1.0}  # of head 1, counted from 0


def test_arguments_are_rewritten_and_all_others_kept(tmp_path):
    model = Model(heads=2)
    source = save_checkpoint(tmp_path / "run", model, mtpd_beta=[0.1, 0.2], mtpd_alpha=[1.0], hidden_sizes=[1, 2])
    extend(make_plan(tmp_path / "run", 3), tmp_path / "out")
    before, after = common_state(source), common_state(tmp_path / "out" / "release")
    changed = {
        "mtp_num_layers": 3,
        "mtpd_old_heads": 2,
        "hybrid_layer_pattern": "*-*-/*-/*-/*-",
        "mtpd_beta": [0.1, 0.2, 0.1],
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
    }
    assert vars(after["args"]) == vars(before["args"]) | changed
    assert after["iteration"] == 0
    assert "optimizer" not in after
    assert "opt_param_scheduler" not in after


def test_without_its_optimizer_it_is_a_release(run, tmp_path):
    extend(make_plan(run[1], 4), tmp_path / "out")
    assert read_tracker(tmp_path / "out") == "release"
    assert describe(tmp_path / "out")["optimizer"] is None
    assert not any(key.startswith("rng_state") for key in read_metadata(tmp_path / "out" / "release").objects)


def test_its_optimizer_state_is_kept_for_what_existed(run, tmp_path):
    """New heads: their source's master weights, zero moments. All others: as they were."""
    model, root = run
    extend(make_plan(root, pattern=[1, 2, 2, 1], keep_optimizer=True), tmp_path / "out")
    assert read_tracker(tmp_path / "out") == 100
    directory = tmp_path / "out" / "iter_0000100"
    after = looped(model, [0, 1, 1, 0])

    def state(of, where, slot):
        shapes = {
            f"optimizer.state.{slot}.{key}": torch.empty_like(t, dtype=torch.float) for key, t in of.tensors.items()
        }
        return load_weights(where, Model(tensors=shapes), tp=4)

    for slot in SLOTS:
        old, new = state(model, root / "iter_0000100", slot), state(after, directory, slot)
        for key in after.tensors:
            kept = old.get(f"optimizer.state.{slot}.{key}")
            value = new[f"optimizer.state.{slot}.{key}"]
            if key.startswith(("mtp.layers.2.", "mtp.layers.3.")):
                expected = after.tensors[key].float() if slot == "fp32_param" else torch.zeros_like(value)
                assert torch.equal(value, expected)
            else:
                assert kept is not None and torch.equal(value, kept)
    expected = common_state(root / "iter_0000100")
    vars(expected["args"]).update(mtp_num_layers=4, hybrid_layer_pattern="*-*-/*-/*-/*-/*-", mtpd_old_heads=2)
    assert common_state(directory) == expected


@pytest.mark.parametrize(
    ("pattern", "old_heads"),
    [([1, 2, 3, 1], 3), ([1, 2, 3, 3, 3], 3), ([1, 2, 2], 2), ([2, 1, 3], 0), ([1, 2, 3], 0), ([1, 2], 0)],
)
def test_it_says_which_heads_are_old_in_front_of_copies(run, pattern, old_heads):
    """0 where no head in front is what it was, or where no copy is behind them."""
    assert make_plan(run[1], pattern=pattern).old_heads == old_heads


def test_an_iteration_can_be_chosen(run, tmp_path):
    extend(make_plan(run[1], 4, iteration=7), tmp_path / "out")
    assert read_tracker(tmp_path / "out") == common_state(tmp_path / "out" / "iter_0000007")["iteration"] == 7


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (3, 4)), ("bfloat16", (5,)), ("float32", ())])
def test_zeros_are_what_torch_would_have_saved(tmp_path, dtype, shape):
    (tmp_path / "zeros").write_bytes(zeros(dtype, shape))
    assert torch.equal(torch.load(tmp_path / "zeros"), torch.zeros(shape, dtype=getattr(torch, dtype)))
    assert (tmp_path / "zeros").stat().st_size < 1500


def test_an_extended_checkpoint_can_be_extended(run, tmp_path):
    model, root = run
    extend(make_plan(root, 5), tmp_path / "five")
    extend(make_plan(tmp_path / "five", pattern=[5, 4, 1]), tmp_path / "three")
    assert_holds(tmp_path / "three", looped(model, [1, 0, 0]))


# --- how they are written -------------------------------------------------------------------------------------------


def test_a_copy_of_an_extended_checkpoint_overwrites_nothing(run, tmp_path):
    """Both have files of their own beside those of the source; none has a name twice."""
    model, root = run
    extend(make_plan(root, 2), tmp_path / "two", "materialize")
    for mode in ("copy", "link"):
        extend(make_plan(tmp_path / "two", 4), tmp_path / mode, mode)
        assert_holds(tmp_path / mode, looped(model, [0, 1, 0, 1]))
    assert_holds(tmp_path / "two", looped(model, [0, 1]))


def test_data_is_linked_and_outlives_the_source(run, tmp_path):
    model, root = run
    data = next((root / "iter_0000100").glob("*.distcp"))
    assert extend(make_plan(root, 6), tmp_path / "out") == "link"
    assert data.samefile(tmp_path / "out" / "release" / data.name)
    shutil.rmtree(root)
    assert_holds(tmp_path / "out", looped(model, [0, 1, 2, 0, 1, 2]))


def test_a_copy_shares_nothing(run, tmp_path):
    model, root = run
    extend(make_plan(root, 6), tmp_path / "out", "copy")
    for file in (root / "iter_0000100").iterdir():
        file.write_bytes(b"overwritten")
    assert_holds(tmp_path / "out", looped(model, [0, 1, 2, 0, 1, 2]))


def test_where_links_are_not_possible_it_copies(run, tmp_path, monkeypatch):
    monkeypatch.setattr(extend_module, "can_link", lambda source, directory: False)
    assert extend(make_plan(run[1], 6), tmp_path / "out") == "copy"
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "out" / "release").iterdir())


def test_another_file_system_gets_a_copy_and_is_told_how_far_it_is(run, tmp_path, monkeypatch, capsys):
    model, root = run
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    monkeypatch.setattr(extend_module, "Progress", partial(Progress, every=0.0))
    monkeypatch.setattr(files, "BLOCK", 4096)
    with tempfile.TemporaryDirectory(dir=shm) as other:
        assert extend(make_plan(root, 6), Path(other) / "out") == "copy"
        assert_holds(Path(other) / "out", looped(model, [0, 1, 2, 0, 1, 2]))
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"extend: \d+%, [\d,]+ MB/s, \d+ s left", line) for line in lines)
    shares = [int(line.split()[1].rstrip("%,")) for line in lines]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_materialized_files_hold_every_tensor_once_and_nothing_else(run, tmp_path, monkeypatch):
    monkeypatch.setattr(extend_module, "_FILE_SIZE", 20_000)
    extend(make_plan(run[1], 6), tmp_path / "out", "materialize")
    directory = tmp_path / "out" / "release"
    payloads = sorted((p.file, p.offset, p.end) for _, p in read_metadata(directory).payloads())
    ends = {}
    for file, start, end in payloads:
        assert start == ends.get(file, 0)  # no gap, nothing twice
        ends[file] = end
    assert ends == {file.name: file.stat().st_size for file in directory.glob("*.distcp")}
    assert len(ends) > 1
    assert describe(tmp_path / "out")["aliases"] == {}


def test_verification_compares_every_tensor(run, tmp_path):
    extend(make_plan(run[1], 6), tmp_path / "out", verified=True)
    plan = make_plan(run[1], 6)
    wrong = tmp_path / "out" / "release"
    damaged = make_plan(run[1], pattern=[2, 1, 3, 1, 2, 3])
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.\d\..* is not the source's mtp\.layers\.\d\."):
        extend_module.compare(damaged, wrong)
    extend_module.compare(plan, wrong)


def test_a_failed_verification_leaves_no_output(run, tmp_path, monkeypatch):
    def fail(plan, directory):
        raise CheckpointError("not the same")

    monkeypatch.setattr(extend_module, "compare", fail)
    with pytest.raises(CheckpointError, match="not the same"):
        extend(make_plan(run[1], 6), tmp_path / "out", verified=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_output_is_replaced_as_a_whole_and_only_by_force(run, tmp_path):
    model, root = run
    extend(make_plan(root, 6), tmp_path / "out")
    with pytest.raises(ValueError, match=r"exists and is not empty.*--force"):
        extend(make_plan(root, 2), tmp_path / "out")
    assert_holds(tmp_path / "out", looped(model, [0, 1, 2, 0, 1, 2]))
    extend(make_plan(root, 2), tmp_path / "out", force=True)
    assert_holds(tmp_path / "out", looped(model, [0, 1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("save", ["run", "run/iter_0000100", "run/iter_0000100/out", "."])
def test_the_source_cannot_be_replaced(run, tmp_path, save):
    with pytest.raises(ValueError, match="would replace the checkpoint that is read"):
        extend(make_plan(run[1], 6), tmp_path / save, force=True)
    assert verify(run[1] / "iter_0000100") == []


def test_a_disk_that_is_too_small_is_found_before_writing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ValueError, match=r"needs .* GB, and its file system has 0\.0 GB"):
        extend(make_plan(run[1], 6), tmp_path / "out", "copy")
    assert not (tmp_path / "out").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--num-heads is missing"),
        ({"num_heads": 0}, "--num-heads is 0: give a number of at least 1"),
        ({"pattern": []}, "--pattern names head .*the checkpoint has heads 1 to 3"),
        ({"pattern": [1, 4]}, r"--pattern names head \[4\]: the checkpoint has heads 1 to 3"),
        ({"pattern": [0]}, r"--pattern names head \[0\]"),
        ({"num_heads": 4, "pattern": [1, 2, 3]}, "--pattern names 3 heads, --num-heads is 4"),
        ({"num_heads": 4, "iteration": -1}, "--iteration is -1"),
        ({"num_heads": 4, "ckpt_step": 300}, "iter_0000300 does not exist. Iterations in .*: 100"),
    ],
)
def test_options_that_make_no_sense(run, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(run[1], **options)


def test_a_damaged_source(run):
    data = next((run[1] / "iter_0000100").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"cannot be extended: {data.name}: truncated"):
        make_plan(run[1], 6)


def test_a_source_without_heads(tmp_path):
    save_checkpoint(tmp_path, Model(heads=0))
    with pytest.raises(CheckpointError, match="has no multi-token prediction heads"):
        make_plan(tmp_path, 4)


def test_a_source_whose_heads_are_one_layer(tmp_path):
    save_checkpoint(tmp_path, Model(heads=1), mtp_num_layers=4, mtp_use_repeated_layer=True)
    with pytest.raises(CheckpointError, match="all its heads are one layer"):
        make_plan(tmp_path, 4)


@pytest.mark.parametrize("wrong", [{"mtp_num_layers": 4}, {"hybrid_layer_pattern": "*-/*-"}])
def test_a_source_whose_arguments_contradict_it(tmp_path, wrong):
    save_checkpoint(tmp_path, Model(heads=2), **wrong)
    name, number = next(iter(wrong)), 4 if "mtp_num_layers" in wrong else 1
    with pytest.raises(CheckpointError, match=f"the stored {name} speaks of {number} heads, .* the weights of 2"):
        make_plan(tmp_path, 4)


def test_optimizer_state_that_cannot_be_kept(tmp_path):
    model = Model(heads=2)
    save_checkpoint(tmp_path / "frozen", model, frozen_heads=1)
    with pytest.raises(ValueError, match=r"--keep-optimizer: head 1 in .* was frozen and has no optimizer state"):
        make_plan(tmp_path / "frozen", 4, keep_optimizer=True)
    make_plan(tmp_path / "frozen", pattern=[2, 2], keep_optimizer=True)
    for name, optimizer, message in (
        ("buckets", "buckets", "in buckets .* --dist-ckpt-optim-fully-reshardable"),
        ("none", None, "has no optimizer state"),
    ):
        save_checkpoint(tmp_path / name, Model(), optimizer=optimizer)
        with pytest.raises(ValueError, match=f"--keep-optimizer: .*{message}"):
            make_plan(tmp_path / name, 4, keep_optimizer=True)
        extend(make_plan(tmp_path / name, 4), tmp_path / f"{name}-out")


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path):
    command = [sys.executable, TOOL, "--load", run[1], "--save", tmp_path / "out", "--num-heads", "5", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in ("3 -> 5", "1 2 3 1 2", "*-*-/*-/*-/*-", "-> *-*-/*-/*-/*-/*-/*-", "hard links, nothing is copied"):
        assert line in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pattern", "message"), [("9", "names head [9]"), ("1,x", "is '1,x'"), ("", "is ''")])
def test_an_error_is_one_line(run, tmp_path, pattern, message):
    command = [sys.executable, TOOL, "--load", run[1], "--save", tmp_path / "out", "--pattern", pattern]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"loop_extend.py: error: --pattern {message}")
    assert done.stderr.count("\n") == 1


class Attack:
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("tool", ["loop_extend.py", "inspect_checkpoint.py"])
def test_a_command_runs_nothing_that_a_checkpoint_contains(run, tmp_path, tool):
    attack = Attack()
    attack.target = tmp_path / "ran"
    directory = run[1] / "iter_0000100"
    (directory / "integrity.json").unlink(missing_ok=True)
    (directory / ".metadata").write_bytes(pickle.dumps(attack))
    more = ["--save", tmp_path / "out", "--num-heads", "6"] if tool == "loop_extend.py" else []
    command = [sys.executable, TOOL.parent / tool, "--load", run[1], *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(r"\.metadata is damaged, or no checkpoint metadata: it names posix\.system", done.stderr)
    assert not attack.target.exists()
    assert not (tmp_path / "out").exists()


# Runs the command over and over, killing it at its first, second, ... step that changes a file system.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import loop_extend
    load, out, *flags = sys.argv[2:]
    STEPS = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}

    def die_at(step):
        def hook(event, arguments):
            nonlocal step
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in STEPS or writes:
                step -= 1
                if step == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    for step in range(1, 1000):
        child = os.fork()
        if child == 0:
            die_at(step)
            loop_extend.main(["--load", load, "--save", f"{out}/{step}/out", *flags])
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(step)
            break
"""


@pytest.mark.parametrize("flags", [[], ["--copy"], ["--materialize"]])
def test_a_kill_at_any_step_leaves_the_whole_or_nothing_that_loads(run, tmp_path, flags):
    """Nothing: no directory, whatever its name, that has a tracker and is not the whole checkpoint."""
    model, root = run
    command = [sys.executable, "-c", textwrap.dedent(KILLED), TOOL.parent, root, tmp_path / "outs"]
    command += ["--num-heads", "6", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = int(done.stdout.split()[-1])
    assert steps > 12
    expected = looped(model, [0, 1, 2, 0, 1, 2])
    trackers = list((tmp_path / "outs").rglob(TRACKER))
    assert any(tracker.parent.name == "out" for tracker in trackers)
    for tracker in trackers:
        assert_holds(tracker.parent, expected)
    for step in range(1, steps):
        assert not (tmp_path / "outs" / str(step) / "out").exists() or list(
            (tmp_path / "outs" / str(step) / "out").glob(TRACKER)
        )


# --- its price ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse") / "run"
    assert make_sparse_checkpoint(root) >= 8e9
    return root


# The whole process, as a user starts it. Time of its own: on a shared machine the clock tells of the neighbours.
MEASURED = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import loop_extend
    loop_extend.main(sys.argv[2:])
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(time.process_time(), peak.split()[1])
"""


def test_the_size_of_a_checkpoint_costs_nothing(sparse, tmp_path):
    """4 to 16 heads of 8 GB in under 2 s, 2 MB of new bytes and 300 MB of memory. Typical: 0.2 s, 50 kB, 30 MB."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), TOOL.parent, "--load", sparse]
    command += ["--save", tmp_path / "out", "--num-heads", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split()[-2:])
    assert seconds < 2
    assert kilobytes * 1024 < 300e6
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.stat().st_nlink == 1) < 2e6
    assert sum(path.stat().st_size for path in files) > 8e9

    from megatron.core.dist_checkpointing import ShardedTensor, load

    shards = 8  # of which one is loaded, half of a rank's that saved it
    big = "mtp.layers.15.mtp_model_layer.layers.1.weight"
    rows = torch.ones(SHARD[0] // 2, SHARD[1], dtype=torch.bfloat16)
    request = {f"norm{h}": ShardedTensor.from_rank_offsets(f"mtp.layers.{h}.enorm.weight", norm(0)) for h in range(16)}
    request["big"] = ShardedTensor.from_rank_offsets(big, rows, (0, 3, shards))
    loaded = load(request, str(tmp_path / "out" / "release"), validate_access_integrity=False)
    assert all(torch.equal(loaded[f"norm{h}"], norm(h % HEADS)) for h in range(16))
    assert not loaded["big"].any()


def test_a_command_imports_neither_torch_nor_megatron():
    """Importing torch alone takes longer, and more memory, than any of them may."""
    code = """
        import sys
        import megatron_mtpd.checkpoint.extend, megatron_mtpd.checkpoint.inspection, megatron_mtpd.checkpoint.seam
        print([name for name in ("torch", "numpy", "megatron") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_manifest_names_every_file(run, tmp_path):
    extend(make_plan(run[1], 6), tmp_path / "out")
    directory = tmp_path / "out" / "release"
    sizes = json.loads((directory / "integrity.json").read_text())["sizes"]
    assert sizes == {f.name: f.stat().st_size for f in directory.iterdir() if f.name != "integrity.json"}
