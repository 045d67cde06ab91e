"""Where a model id leads: a folder, the Hugging Face cache, or the hub.

`find_local` never touches the network, `look_up` asks the hub once within a time limit, and `download` fetches what
`look_up` found. Only `download` writes, and only to the Hugging Face cache (HF_HOME, HF_HUB_CACHE).

A download that breaks off goes on where it stopped, while this process tries again, which huggingface_hub does five
times without progress, and in a new process too (`resume`), but for files below 16 MiB and those behind Xet storage.
"""

from __future__ import annotations

import queue
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from lyra_emergence.bundled import BUNDLED_ID, bundled_directory
from lyra_emergence.cache_files import replace_whole
from lyra_emergence.checkpoint import CONFIG_FILE
from lyra_emergence.checkpoint.json_files import read_object, shown
from lyra_emergence.errors import CheckpointError, ModelUnavailableError
from lyra_emergence.hub.errors import UNREACHABLE_HINT, gated, offline, unavailable
from lyra_emergence.hub.files import has_weights, is_vocabulary, select_files
from lyra_emergence.hub.resume import LEAST_BYTES, fetch_blob
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RemoteModel", "download", "find_local", "free_disk", "locate", "look_up"]

_ID = re.compile(r"(?:[A-Za-z0-9_][\w.\-]{0,95}/)?[A-Za-z0-9_][\w.\-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w.\-]+(?:/[\w.\-]+)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_LISTING_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model on the hub that can be loaded once it is downloaded.

    Attributes:
        model_id: Its id.
        revision: The commit that was looked up.
        files: Names of the files that a load needs, the weights last.
        nbytes: Bytes of these files.
        reference: The branch or tag that led to the commit; the cache remembers it for later look-ups.
        sizes: Bytes of each of `files`, as the hub lists them.
    """

    model_id: str
    revision: str
    files: tuple[str, ...]
    nbytes: int
    reference: str = "main"
    sizes: tuple[int, ...] = ()


def find_local(model_id: str, *, revision: str | None = None) -> Path | None:
    """Return the folder of a model that is on this machine, or None. The network is never asked.

    Args:
        model_id: A folder (absolute, relative or from ~), the bundled model's id, or a hub id (`name` or `owner/name`)
            that may have a complete snapshot in the Hugging Face cache.
        revision: Branch, tag or commit of a cached snapshot; "main" by default.

    Raises:
        ModelUnavailableError: `model_id` is a path to nothing or to a file, or no id that the hub could have.
    """
    if model_id == BUNDLED_ID:
        return bundled_directory()
    folder = _expanded(model_id)
    if folder is not None and folder.is_dir():
        return folder
    if folder is not None and folder.exists():
        raise ModelUnavailableError(f"{folder} is a file", hint=f"give the folder that holds {CONFIG_FILE}")
    _check_id(model_id)
    return _cached(model_id, revision or "main")


def look_up(model_id: str, *, revision: str | None = None, timeout: float = 3.0) -> RemoteModel:
    """Ask the hub which files loading `model_id` needs, with one request.

    Args:
        model_id: A hub id, `name` or `owner/name`.
        revision: Branch, tag or commit; the default branch where None.
        timeout: Seconds until the hub counts as unreachable, all told: name resolution, connection and answer.

    Raises:
        ModelUnavailableError: The hub is unreachable, forbidden (HF_HUB_OFFLINE), failing or out of patience, or has no
            such model, or one that is gated or has no safetensors weights. The hint says what to do.
    """
    _check_id(model_id)
    from huggingface_hub import constants

    # Before what asks the network is imported: that takes half a second of a chat's start.
    if constants.is_offline_mode():
        raise offline(model_id)
    import httpx
    from huggingface_hub import get_session, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    get_session()  # its import takes a while, which is no fault of the hub
    try:
        listing = within(timeout, lambda: _ask(model_id, revision, token, timeout))
    except (TimeoutError, httpx.TimeoutException):
        raise ModelUnavailableError(
            f"{model_id} is not on this machine, and {constants.ENDPOINT} did not answer within {timeout:g} s",
            hint=UNREACHABLE_HINT,
        ) from None
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise unavailable(model_id, error) from error
    # The hub lists a gated model's files to everyone; only the download would be refused.
    if listing.gated and token is None:
        raise gated(model_id)
    return _remote(model_id, revision, listing)


def locate(model_id: str) -> Path:
    """Return the folder of a model that a caller named, fetching it where it is not on this machine.

    Raises:
        ModelUnavailableError: It is neither here nor to be had.
    """
    return find_local(model_id) or download(look_up(model_id))


def download(remote: RemoteModel, *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Fetch the files of `remote` into the Hugging Face cache and return their folder.

    Args:
        remote: What `look_up` returned.
        progress: Called with a file's name, its bytes so far and its bytes in all, as they arrive and once at its end.

    Raises:
        ModelUnavailableError: Access is refused, the connection broke, or the disk is full. What is complete is kept.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise offline(remote.model_id)
    _check_room(remote)
    folder = None
    for file in remote.files:
        path = _fetch(remote, file, progress)
        folder = path.parents[file.count("/")]
        if progress is not None:
            size = path.stat().st_size
            progress(file, size, size)
    if folder is None:
        raise ModelUnavailableError(f"{remote.model_id} has no files to download")
    _remember(remote)
    return folder


def _expanded(model_id: str) -> Path | None:
    """Return the path that `model_id` may be, or None for one that no file system has."""
    if not model_id or "\0" in model_id:
        return None
    try:
        return Path(model_id).expanduser()
    except RuntimeError:  # ~ of an unknown user
        return Path(model_id)


def _check_id(model_id: str) -> None:
    if model_id.startswith((".", "~")) or Path(model_id).is_absolute() or "\\" in model_id or model_id.endswith("/"):
        raise ModelUnavailableError(
            f"{shown(model_id)} looks like a path, and there is no such folder",
            hint=f"give the folder that holds {CONFIG_FILE}, or a hub id such as owner/name",
        )
    name = model_id.rpartition("/")[2]
    if _ID.fullmatch(model_id) is None or "--" in model_id or ".." in model_id or name.endswith((".git", "-", ".")):
        raise ModelUnavailableError(
            f"{shown(model_id)} is neither a folder nor a hub id", hint="a hub id is written name or owner/name"
        )


def _repository(model_id: str) -> Path:
    """Return the model's folder in the cache; there need be none."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}"


def _cached(model_id: str, revision: str) -> Path | None:
    if _REVISION.fullmatch(revision) is None or ".." in revision:
        raise ModelUnavailableError(f"{shown(revision)} is no revision", hint="give a branch, a tag or a commit")
    repository = _repository(model_id)
    commit = _commit(repository / "refs" / revision) or revision
    snapshot = repository / "snapshots" / commit
    complete = (snapshot / CONFIG_FILE).is_file() and has_weights(snapshot) and _has_tokenizer(repository, snapshot)
    return snapshot if complete else None


def _commit(reference: Path) -> str | None:
    try:
        with reference.open(encoding="ascii") as stream:
            text = stream.read(64).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"\w+", text, re.ASCII) else None


