"""Files that appear together, whole, or not at all.

Inside the `with` block each target is written under another name beside it. At the end of the block all of
them are flushed to disk and renamed, in the order given: name the file that makes the others readable last.
If the block raises, they are deleted; if the process is killed, they stay under their other names, which
nothing reads. The names hold host and process, so two runs that write the same target cannot mix their bytes.

Existing targets are refused, unless `force`: then they are deleted, last one first, right before the
renaming, so that no mixture of old and new is ever readable.
"""

import glob
import os
import socket
from types import TracebackType
from typing import Self


class WholeFiles:
    """Raises ValueError if a target exists (and not `force`), at construction and again before renaming."""

    def __init__(self, *targets: str, force: bool = False) -> None:
        self.targets, self._force = targets, force
        if os.path.basename(targets[0]).startswith("."):
            raise ValueError(f"--output-prefix {os.path.dirname(targets[0])}/: give a name after the folder")
        self._mark = f".partial-{socket.gethostname()}-{os.getpid()}"
        self._refuse_existing()
        os.makedirs(os.path.dirname(os.path.abspath(targets[0])), exist_ok=True)

    def partial(self, target: str) -> str:
        """The name under which `target` is to be written."""
        assert target in self.targets, f"{target} was not announced"
        return target + self._mark

    def leftovers(self) -> list[str]:
        """Partial files of other runs: killed, or still running."""
        found = [path for target in self.targets for path in glob.glob(glob.escape(target) + ".partial-*")]
        return sorted(path for path in found if not path.endswith(self._mark))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for target in self.targets:
                if os.path.exists(self.partial(target)):
                    os.remove(self.partial(target))

    def _publish(self) -> None:
        for target in self.targets:
            _flush_to_disk(self.partial(target))
        self._refuse_existing()
        for target in reversed(self.targets):
            if os.path.exists(target):
                os.remove(target)
        for target in self.targets:
            os.rename(self.partial(target), target)
        _flush_to_disk(os.path.dirname(os.path.abspath(self.targets[0])))

    def _refuse_existing(self) -> None:
        existing = [target for target in self.targets if os.path.exists(target)]
        if existing and not self._force:
            raise ValueError(f"{', '.join(existing)} exists; choose another --output-prefix, or --force to replace it")


def _flush_to_disk(path: str) -> None:
    """fsync a file, or a folder (the names in it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
