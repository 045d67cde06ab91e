"""`CheckpointIndex`: what a checkpoint folder holds, from config.json and safetensors headers alone.

Covered: `model.safetensors`, shards under `model.safetensors.index.json`, and the file that config.json names as
`transformers_weights`, in that order of precedence of transformers 5: an explicit name first. Refused with the remedy:
pickled weights (`.bin`, `.pt`: reading them can run code), GGUF, adapters. Tensor data is never read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from lyra_emergence.bundled import BUNDLED_ID, bundled_directory
from lyra_emergence.checkpoint.architecture import context_length, language_config
from lyra_emergence.checkpoint.blocks import Block, find_blocks
from lyra_emergence.checkpoint.consistency import check_kind, check_sizes
from lyra_emergence.checkpoint.files import CheckpointFiles, FolderFiles
from lyra_emergence.checkpoint.json_files import DAMAGED, read_object, shown
from lyra_emergence.checkpoint.safetensors_header import TensorInfo
from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "Block",
    "CheckpointIndex",
    "TensorInfo",
    "read_checkpoint",
    "read_files",
    "read_weight_map",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_CACHED = "models--"
"""What the Hugging Face cache puts before a repository's name, whose "/" it writes as "--"."""

# Real files have kilobytes (config.json) and at most about 20 MB (the index of a large mixture of experts).
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """A checkpoint on disk.

    Attributes:
        directory: Its folder.
        config: config.json.
        tensors: Every stored tensor by its name; also a head's copy that `blocks` leaves out because it is tied.
        blocks: The parts that are placed one by one, in execution order.
        weight_format: How the weights are stored. "bin" is never read; `read_checkpoint` refuses it.
        label: What a person calls it, where that is not told by its folder.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    blocks: tuple[Block, ...]
    weight_format: Literal["safetensors", "bin"] = "safetensors"
    label: str = ""

    @property
    def name(self) -> str:
        """What a person calls it: its hub id where it stands in a Hugging Face cache, else its folder's name."""
        if self.label:
            return self.label
        repository = self.directory.parent.parent.name
        if self.directory.parent.name == "snapshots" and repository.startswith(_CACHED):
            return repository.removeprefix(_CACHED).replace("--", "/")
        return BUNDLED_ID if self.directory == bundled_directory() else self.directory.name

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks as stored, tied weights counted once."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def layers(self) -> tuple[Block, ...]:
        """The repeated blocks, by their number; without their experts, which are blocks of their own."""
        return tuple(block for block in self.blocks if block.kind == "layer")

    @property
    def model_type(self) -> str:
        """The architecture's short name, such as "llama"; "" where config.json has none."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, such as "LlamaForCausalLM"; "" where it names none."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def dtype(self) -> str:
        """The stored dtype that most bytes have, such as "BF16"."""
        held: Counter[str] = Counter()
        for tensor in self.tensors.values():
            held[tensor.dtype] += tensor.nbytes
        return max(held, key=lambda dtype: (held[dtype], dtype))

    @property
    def context_length(self) -> int | None:
        """The longest sequence in tokens that the model was made for; None where config.json does not say."""
        return context_length(self.config)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of config.json; all of it for a model of text alone."""
        return language_config(self.config)


def read_checkpoint(directory: Path) -> CheckpointIndex:
    """Return what the checkpoint in `directory` holds.

    Time and memory are linear in the number of tensors; their data is not touched.

    Raises:
        CheckpointError: The folder is no checkpoint that Lyra reads, or its files contradict their format, one
            another or config.json. The message names the file and, where one is to blame, the tensor.
    """
    try:
        return _read(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error


def _read(directory: Path) -> CheckpointIndex:
    if not directory.is_dir():
        what = "is a file, not a folder" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}", hint=f"give the folder that holds {CONFIG_FILE}")
    return read_files(FolderFiles(directory), directory)


