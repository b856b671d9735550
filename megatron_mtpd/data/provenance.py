"""Versions of the packages that shape tokens and files, for the record written beside every output."""

import importlib.metadata

PACKAGES = ("megatron-mtpd", "megatron-core", "sentencepiece", "tokenizers", "transformers")


def versions() -> dict[str, str]:
    """Installed version of each of PACKAGES that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