def _has_tokenizer(repository: Path, snapshot: Path) -> bool:
    """Return whether the snapshot has a tokenizer, or its repository is known to have none."""
    if any(is_vocabulary(path.name) and path.exists() for path in snapshot.iterdir()):
        return True
    # Both are records of huggingface_hub: files that were asked for in vain, and a commit's list of files.
    if (repository / ".no_exist" / snapshot.name / "tokenizer_config.json").exists():
        return True
    try:
        listing = read_object(
            repository / "trees" / f"{snapshot.name}.json", limit=_MAX_LISTING_BYTES, strict=False
        ).get("files")
    except CheckpointError:
        return False
    return isinstance(listing, dict) and not any(is_vocabulary(name) for name in listing)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns, or raise TimeoutError once `seconds` have passed.

    httpx limits each step alone, and the resolution of names not at all. The thread that was too slow is left behind.
    """
    box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - it is raised again where it was called
            box.put((None, error))

    threading.Thread(target=run, daemon=True, name="lyra-hub").start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value


@dataclass(frozen=True, slots=True)
class _Listing:
    commit: str
    gated: bool
    sizes: dict[str, int]


def _ask(model_id: str, revision: str | None, token: str | None, timeout: float) -> _Listing:
    """Return the hub's listing of a model.

    Asked directly: huggingface_hub's own method first fetches a list of AI agents for its telemetry, a second request.
    """
    from huggingface_hub import constants, get_session, hf_raise_for_status

    where = f"/revision/{quote(revision, safe='')}" if revision else ""
    headers = {"user-agent": "lyra-emergence"} | ({"authorization": f"Bearer {token}"} if token else {})
    url = f"{constants.ENDPOINT}/api/models/{model_id}{where}"
    response = get_session().get(url, params={"blobs": True}, headers=headers, timeout=timeout)
    hf_raise_for_status(response)
    return _parse_listing(response.json())


def _parse_listing(answer: Any) -> _Listing:
    """Return what is needed of the hub's answer; raise ValueError where it has another form."""
    try:
        sizes = {str(file["rfilename"]): int(file.get("size") or 0) for file in answer["siblings"]}
        return _Listing(str(answer["sha"]), bool(answer.get("gated")), sizes)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("no listing of a model") from error