def read_files(files: CheckpointFiles, directory: Path, label: str = "") -> CheckpointIndex:
    """Return what the checkpoint made of `files` holds.

    Args:
        files: Where to read from.
        directory: The index's `directory`.
        label: The index's `label`.

    Raises:
        CheckpointError: As `read_checkpoint`.
    """
    if not files.exists(CONFIG_FILE):
        raise _not_a_checkpoint(files, f"has no {CONFIG_FILE}")
    config = files.read_object(CONFIG_FILE, limit=_MAX_CONFIG_BYTES, strict=False)
    check_kind(config, files.where())
    tensors = _read_tensors(files, config)
    if not tensors:
        raise CheckpointError(f"{files.where()}: the weights hold no tensor", hint=DAMAGED)
    blocks = find_blocks(tensors, config, files.where())
    check_sizes(tensors, blocks, config, files.where())
    return CheckpointIndex(directory, config, tensors, blocks, label=label)


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the shard of each tensor, from the index of a sharded checkpoint.

    Raises:
        CheckpointError: The index is malformed, or names a file outside of its folder.
    """
    return _weight_map(read_object(path, limit=_MAX_INDEX_BYTES, strict=True), str(path))


def _weight_map(index: Mapping[str, Any], path: str) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' must map tensors to files", hint=DAMAGED)
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise CheckpointError(
                f"{path}: tensor {shown(tensor)} is said to lie in {shown(file)}, which is no file of this folder",
                hint="the index is damaged, or not to be trusted",
            )
    return weight_map


def _stays_inside(file: str) -> bool:
    # By its text: a file in the Hugging Face cache is a link that rightly leaves the folder.
    path = PurePosixPath(file)
    hostile = any(character in file for character in ("\\", ":", "\0"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not hostile


def _read_tensors(files: CheckpointFiles, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    explicit = config.get("transformers_weights")
    if explicit is not None and (not isinstance(explicit, str) or not _stays_inside(explicit)):
        raise CheckpointError(
            f"{files.where(CONFIG_FILE)}: 'transformers_weights' is {shown(explicit)}, no file of this folder",
            hint=f"name a .safetensors file, or rename the weights to {WEIGHTS_FILE}",
        )
    names = (explicit,) if explicit else (WEIGHTS_FILE, INDEX_FILE)
    found = next((name for name in names if files.exists(name)), None)
    if found is None:
        raise _not_a_checkpoint(files, f"has no {' or '.join(names)}")
    if found.endswith(".index.json"):
        return _read_shards(files, found)
    return {tensor.name: tensor for tensor in files.read_headers([found])[found]}


def _read_shards(files: CheckpointFiles, index: str) -> dict[str, TensorInfo]:
    weight_map = _weight_map(files.read_object(index, limit=_MAX_INDEX_BYTES, strict=True), files.where(index))
    tensors: dict[str, TensorInfo] = {}
    # transformers reads all that the named shards hold, listed or not; the index decides where two hold the same.
    for shard, held in files.read_headers(dict.fromkeys(weight_map.values())).items():
        for tensor in held:
            if weight_map.get(tensor.name, shard) == shard:
                tensors[tensor.name] = tensor
    missing = next((name for name in weight_map if name not in tensors), None)
    if missing is not None:
        raise CheckpointError(
            f"{files.where(weight_map[missing])}: tensor {shown(missing)} is missing, though {index} lists it",
            hint="the shards do not belong together; download or copy the checkpoint again",
        )
    return tensors


def _not_a_checkpoint(files: CheckpointFiles, lack: str) -> CheckpointError:
    """Return the error for a folder without what `lack` names, with the remedy for what it holds instead."""
    what, hint = _instead(files.names())
    return CheckpointError(f"{files.where()} {lack}{what}", hint=hint)


def _instead(files: list[str]) -> tuple[str, str]:
    def ending(*suffixes: str) -> list[str]:
        return [name for name in files if name.endswith(suffixes)]

    if "adapter_config.json" in files:
        return ": it is an adapter, not a whole model", (
            "merge it into its base model once: peft's AutoPeftModelForCausalLM.from_pretrained(folder)"
            ".merge_and_unload().save_pretrained(new_folder)"
        )
    if ending(".gguf"):
        return f": it holds GGUF ({ending('.gguf')[0]}), which Lyra does not read", (
            "use the model's original safetensors checkpoint"
        )
    safetensors = ending(".safetensors")
    if safetensors:
        return f", only {safetensors[0]}{f' and {len(safetensors) - 1} more' if safetensors[1:] else ''}", (
            f"a checkpoint in transformers' form has {CONFIG_FILE} beside {WEIGHTS_FILE}, or shards beside {INDEX_FILE}"
        )
    if ending(".bin", ".pt", ".pth", ".ckpt"):
        return (
            f": its weights are pickled ({ending('.bin', '.pt', '.pth', '.ckpt')[0]}), which can run code when read",
            (
                "where you trust them, convert them once: transformers' AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder)"
            ),
        )
    return "", "give the folder of a model: config.json, tokenizer files and safetensors weights"
