"""The house rules, read from the syntax trees: who imports what, who may patch, how long a tool may be.

The table is a whitelist, so a new arrow is an edit here, made on purpose. What it keeps true in particular:
`losses` knows nothing of Megatron, `checkpoint` needs no model, `speculative` never trains, and arrows go one
way.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_mtpd"


class May(NamedTuple):
    rooms: str  # of this package
    libraries: str  # beside the standard library


# A room is a module or a folder; the longest name that fits a file decides. A room may always import itself.
RULES = {
    "": May("", ""),  # megatron_mtpd/__init__.py
    "config": May("", ""),
    "layer_pattern": May("", ""),
    "checkpoint": May("config", "torch numpy megatron.core.dist_checkpointing safetensors transformers gguf tqdm"),
    "platform": May("checkpoint", "torch megatron.core megatron.training psutil"),
    "provenance": May("", "torch"),
    "losses.vocab_parallel": May("", "torch"),
    "losses.objectives": May("config losses.vocab_parallel", "torch"),
    "losses": May("config", "torch triton"),
    "specs": May("config platform", "torch megatron.core"),
    "model": May(
        "config platform losses specs",
        "torch megatron.core megatron.training.argument_utils megatron.training.models megatron.training.vocab_utils",
    ),
    "data.datasets": May("config platform", "torch numpy megatron.core megatron.training"),
    "data": May("config provenance", "torch numpy megatron.core.datasets sentencepiece transformers tqdm"),
    "training": May(
        "config layer_pattern platform provenance losses specs model data checkpoint",
        "torch numpy megatron.core megatron.training tensorboard matplotlib tqdm deepspeed",
    ),
    "planning": May("config layer_pattern losses training", "megatron.training"),
    "speculative": May(
        "config layer_pattern platform provenance losses specs model data checkpoint",
        "torch numpy megatron.core megatron.training sentencepiece transformers tensorboard matplotlib tqdm",
    ),
}
ONLY_PATCHER = "platform"
LONGEST_TOOL = 60


def within(name: str, container: str) -> bool:
    return name == container or name.startswith(container + ".")


def room_of(module: str) -> str:
    """The row of the table for a module named without the package, `losses.fused` for example."""
    rooms = [room for room in RULES if room and within(module, room)]
    return max(rooms, key=len) if rooms else ""


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` gives a.b, because b may be a module."""
    parents = [PACKAGE, *filter(None, module.split("."))]
    here = parents if is_package else parents[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """`line: import` of all that the table does not grant to this module."""
    room = room_of(module)
    may = RULES[room]
    allowed_rooms = [room, *may.rooms.split()] if room else may.rooms.split()
    allowed = [f"{PACKAGE}.{name}" for name in ("__version__", *allowed_rooms)] + may.libraries.split()
    found = []
    for line, name in imports(ast.parse(source), module, is_package):
        standard = name.split(".")[0] in sys.stdlib_module_names
        if not standard and not any(within(name, prefix) for prefix in allowed):
            found.append(f"{line}: {name}")
    return found


def root_name(node: ast.expr) -> str | None:
    """`torch` of torch.cuda.synchronize; None where the expression does not start with a name."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(source: str) -> list[str]:
    """`line: target` of what sets or deletes an attribute of anything imported from torch or megatron."""
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            origins = [(node.module or "", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        foreign |= {name for origin, name in origins if origin.split(".")[0] in ("torch", "megatron")}

    found = []
    for node in ast.walk(tree):
        target: ast.expr | None = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            target = node.args[0]
        if target is not None and root_name(target) in foreign:
            found.append(f"{target.lineno}: {ast.unparse(target)}")
    return found


def package_files() -> list[tuple[Path, str]]:
    """Every file of the package with its module name inside it: losses/fused.py is `losses.fused`."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert files, "the package is not where this test looks for it"
    modules = [path.relative_to(ROOT / PACKAGE).with_suffix("").parts for path in files]
    return [
        (path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        for path, parts in zip(files, modules, strict=True)
    ]


def test_every_module_has_a_row_in_the_table() -> None:
    strangers = [module for _, module in package_files() if module and not room_of(module)]
    assert strangers == []


def test_every_room_imports_only_what_the_table_grants() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, module in package_files()
        for line in forbidden_imports(path.read_text(), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_the_arrows_of_the_table_go_one_way() -> None:
    """Rows stand in order: no room may import one that is written below it."""
    order = list(RULES)
    for room, may in RULES.items():
        for other in may.rooms.split():
            assert order.index(other) < order.index(room), f"{room} -> {other}"


def test_only_the_platform_room_patches() -> None:
    package = [path for path, module in package_files() if module != ONLY_PATCHER]
    commands = [path for folder in ("tools", "examples", "slurm") for path in (ROOT / folder).rglob("*.py")]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in [*package, *commands] for line in patches(path.read_text())]
    assert not found, "\n".join(found)


def test_tools_are_short() -> None:
    tools = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tools").glob("*.py")}
    assert tools
    assert {name: lines for name, lines in tools.items() if lines > LONGEST_TOOL} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.fused", "from megatron.core import parallel_state"),
        ("losses.vocab_parallel", "from megatron_mtpd.losses import objectives"),
        ("losses.objectives", "from .fused import loss"),
        ("losses.objectives", "def f():\n    import megatron_mtpd.losses.fused"),
        ("config", "import torch"),
        ("checkpoint.extend", "from ..model import MTPDModel"),
        ("checkpoint.extend", "from megatron.core import parallel_state"),
        ("speculative.decode", "from megatron_mtpd import training"),
        ("model", "from . import training"),
        ("model", "from megatron.training import get_args"),
        ("data.text", "import megatron_mtpd.training.arguments"),
        ("training.metrics", "from megatron_mtpd.speculative import decoder"),
        ("new_room", "import torch"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str) -> None:
    assert len(forbidden_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("losses.objectives", False, "from megatron_mtpd.losses.vocab_parallel import log_softmax"),
        ("losses.objectives", False, "from . import vocab_parallel"),
        ("losses", True, "from .fused import loss"),
        ("training.pretrain", False, "from .. import platform\nfrom ..model import MTPDModel\nimport json"),
        ("checkpoint.extend", False, "from megatron.core.dist_checkpointing import load"),
    ],
)
def test_a_right_arrow_is_let_through(module: str, is_package: bool, source: str) -> None:
    assert forbidden_imports(source, module, is_package) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.cuda.synchronize = print", ["2: torch.cuda.synchronize"]),
        ("import torch.nn as n\nn.Module.cuda = print", ["2: n.Module.cuda"]),
        ("from megatron.core.models.hybrid import hybrid_block as b\nb.TENorm = 1", ["2: b.TENorm"]),
        ("from torch import Tensor\nsetattr(Tensor, 'cuda', print)", ["2: Tensor"]),
        ("import torch\ndel torch.compile", ["2: torch.compile"]),
        ("import torch\na, torch.compile = 1, 2", ["2: torch.compile"]),
        ("import torch\nmodel = torch.nn.Linear(1, 1)\nmodel.weight.mark = 1", []),
        ("import torch\nclass A(torch.nn.Module):\n    def f(self):\n        self.x = torch.ones(1)", []),
    ],
)
def test_a_patch_is_seen(source: str, expected: list[str]) -> None:
    assert patches(source) == expected
