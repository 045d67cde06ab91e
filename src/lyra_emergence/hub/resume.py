"""Large files that go on where an earlier process stopped.

huggingface_hub goes on within one process only and then throws the part away: a Ctrl-C after four of five gigabytes
would cost them all. So a large file is fetched into a part of its own beside its blob, named by its content's mark, and
becomes the blob when it is whole; huggingface_hub then finds it there. Where the mark is a SHA-256, as it is for large
files on the hub, it is compared. Files behind Xet storage are left to huggingface_hub, which keeps their chunks itself.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LEAST_BYTES", "fetch_blob"]

LEAST_BYTES: Final = 16 * 2**20
"""Smaller files are fetched again in seconds."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[\w.\-]+", re.ASCII)


def fetch_blob(repository: Path, model_id: str, file: str, revision: str, meter: Any) -> None:
    """Put the content of one file of a model among the blobs of its `repository` folder in the cache.

    Nothing happens where it is there, or where huggingface_hub does this better.

    Args:
        repository: The model's folder in the cache.
        model_id: The model.
        file: The file's name.
        revision: Its commit.
        meter: What huggingface_hub drives in place of a tqdm bar.

    Raises:
        OSError: The content is not what its mark says, or cannot be written; errors of huggingface_hub and httpx too.
    """
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._fixes import WeakFileLock
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(model_id, file, revision=revision)
    token = False if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token() or False
    found = get_hf_file_metadata(url, token=token)
    if not found.etag or not found.size or not _NAME.fullmatch(found.etag) or found.xet_file_data is not None:
        return
    blob = repository / "blobs" / found.etag
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers(token=token)
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # another host must not see the token
    part = blob.with_name(f"{found.etag}.lyra-part")
    # Two processes must not write to one part; the second one finds the blob.
    with WeakFileLock(f"{part}.lock"):
        if not blob.exists():
            with part.open("ab") as stream:
                so_far = stream.tell()
            if so_far > found.size:
                part.unlink()
                so_far = 0
            with part.open("r+b" if so_far else "wb") as stream:
                stream.seek(so_far)
                http_get(
                    found.location,
                    stream,
                    resume_size=so_far,
                    headers=headers,
                    expected_size=found.size,
                    tqdm_class=meter,
                )
            _check(part, found.etag, file)
            part.replace(blob)
    part.with_name(f"{part.name}.lock").unlink(missing_ok=True)


def _check(part: Path, mark: str, file: str) -> None:
    """Remove a part whose content is not what its mark says."""
    if not _SHA256.fullmatch(mark):
        return
    with part.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != mark:
        part.unlink()
        raise OSError(f"{file} arrived damaged: its SHA-256 is not the one that the hub names")
