"""Devices and amounts of memory as a configuration writes them, and the one form that the planner reads.

A key of `max_memory`, and a device in a custom `device_map`:

    written                       kept as     means
    "0", 0, "cuda:0", "cuda"      "0"         the first accelerator, whatever its kind
    "1", 1, "cuda:1"              "1"         the second one
    "xpu:1" ("xpu" is "xpu:0")    "xpu:1"     the second accelerator, where it is of this kind
    "mps"                         "mps"       Apple's GPU
    "cpu"                         "cpu"       main memory
    "disk"                        "disk"      weights stay in the checkpoint's file

In a custom `device_map` the ordinal is kept as a number (0, not "0"), as Hugging Face writes it.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from lyra_emergence.config.problems import did_you_mean, mismatch, shown
from lyra_emergence.units import parse_bytes, parse_fraction

if TYPE_CHECKING:
    from lyra_emergence.config.problems import Problems

__all__ = [
    "AMOUNT_PATTERN",
    "AUTOMATIC",
    "DEVICE_PATTERN",
    "MAP_PATTERN",
    "SIZE_PATTERN",
    "budget_bytes",
    "check_device_map",
    "check_max_memory",
    "check_size",
    "device_key",
]

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that leave placement to the planner: the last three are transformers' strategies, which it treats as "auto"."""
ACCELERATOR_KINDS = ("cuda", "xpu", "npu", "hpu", "mlu", "musa")
_WITHOUT_ORDINAL = ("cpu", "disk", "mps")
_ORDINAL = "(?:0|[1-9][0-9]{0,2})"
_KINDS = "|".join(ACCELERATOR_KINDS)
DEVICE_PATTERN = f"^(?:{_ORDINAL}|(?:{_KINDS})(?::{_ORDINAL})?|(?:cpu|mps)(?::0)?|disk)$"
MAP_PATTERN = f"^(?:{'|'.join(AUTOMATIC)}|(?:{_KINDS})(?::{_ORDINAL})?|(?:cpu|mps)(?::0)?)$"
AMOUNT_PATTERN = r"^[0-9]+(?:\.[0-9]+)?\s*(?:%|(?:[kKmMgGtT][iI]?)?B)?$"
SIZE_PATTERN = r"^[0-9]+(?:\.[0-9]+)?\s*(?:(?:[kKmMgGtT][iI]?)?B)?$"

_DEVICE = re.compile(f"(?P<kind>[a-z][a-z0-9_]*)(?::(?P<ordinal>{_ORDINAL}))?")
_ORDINAL_ALONE = re.compile(_ORDINAL)
_MODULE_NAME = re.compile(r"[^\s.]+(?:\.[^\s.]+)*")
_LONGEST_AMOUNT = 32
_MOST_BYTES = 2**63 - 1
_DEVICES_TO_WRITE = "'0', 'cuda:0', 'mps', 'cpu' or 'disk'"
_MAPS_TO_WRITE = "'auto', 'cpu', 'cuda:0', 'mps', an object of module names and devices, or null"
_FIRST_GPU = "write 'cpu', or 'cuda:0' for the first GPU"
_KNOWN_SLIPS = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "hip": "cuda",
    "rocm": "cuda",
    "amd": "cuda",
    "metal": "mps",
    "intel": "xpu",
    "ram": "cpu",
    "ssd": "disk",
}


def device_key(device: str | int) -> str:
    """Return the one form of a device's name that `max_memory` uses; the module's docstring has the table.

    Raises:
        ValueError: `device` names no device; the message says what to write.
    """
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise ValueError(mismatch(device, _DEVICES_TO_WRITE))  # noqa: TRY004 - one type for every wrong device
    if isinstance(device, int) or _ORDINAL_ALONE.fullmatch(device):
        return _ordinal_key(int(device))
    match = _DEVICE.fullmatch(device)
    kind, ordinal = (match["kind"], match["ordinal"]) if match else ("", None)
    if kind in _WITHOUT_ORDINAL and (ordinal is None or (ordinal == "0" and kind != "disk")):
        return kind
    if kind in _accelerator_kinds():
        return (ordinal or "0") if kind == "cuda" else f"{kind}:{ordinal or '0'}"
    raise ValueError(f"{shown(device)} is not a device; {_remedy(device) or f'write {_DEVICES_TO_WRITE}'}")


def _ordinal_key(ordinal: int) -> str:
    if ordinal < 0:
        raise ValueError(f"{ordinal} is not a device; {_FIRST_GPU}")
    if not _ORDINAL_ALONE.fullmatch(str(ordinal)):
        raise ValueError(f"{ordinal} is not a device; the ordinals go from 0 to 999")
    return str(ordinal)


def _accelerator_kinds() -> tuple[str, ...]:
    """Return the kinds known here: torch's own, and one that a plug-in registered with a torch already loaded."""
    torch = sys.modules.get("torch")
    registered = getattr(getattr(torch, "_C", None), "_get_privateuse1_backend_name", None)
    return (*ACCELERATOR_KINDS, registered() if registered else "privateuseone")


