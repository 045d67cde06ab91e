"""How a configuration divides a model between processes, and what cannot be divided. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lyra_emergence.config.devices import AUTOMATIC
from lyra_emergence.distributed.launch import torchrun_command
from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.distributed.launch import Launch
    from lyra_emergence.model_shape import ModelShape

__all__ = ["Layout", "Seat", "check_options", "check_shape", "is_divided", "settle"]

_VARIABLE: Final = "LYRA_DISTRIBUTED"


@dataclass(frozen=True, slots=True)
class Seat:
    """What part of the model a rank has.

    Attributes:
        stage: Which run of layers, of `pp_size`.
        part: Which part of each layer, of `tp_size`.
    """

    stage: int
    part: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is divided: `pp_size` runs of layers, each layer between `tp_size` processes.

    Attributes:
        tp_size: Processes that share each layer.
        pp_size: Runs of layers.
    """

    tp_size: int = 1
    pp_size: int = 1

    @classmethod
    def of(cls, config: ModelConfig) -> Layout:
        """Return what the key `distributed` says."""
        return cls(**(config.distributed or {}))

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.tp_size * self.pp_size

    def seat(self, rank: int) -> Seat:
        """Return what a rank has: transformers lays ranks out with the parts of a layer beside each other."""
        return Seat(*divmod(rank, self.tp_size))

    def layers(self, stage: int, count: int) -> range:
        """Return the layers of a stage, of `count` in all: as many for each, and the rest for the last one."""
        each = count // self.pp_size
        return range(stage * each, count if stage == self.pp_size - 1 else (stage + 1) * each)

    def __str__(self) -> str:
        sizes = {"tp_size": self.tp_size, "pp_size": self.pp_size}
        return " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"  # noqa: RUF001


def is_divided(config: ModelConfig, launch: Launch | None) -> bool:
    """Return whether more than one process runs, or should run, the model."""
    return launch is not None or Layout.of(config).world_size > 1


def settle(config: ModelConfig, launch: Launch | None) -> Layout:
    """Return how the processes that torchrun started divide the model.

    Raises:
        ConfigError: There are not as many as the configuration wants, or an option cannot hold for several.
    """
    layout = Layout.of(config)
    if launch is None:
        raise ConfigError(
            f"in 'distributed': {layout} wants {layout.world_size} processes, and this is one",
            hint=f"run: {torchrun_command(layout.world_size)}",
        )
    if layout.world_size == 1:
        raise ConfigError(
            f"torchrun started {launch.world_size} processes, and 'distributed' does not say how they divide the model",
            hint=f"write {_written(launch.world_size)}",
        )
    if layout.world_size != launch.world_size:
        raise ConfigError(
            f"in 'distributed': {layout} wants {layout.world_size} processes, and torchrun started {launch.world_size}",
            hint=f"run: {torchrun_command(layout.world_size)}   or write {_written(launch.world_size)}",
        )
    check_options(config)
    return layout


def _written(processes: int) -> str:
    sizes = json.dumps({"tp_size": processes})
    return f"\"distributed\": {sizes} in the configuration file, or set {_VARIABLE}='{sizes}'"


def check_options(config: ModelConfig) -> None:
    """Check that no option contradicts dividing the model, and that transformers can divide one so.

    Raises:
        ConfigError: Some do; the message lists them.
    """
    problems = tuple(_contradictions(config))
    if problems:
        raise ConfigError("a model cannot be divided between processes as it is configured:", problems=problems)


def _contradictions(config: ModelConfig) -> Iterator[str]:
    layout = Layout.of(config)
    if layout.tp_size > 1 and layout.pp_size > 1:
        # transformers 5.23 looks for the parameters of layers that a stage does not have, and ends with a KeyError.
        yield "in 'distributed': transformers divides by 'tp_size' or by 'pp_size', not by both; keep one"
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(config, key):
            yield f"in '{key}': a divided model is not quantized; write false"
    if config.device_map is not None and config.device_map not in AUTOMATIC:
        yield "in 'device_map': every process has a device of its own; write null or 'auto'"


def check_shape(layout: Layout, shape: ModelShape, layers: int, *, shares_heads: bool) -> None:
    """Check that a model can be divided.

    Args:
        layout: Into what.
        shape: Its sizes.
        layers: Its layers.
        shares_heads: Whether processes that share a layer share its attention heads.

    Raises:
        ConfigError: Heads or layers cannot be divided; the message has the figures.
    """
    size = layout.tp_size
    if shares_heads and (shape.heads % size or (not shape.latent and shape.key_heads % size)):
        heads = f"{shape.heads} attention heads"
        if shape.key_heads != shape.heads and not shape.latent:
            heads += f" and {shape.key_heads} heads of keys and values"
        raise ConfigError(
            f"in 'distributed.tp_size': {size} processes cannot share the model's {heads} evenly",
            hint=f"tp_size can be {_listed(_common_divisors(shape))}; 'pp_size' divides the {layers} layers instead",
        )
    if layout.pp_size > layers:
        raise ConfigError(
            f"in 'distributed.pp_size': {layout.pp_size} processes are more than the model's {layers} layers",
            hint=f"write at most {layers}",
        )


def _common_divisors(shape: ModelShape) -> list[int]:
    keys = shape.heads if shape.latent else shape.key_heads
    return [size for size in range(1, shape.heads + 1) if shape.heads % size == 0 and keys % size == 0]


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
