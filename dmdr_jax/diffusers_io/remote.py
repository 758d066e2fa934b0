"""Folders behind a URL, such as ``gs://bucket/model``: copied, as far as they are needed, into a cache on this machine.

Any protocol of fsspec works for which its package is installed. A file that was copied once is not copied again while
the one behind the URL stays the same; a copy that was interrupted is taken up at the file where it stopped.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmdr_jax.errors import UserError

CACHE_VARIABLE = "DMDR_CACHE"
"""Environment variable with the folder for copies; ``~/.cache/dmdr_jax`` by default."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}
_PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "hdfs": "pyarrow", "oci": "ocifs", "r2": "s3fs"}
_KNOWN = ".known.json"
_CHUNK = 1 << 24


def is_url(name: str) -> bool:
    """Whether a model's name is a URL."""
    return _URL.fullmatch(name) is not None


def fetch(url: str, patterns: Iterable[str]) -> Path:
    """Copies the files of a folder that match a pattern into the cache.

    Args:
      url: of the folder.
      patterns: as of `fnmatch`, for paths below the folder; one that matches nothing is no error.

    Returns:
      The folder on this machine; it holds what earlier calls copied as well.

    Raises:
      UserError: the protocol is unknown, its package is absent, or the place cannot be read.
    """
    files, root = _filesystem(url)
    folder = _cache_folder(url)
    try:
        # A listing of before another call may be out of date.
        files.invalidate_cache()
        found = {path: info for path, info in files.find(root, detail=True).items() if info["type"] == "file"}
        names = {path: path[len(root) :].lstrip("/") for path in found}
        wanted = [path for path in found if any(fnmatch.fnmatchcase(names[path], pattern) for pattern in patterns)]
        _copy(files, {path: folder / names[path] for path in wanted}, url)
    # Each protocol's package raises classes of its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{url} cannot be read ({type(error).__name__}: {reason}); check the address and your credentials."
        ) from error
    if not found:
        raise UserError(f"{url} does not exist, or is empty; check the address.")
    return folder


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it."""
    protocol = url.split("://", 1)[0]
    try:
        import fsspec

        return fsspec.core.url_to_fs(url.rstrip("/"))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        mend = f"pip install {package}" if package else " ".join(str(error).split())
        raise UserError(f"{url} needs a package for {protocol}:// that is not installed: {mend}.") from error
    except ValueError as error:
        raise UserError(f"{url}: {protocol}:// is not a protocol that fsspec knows ({error}).") from error
    # Credentials are looked for on opening, by each package in its own way.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{url} cannot be opened ({reason}); check your credentials.") from error


def _cache_folder(url: str) -> Path:
    """Where the copies of a URL lie."""
    root = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/dmdr_jax").expanduser()
    place = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return root / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{place}"


def _copy(files: Any, targets: dict[str, Path], url: str) -> None:
    """Copies what is not here yet, or has changed, behind a progress bar."""
    known = _known(_cache_folder(url))
    # fsspec's key of a file changes with its size, time or checksum.
    keys = {path: files.ukey(path) for path in targets}
    stale = [p for p, target in targets.items() if known.get(str(target)) != keys[p] or not target.is_file()]
    if not stale:
        return
    from tqdm import tqdm

    total = sum(files.size(path) or 0 for path in stale)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"copying {url}") as bar:
        for path in stale:
            _copy_file(files, path, targets[path], bar)
            known[str(targets[path])] = keys[path]
            _replace(_cache_folder(url) / _KNOWN, json.dumps(known, indent=1).encode())


def _copy_file(files: Any, path: str, target: Path, bar: Any) -> None:
    """One file, complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with files.open(path, "rb") as source, open(part, "wb") as copy:
            while chunk := source.read(_CHUNK):
                copy.write(chunk)
                bar.update(len(chunk))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _known(folder: Path) -> dict[str, str]:
    """fsspec's key of each file when it was copied."""
    try:
        known = json.loads((folder / _KNOWN).read_text())
    except (OSError, ValueError):
        return {}  # all is copied again
    return known if isinstance(known, dict) else {}


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, file)