def _remedy(device: str) -> str | None:
    kind, _, ordinal = device.strip().lower().partition(":")
    if kind.lstrip("-").isdecimal():
        return _FIRST_GPU
    known = (*_accelerator_kinds(), *_WITHOUT_ORDINAL)
    nearest = _KNOWN_SLIPS.get(kind) or did_you_mean(kind, known)
    if nearest is None:
        return None
    if nearest in _WITHOUT_ORDINAL:
        return f"did you mean {nearest!r}?"
    suffix = f":{ordinal}" if _ORDINAL_ALONE.fullmatch(ordinal) else ":0" if ordinal else ""
    return f"did you mean '{nearest}{suffix}'?"


def budget_bytes(value: str | int, total_bytes: int) -> int:
    """Return the bytes that an amount in `max_memory` allows on a device.

    Args:
        value: Bytes, or text such as "6GB" (6e9), "6GiB" (6 * 2**30) or "90%" (of `total_bytes`, rounded down).
        total_bytes: What the device has, in bytes; only a percentage asks for it.

    Raises:
        ValueError: `value` is no amount of memory; the message says what to write.
    """
    if isinstance(value, str):
        if len(value) > _LONGEST_AMOUNT:
            raise ValueError(f"{shown(value)} is not an amount of memory; write '6GB' or '6GiB'")
        fraction = parse_fraction(value)
        if fraction is not None:
            return int(total_bytes * fraction)
    count = parse_bytes(value)
    if count > _MOST_BYTES:
        raise ValueError(f"{shown(value)} is more than any device has; write '6GB' or '90%'")
    return count


def check_max_memory(value: object, at: str, problems: Problems) -> dict[str, str | int] | None:
    """Return `value` with one form of device per key; amounts stay as written, so that saving gives them back."""
    if value is None:
        return None
    if not isinstance(value, dict):
        problems.add(mismatch(value, 'an object such as {"0": "6GB", "cpu": "16GB"}, or null'), at=at)
        return None
    limits: dict[str, str | int] = {}
    written: dict[str, object] = {}
    for device, amount in value.items():
        path = f"{at}.{device}"
        _check_amount(amount, path, problems)
        try:
            key = device_key(device)
        except ValueError as exc:
            problems.add(str(exc), at=path)
            continue
        if key in limits:
            problems.add(f"{shown(device)} and {shown(written[key])} are one device; keep one", at=path)
        limits[key], written[key] = amount, device
    return limits


def _check_amount(amount: object, at: str, problems: Problems) -> None:
    if isinstance(amount, bool) or not isinstance(amount, (str, int)):
        problems.add(mismatch(amount, "an amount of memory, such as '6GB' or '90%'"), at=at)
        return
    try:
        budget_bytes(amount, 0)
    except ValueError as exc:
        problems.add(str(exc), at=at)


def check_size(value: object, at: str, problems: Problems) -> str | int:
    """Return `value`, bytes as a number or with a unit, as it is written."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        problems.add(mismatch(value, "a size, such as '20GB', or 0 for none"), at=at)
        return 0
    if isinstance(value, str) and value.rstrip().endswith("%"):
        problems.add(f"{shown(value)} is a share; write a size such as '20GB', or 0 for none", at=at)
        return 0
    _check_amount(value, at, problems)
    return value


def check_device_map(value: object, at: str, problems: Problems) -> str | dict[str, str | int] | None:
    """Return the placement that `value` asks for: null, "auto", one device, or devices by module name."""
    if value is None:
        return None
    if isinstance(value, str):
        return _check_one_device(value, at, problems)
    if isinstance(value, dict):
        return _check_custom_map(value, at, problems)
    problems.add(mismatch(value, _MAPS_TO_WRITE), at=at)
    return None


def _check_one_device(value: str, at: str, problems: Problems) -> str | None:
    """Check a map of one word; "cuda" stays "cuda": any device of that kind."""
    if value in AUTOMATIC:
        return value
    if value == "disk":
        remedy = "write 'cpu' and limit max_memory.cpu: what exceeds it is read from disk"
        problems.add(f"'disk' holds weights and computes nothing; {remedy}", at=at)
        return None
    if _ORDINAL_ALONE.fullmatch(value):
        problems.add(f"{value!r} is not a device map; did you mean 'cuda:{value}'?", at=at)
        return None
    try:
        key = device_key(value)
    except ValueError:
        near = did_you_mean(value, AUTOMATIC)
        remedy = (f"did you mean {near!r}?" if near else _remedy(value)) or f"write {_MAPS_TO_WRITE}"
        problems.add(f"{shown(value)} is not a device map; {remedy}", at=at)
        return None
    return key if key in _WITHOUT_ORDINAL else value


def _check_custom_map(value: dict[object, object], at: str, problems: Problems) -> dict[str, str | int]:
    placed: dict[str, str | int] = {}
    if not value:
        problems.add("the map names no module; write null or 'auto'", at=at)
    for module, device in value.items():
        path = f"{at}.{module}"
        # The empty name is Hugging Face's for the whole model.
        if not isinstance(module, str) or (module and not _MODULE_NAME.fullmatch(module)):
            problems.add(f"{shown(module)} is not a module name; write one such as 'model.layers.0'", at=path)
            continue
        try:
            key = device_key(device)  # type: ignore[arg-type]  # it checks the type itself
        except ValueError as exc:
            problems.add(str(exc), at=path)
            continue
        placed[module] = int(key) if key.isdecimal() else key
    return placed
