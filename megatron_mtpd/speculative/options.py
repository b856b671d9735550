"""What the options of the tools here have in common."""

from __future__ import annotations


def require_at_least(options: object, **least: int) -> None:
    """Raises ValueError for a field that is below its least value, naming its flag. A field that is None is not set."""
    for name, smallest in least.items():
        if (value := getattr(options, name)) is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: give at least {smallest}.")