def _remote(model_id: str, revision: str | None, listing: _Listing) -> RemoteModel:
    sizes = listing.sizes
    files = select_files(sizes)
    if not files:
        raise ModelUnavailableError(
            f"{model_id} has no safetensors weights in transformers' form{_holds(sizes)}",
            hint="choose a model with model.safetensors, or convert it: "
            "AutoModelForCausalLM.from_pretrained(id).save_pretrained(folder)",
        )
    if CONFIG_FILE not in files:
        raise ModelUnavailableError(f"{model_id} has no {CONFIG_FILE}", hint="choose another model")
    listed = tuple(sizes[file] for file in files)
    return RemoteModel(model_id, listing.commit, files, sum(listed), revision or "main", listed)


def _holds(files: dict[str, int]) -> str:
    others = sorted(name for name in files if name.endswith((".bin", ".gguf", ".safetensors", ".pt", ".pth", ".onnx")))
    return f", only {others[0]}" if others else ""


def _check_room(remote: RemoteModel) -> None:
    from huggingface_hub import constants

    snapshot = _repository(remote.model_id) / "snapshots" / remote.revision
    here = sum(path.stat().st_size for file in remote.files if (path := snapshot / file).is_file())
    parts = (_repository(remote.model_id) / "blobs").glob("*.lyra-part")
    needed = max(0, remote.nbytes - here - sum(path.stat().st_size for path in parts))
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = free_disk()
    if needed > free:
        raise ModelUnavailableError(
            f"{remote.model_id} needs {format_bytes(needed)}, and the disk of {cache} has {format_bytes(free)} free",
            hint="free some space, or set HF_HOME to a folder on a larger disk",
        )


def free_disk() -> int:
    """Return the bytes that are free where downloads go."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _fetch(remote: RemoteModel, file: str, progress: Callable[[str, int, int], None] | None) -> Path:
    import httpx
    from huggingface_hub import hf_hub_download

    meter = _meter(file, progress)
    large = dict(zip(remote.files, remote.sizes, strict=False)).get(file, 0) >= LEAST_BYTES
    snapshot = _repository(remote.model_id) / "snapshots" / remote.revision
    try:
        if large and not (snapshot / file).exists():
            fetch_blob(_repository(remote.model_id), remote.model_id, file, remote.revision, meter)
        path = hf_hub_download(remote.model_id, file, revision=remote.revision, tqdm_class=meter)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        # ValueError: a name that huggingface_hub refuses. RuntimeError: what hf_xet raises for its own connections.
        raise unavailable(remote.model_id, error, file=file) from error
    return Path(path)


def _meter(file: str, progress: Callable[[str, int, int], None] | None) -> Any:
    """Return what huggingface_hub drives in place of a tqdm bar: it reports instead of drawing."""

    class Meter:
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any) -> None:
            self.n = initial
            self.total = total

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            if progress is not None:
                progress(file, self.n, self.total or self.n)

        # Having this marks a meter of whole files: bytes on the wire, fewer after deduplication, are then not mixed in.
        def update_transfer(self, count: float | None = 1) -> None:
            """Ignore bytes on the wire."""

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            """Ignore speeds: whoever shows the progress computes its own."""

        set_transfer_postfix_str = set_postfix_str

        def refresh(self) -> None:
            """Draw nothing."""

        close = refresh

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    return Meter


def _remember(remote: RemoteModel) -> None:
    """Record which commit the reference led to, once all of it is there: an id without a commit then finds it."""
    if remote.reference == remote.revision or not _COMMIT.fullmatch(remote.revision):
        return
    # Without it the next look-up asks the hub again and finds everything here: no reason to refuse the model.
    replace_whole(_repository(remote.model_id) / "refs" / remote.reference, remote.revision)
