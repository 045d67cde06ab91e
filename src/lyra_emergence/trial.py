"""A trial forward: what caches and temporaries a model takes, counted without weights or computing.

The model is built on torch's meta device, where tensors have shapes and no data, and run as generation runs it: all of
the prompt but its last chunk, the last chunk, then two single tokens. Every operator's results are counted as long as
they live. Fused attention is counted as its kernels work: no matrix of scores, but the mask in the queries' dtype.

The count is that of a device that runs the operators one by one as transformers calls them, to the byte. It needs
torch, builds the whole model's modules, and takes a second or several; results are kept in the user's cache folder.

Covered: what transformers builds from a config.json. Not covered: code that comes with a checkpoint, unless the user
trusts it; models whose forward pass looks at the data (their trial fails, and the estimate stands); quantized layers,
whose workspace is added by formula to the fullest moment of a projection.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lyra_emergence.activations import Activations
from lyra_emergence.cache_files import cache_path, replace_whole

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex

__all__ = ["Trial", "find_trial"]

JSON_FORMAT = "lyra.trials/4"
_KEPT = 200
"""Results that the cache holds at most; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial forward took.

    Attributes:
        kv_cache: Bytes of each layer's cache or recurrent state at their most, by layer number.
        activations: Bytes of temporaries at their most, beside the caches.
        whole: Whether a prompt runs whole, as a recurrent state takes it.
        products: Shapes of products of several matrices below float32, as attention that is written out makes them.
        growing: Whether some of them change with every token.
    """

    kv_cache: tuple[int, ...]
    activations: Activations
    whole: bool = False
    products: int = 0
    growing: bool = False


def find_trial(
    index: CheckpointIndex, *, context: int, batch: int, dtype: str, chunk: int, trust_remote_code: bool = False
) -> tuple[Trial | None, str]:
    """Return the result of a trial forward, from the cache or run now, or None with the reason.

    Args:
        index: The checkpoint; only its config.json is looked at.
        context: Tokens of prompt and answer together.
        batch: Sequences that run together.
        dtype: torch's name of the dtype to compute in.
        chunk: Tokens of a prompt that run at once, where the model can take them so.
        trust_remote_code: Whether code that comes with the checkpoint may run.
    """
    path = cache_path("trials.json")
    key = _key(index, (context, batch, dtype, chunk, trust_remote_code))
    kept = _read(path)
    if key in kept:
        return kept[key], ""
    from lyra_emergence.runtime.trial_forward import UntriedError, run_trial

    try:
        trial = run_trial(index, context, batch, dtype, chunk, trust_remote_code=trust_remote_code)
    except UntriedError as error:
        return None, str(error)
    _write(path, {**kept, key: trial})
    return trial, ""


def _key(index: CheckpointIndex, asked: tuple[Any, ...]) -> str:
    versions = [metadata.version(package) for package in ("torch", "transformers")]
    said = json.dumps([index.config, asked, versions], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _read(path: Path) -> dict[str, Trial]:
    """Return what the cache holds; nothing where it is absent, damaged or of another form."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != JSON_FORMAT:
            return {}
        return {
            key: Trial(
                tuple(map(int, one["kv_cache"])),
                Activations(**one["activations"]),
                whole=bool(one["whole"]),
                products=int(one["products"]),
                growing=bool(one["growing"]),
            )
            for key, one in held["trials"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write(path: Path, trials: dict[str, Trial]) -> None:
    """Keep the latest results."""
    latest = dict(list(trials.items())[-_KEPT:])
    held = {"format": JSON_FORMAT, "trials": {key: asdict(trial) for key, trial in latest.items()}}
    replace_whole(path, json.dumps(held))
