"""Bytes that cross links for each token, and how fast a layout runs for one conversation: on paper.

Traffic. A tensor-parallel layer adds up two results over its group, of attention and of the MLP or the experts
(Shoeybi et al. 2019, arXiv:1909.08053, section 3), each a hidden state for each token; the divided embeddings add one
more, and the logits are gathered. In a ring, each GPU sends 2(n-1)/n of what is added up. Between two stages of a
pipeline goes a hidden state for each token.

Time. What n GPUs add up takes the less of 2(n-1) steps with 2(n-1)/n of the bytes (ring) and log2(n) steps with all of
them each (recursive doubling): Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication
Operations in MPICH", section 4.5. A token reads each GPU's share of weights once, and of the KV cache, half full, its
own sequence; stages run one after the other. Prefill is 2 FLOP for each weight and token, or reading the weights where
that takes longer, for a chunk of tokens.

The constants below are assumptions, with bands that are wide for it; nothing here was measured. Not covered: several
conversations at once, which share the reading; waiting of one GPU for another; recurrent layers; attention in long
prompts; experts that a machine could keep to itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lyra_emergence.fleet.shards import padded_vocab
from lyra_emergence.speed.machine_rates import Band
from lyra_emergence.speed.prediction import Speed
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lyra_emergence.fleet.machines import Hardware
    from lyra_emergence.fleet.shards import FleetModel, Shards

__all__ = ["Traffic", "add_up_seconds", "predict_speed", "traffic_of"]

GPU_STEP, NETWORK_STEP = 5e-6, 50e-6
"""Seconds until a short message arrives: within a machine, and over a network without RDMA."""
LAYER_SECONDS = 30e-6
"""What a layer's small operators take, started as one graph."""
_READ, _COMPUTED = 0.75, 0.5
"""The share of a GPU's bandwidth, and of its FLOP/s, that weights and products see."""
_READ_ERROR, _COMPUTE_ERROR = (1.25, 1.6), (1.6, 2.0)
_LAYER_ERROR = (2.0, 2.5)
_LINK_ERROR = (2.0, 3.0)
_PACKED_BYTES = {"8bit": 1.0, "4bit": 0.5625}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that cross links for one token of one sequence.

    Attributes:
        reductions: Results that tensor parallelism adds up, in all stages together.
        per_gpu: Bytes that a GPU of the busiest stage sends to its group, and gets.
        per_boundary: Bytes that a stage hands to the next.
        within: Boundaries between stages of one machine.
        between: Boundaries between machines.
    """

    reductions: int
    per_gpu: int
    per_boundary: int
    within: int
    between: int


def traffic_of(model: FleetModel, size: int, counts: Sequence[int], machine_of: Sequence[int]) -> Traffic:
    """Return the traffic of a layout.

    Args:
        model: The model.
        size: GPUs of a tensor-parallel group.
        counts: Layers of each stage.
        machine_of: The machine of each stage.
    """
    hidden = model.shape.hidden * model.itemsize
    sums = [2 * layers + (stage == 0) for stage, layers in enumerate(counts)] if size > 1 else [0] * len(counts)
    sent = [math.ceil(count * hidden * 2 * (size - 1) / size) for count in sums]
    sent[-1] += padded_vocab(model.shape) // size * model.itemsize if size > 1 else 0
    crossing = sum(here != there for here, there in pairwise(machine_of))
    return Traffic(
        reductions=sum(sums),
        per_gpu=max(sent),
        per_boundary=hidden if len(counts) > 1 else 0,
        within=len(counts) - 1 - crossing,
        between=crossing,
    )


def add_up_seconds(nbytes: float, size: int, link: float, step: float) -> float:
    """Return the seconds in which `size` GPUs add up `nbytes` each, over links of `link` bytes/s and `step` seconds."""
    if size == 1:
        return 0.0
    ring = 2 * (size - 1) * step + 2 * (size - 1) / size * nbytes / link
    doubling = math.ceil(math.log2(size)) * (step + nbytes / link)
    return min(ring, doubling)


def predict_speed(model: FleetModel, shards: Shards, traffic: Traffic, hardware: Hardware) -> Speed:
    """Return how fast one conversation runs, alone on a replica."""
    footprint = model.footprint
    tokens = min(footprint.chunk, max(1, footprint.context_length // 2))
    weights = sum(layer.read for layer in shards.layers) + shards.head_read
    cached = sum(layer.kv_cache for layer in shards.layers) // (2 * footprint.batch)
    read = Band(*[(weights + cached) / (hardware.bandwidth * _READ)] * 3).widened(*_READ_ERROR)
    layers = Band(*[len(shards.layers) * LAYER_SECONDS] * 3).widened(*_LAYER_ERROR)
    decode = read + layers + _crossing(model, shards, traffic, hardware, 1)
    prefill = _prefill(model, shards, hardware, tokens) + layers + _crossing(model, shards, traffic, hardware, tokens)
    rests_on = (
        f"each GPU reads its share of {format_bytes(weights + cached)} in all stages for a token at "
        f"{format_bytes(int(hardware.bandwidth))}/s, half of the context filled"
    )
    return Speed(decode.under(1), prefill.under(tokens), rests_on)


def _prefill(model: FleetModel, shards: Shards, hardware: Hardware, tokens: int) -> Band:
    packing = model.footprint.quantization
    each = _PACKED_BYTES[packing] if packing else model.itemsize
    products = 2 * tokens * sum(layer.read for layer in shards.layers) / each
    computed = products / (hardware.flops * _COMPUTED)
    # A chunk of tokens goes through all experts together.
    read = sum(layer.weights for layer in shards.layers) / (hardware.bandwidth * _READ)
    return Band(*[max(computed, read)] * 3).widened(*_COMPUTE_ERROR)


def _crossing(model: FleetModel, shards: Shards, traffic: Traffic, hardware: Hardware, tokens: int) -> Band:
    """Return the seconds in which the results of `tokens` cross all links."""
    hidden = tokens * model.shape.hidden * model.itemsize
    seconds = traffic.reductions * add_up_seconds(hidden, shards.size, hardware.gpu_link, GPU_STEP)
    seconds += traffic.within * (GPU_STEP + hidden / hardware.gpu_link)
    seconds += traffic.between * (NETWORK_STEP + hidden / hardware.link)
    if shards.size > 1:
        logits = padded_vocab(model.shape) * model.itemsize * (shards.size - 1) / shards.size
        seconds += GPU_STEP + logits / hardware.gpu_link
    return Band(seconds, seconds, seconds).widened(*_LINK_ERROR)
