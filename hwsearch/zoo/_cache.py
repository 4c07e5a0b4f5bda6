"""Where downloaded tasks live, and what to say when they do not."""

from __future__ import annotations

from pathlib import Path

from hwsearch.device import fingerprint as device
from hwsearch.errors import InvalidInput


def cache_dir(name: str) -> Path:
    """`$HWSEARCH_CACHE/zoo/NAME`, by default `~/.cache/hwsearch/zoo/NAME`; it need not exist."""
    return device.cache_dir() / "zoo" / name


def cached(name: str, *files: str) -> list[Path]:
    """Paths of a task's cached files; InvalidInput, naming the command that makes them, if one is absent."""
    paths = [cache_dir(name) / file for file in files]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InvalidInput(
            f"zoo:{name} has not been fetched: {', '.join(missing)} not found in {cache_dir(name)}; "
            f"run `scripts/fetch_zoo {name}` once, or set HWSEARCH_CACHE to where it was fetched"
        )
    return paths


def fetched(name: str, *files: str) -> bool:
    """Whether a task's files are in the cache."""
    return all((cache_dir(name) / file).is_file() for file in files)
