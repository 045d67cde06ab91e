"""How fast a plan will run, from the bytes it reads for each token and the rates of the devices that hold them.

Decoding reads every weight once a token (of a mixture's experts, the active ones), appends to the KV cache and reads
it, and pays for each layer's Python and small operators. On the CPU these times add up; an accelerator works while
Python prepares what comes next, so the longer of the two counts, and at the worst both. The same goes for blocks that
are streamed: they are read while others run.

Prefill is the products of a chunk of tokens with the weights. Guests, which an accelerator runs for a long chunk, count
there, and their copies overlap with what it computes. Below float32 on the CPU, each product with an expert's
weights has a number of rows of its own, and pays for the kernel that oneDNN compiles for it.

The bands hold what the probe's runs differed by, and on top a model error for each part (the constants below), which
is what the parts differed by on real models. Not covered: recurrent layers and latent attention (their caches are read
in other ways), blocks of kind "other" (not run for text), a mixture's routing on accelerators, attention in the prefill
of very long prompts, and weights that fit the CPU's caches, which are faster than predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from lyra_emergence.guests import HOSTS, least_tokens
from lyra_emergence.placement import CPU, DISK
from lyra_emergence.speed.machine_rates import SHARED_HEADS, Band
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lyra_emergence.footprint import Footprint
    from lyra_emergence.packing import Quantization
    from lyra_emergence.placement import Placement
    from lyra_emergence.speed.machine_rates import DtypeRates, MachineRates

__all__ = ["Speed", "predict"]

_Error = tuple[float, float]
"""How many times faster, and how many times slower, a part was than predicted, or may be."""
_READ_ERROR: _Error = (1.25, 1.5)
"""On weights: wide matrices read faster than the probe's, narrow ones and the pages of a map slower."""
_MAP_LIKELY = 1.15
"""On weights on the CPU: the pages of a map, at the odd addresses that a header leaves, read slower than a buffer."""
_PACKED_READ = {"8bit": 0.6, "4bit": 0.65}
"""Packed bytes that bitsandbytes reads for each byte that the unpacked product would, in the same time."""
_PACKED_LAYERS = {"8bit": 3.0, "4bit": 0.5}
"""What packing adds to each layer's own seconds, in layers: each projection is several small operators more."""
_KERNELS_PACKED_READ = {"8bit": 1.0, "4bit": 0.9}
"""The same of Lyra's kernels on the CPU, which unpack in registers."""
_PACKED_ERROR: _Error = (1.8, 2.0)
_FILE_ERROR: _Error = (1.25, 3.0)
"""On reading from a map page by page instead of in pieces, while the kernel drops what comes next."""
_STREAM_ERROR: _Error = (1.5, 2.0)
"""On reading ahead in order: disks that others use too are now faster, now slower than they were probed."""
_COPY_ERROR: _Error = (1.25, 1.5)
"""On copying guests' weights to an accelerator, whose pages come from the checkpoint's map."""
_CACHE_ERROR: _Error = (1.6, 1.6)
_LAYER_ERROR: _Error = (1.5, 1.8)
"""On small operators: the probe's model is narrow, and other families have more or fewer of them."""
_PREFILL_LIKELY, _PACKED_PREFILL_LIKELY = 1.1, 1.3
_LOW_PREFILL_LIKELY = 1.5
"""The same below float32 on the CPU, where products are faster and attention, norms and activations weigh more: 1.4 to
1.9 in `benchmarks/plan_speed.py`."""
_PREFILL_ERROR: _Error = (1.5, 1.7)
"""On products: more rows are faster than the probe's few; attention, norms and activations come on top."""
_KERNEL_ERROR: _Error = (2.5, 2.5)
"""On compiling a kernel: more for wide matrices than narrow ones, none for a number of rows that came before."""
_EXPERT_PRODUCTS = 2
"""Gate and up as one, and down."""
_MOST_SHARED_HEADS = 8
_CROSSING_TENSORS = 4
"""Hidden state, positions and the two rotary tables go to the next device, one after the other."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PACKED_BYTES = {"8bit": 1.0, "4bit": 0.5625}
"""Bytes of a weight with its share of the scales."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a plan will run, all sequences of its batch together.

    Attributes:
        decode_tokens_per_second: Once the prompt is read, with the KV cache half full.
        prefill_tokens_per_second: Tokens of the prompt, for half a context of them but one chunk at most.
        rests_on: One sentence: the bytes and rates behind the figures.
    """

    decode_tokens_per_second: Band
    prefill_tokens_per_second: Band
    rests_on: str


@dataclass(slots=True)
class _Work:
    """What a device does for a token: bytes read by where and how they are, layers run, weights multiplied.

    From the file, `streamed` bytes are read ahead, and `paged` ones as their pages are met.

    Of a chunk of prefill, `experts` and their `active_share` say how many products with experts there are.
    """

    plain: float = 0
    packed: float = 0
    streamed: float = 0
    paged: float = 0
    cached: float = 0
    layers: int = 0
    products: float = 0
    experts: int = 0
    active_share: float = 1.0

    @property
    def from_file(self) -> float:
        """Bytes that are read from the file in either way."""
        return self.streamed + self.paged


def predict(
    footprint: Footprint,
    placements: Sequence[Placement],
    rates: MachineRates,
    *,
    active_share: Mapping[str, float] | None = None,
    heads_per_key: float | None = None,
) -> Speed | None:
    """Predict how fast `placements` will run.

    Args:
        footprint: The blocks and their bytes.
        placements: Where each block goes.
        rates: What was measured on the machine.
        active_share: Of a block's weights, by its name, the share that one token reads, above 0 and at most 1: a
            mixture reads its active experts only. 1 for a block that is not named.
        heads_per_key: Query heads for each head of keys and values, on which the time of reading the KV cache
            depends; where None, 4 is likely and anything from 1 to 8 within the band.

    Returns:
        The speed, or None where a device or the dtype was not measured.
    """
    works = _works(footprint, placements, active_share or {})
    devices = _devices(footprint, works, rates, heads_per_key)
    route = [_computes_on(placement) for placement in placements if placement.kind != "other"]
    if not devices or len(devices) < len(works):
        return None
    between = _crossings(route, rates)
    decode = _total([*(device.decode() for device in devices), devices[0].rates.token.widened(*_LAYER_ERROR), between])
    tokens = min(footprint.chunk, max(1, footprint.context_length // 2)) * footprint.batch
    prefill = _total([_prefill(footprint, placements, rates, active_share or {}, tokens), between])
    return Speed(decode.under(footprint.batch), prefill.under(tokens), _rests_on(devices, footprint))


def _devices(
    footprint: Footprint, works: Mapping[str, _Work], rates: MachineRates, heads_per_key: float | None
) -> list[_Device]:
    """Return the devices of which all is known that their works take."""
    is_low = _ITEM_BYTES[footprint.dtype] < _ITEM_BYTES["float32"]
    return [
        _Device(name, work, found, rates.file_read, footprint.quantization, heads_per_key, footprint.fused, is_low)
        for name, work in works.items()
        if (found := _measured(rates, name, footprint.dtype)) is not None
        and (rates.file_read or not work.streamed + work.paged)
    ]


def _prefill(
    footprint: Footprint,
    placements: Sequence[Placement],
    rates: MachineRates,
    active_share: Mapping[str, float],
    tokens: int,
) -> Band:
    """Return the seconds of a chunk of `tokens`, for which guests run on accelerators where it is long enough."""
    guests = [p for p in placements if p.through and tokens >= least_tokens(placements, footprint, rates)]
    ran = [replace(p, device=p.through, streamed=False) if p in guests else p for p in placements]
    times = []
    for device in _devices(footprint, _works(footprint, ran, active_share), rates, None):
        sizes = [p.weights for p in guests if p.through == device.name]
        here = rates.of(device.name)
        copy = (here.staged or here.copy) if here is not None else None
        copied = copy.under(sum(sizes) + HOSTS * max(sizes)).widened(*_COPY_ERROR) if copy and sizes else Band(0, 0, 0)
        # Guests on disk are read there in the same time.
        read = sum(p.weights for p in guests if p.through == device.name and p.streamed)
        if read and rates.file_read:
            copied = copied.beside(rates.file_read.under(read).widened(*_STREAM_ERROR))
        times.append(device.prefill(tokens).beside(copied))
    return _total(times)


def _computes_on(placement: Placement) -> str:
    return CPU if placement.device == DISK else placement.device


def _measured(rates: MachineRates, device: str, dtype: str) -> DtypeRates | None:
    found = rates.of(device)
    return found.dtypes.get(dtype) if found else None


def _total(times: Iterable[Band]) -> Band:
    return sum(times, Band(0, 0, 0))


def _works(
    footprint: Footprint, placements: Sequence[Placement], active_share: Mapping[str, float]
) -> dict[str, _Work]:
    """Return what each device does for a token, in the order in which the devices come."""
    blocks = {block.name: block for block in footprint.blocks}
    works: dict[str, _Work] = {}
    for placement in placements:
        if placement.kind == "other":
            continue
        work = works.setdefault(_computes_on(placement), _Work())
        work.cached += placement.kv_cache / 2
        if placement.kind == "embedding":
            continue  # of a table, a token reads one row
        tied_to = blocks[placement.block].tied_to
        held = max(placement.weights, blocks[tied_to].weights) if tied_to else placement.weights
        read = held * active_share.get(placement.block, 1.0)
        is_layer = placement.kind == "layer"
        packing = footprint.quantization if is_layer else None
        if placement.streamed:
            work.streamed += read
            work.plain += read  # from its buffer
        elif placement.device == DISK:
            work.paged += read
        elif packing:
            work.packed += read
        else:
            work.plain += read
        work.layers += is_layer
        if placement.kind == "experts":
            work.experts += blocks[placement.block].experts
            work.active_share = blocks[placement.block].active_share
        # Of a chunk of prefill, the head sees the last token only.
        work.products += (
            (is_layer or placement.kind == "experts")
            * read
            / (_PACKED_BYTES[packing] if packing else _ITEM_BYTES[footprint.dtype])
        )
    return works


@dataclass(frozen=True, slots=True)
class _Device:
    """One device's work, and its rates in the dtype that the model computes in."""

    name: str
    work: _Work
    rates: DtypeRates
    file_read: Band | None
    packing: Quantization | None
    heads_per_key: float | None
    fused: bool = False
    is_low: bool = False

    def decode(self) -> Band:
        """Return the seconds of a token."""
        mapped = _MAP_LIKELY if self.name == CPU else 1
        works = [
            self.rates.read.under(self.work.plain * mapped).widened(*_READ_ERROR),
            self._paged(),
            self._cached().widened(*_CACHE_ERROR),
        ]
        if self.packing:
            share = (_KERNELS_PACKED_READ if self._has_kernels() else _PACKED_READ)[self.packing]
            works.append(self.rates.read.times(share).under(self.work.packed).widened(*_PACKED_ERROR))
        if self.fused and self.rates.fused_layer is not None:
            run = _total(works) + self.rates.fused_layer.times(self.work.layers).widened(*_LAYER_ERROR)
        else:
            run = self._with_layers(_total(works))
        return run.beside(self._streamed())

    def _has_kernels(self) -> bool:
        return self.rates.fused_layer is not None

    def _cached(self) -> Band:
        if self.fused and self.rates.fused_cache is not None:
            return self.rates.fused_cache.under(self.work.cached)
        return _seconds_per_byte(self.rates, self.heads_per_key).times(self.work.cached)

    def prefill(self, tokens: int) -> Band:
        """Return the seconds of a chunk of `tokens`."""
        products = self.rates.matmul.under(2 * self.work.products * tokens)
        alone = _LOW_PREFILL_LIKELY if self.is_low and self.name == CPU else _PREFILL_LIKELY
        factor, error = (_PACKED_PREFILL_LIKELY, _PACKED_ERROR) if self.packing else (alone, _PREFILL_ERROR)
        # A token goes through its own share of experts; all together go through all of them soon.
        used = min(1, tokens * self.work.active_share) * self.work.experts if self.name == CPU else 0
        kernels = self.rates.kernel.times(_EXPERT_PRODUCTS * used).widened(*_KERNEL_ERROR)
        run = self._with_layers(products.times(factor).widened(*error) + kernels + self._paged())
        return run.beside(self._streamed())

    def _paged(self) -> Band:
        return self.file_read.under(self.work.paged).widened(*_FILE_ERROR) if self.file_read else Band(0, 0, 0)

    def _streamed(self) -> Band:
        return self.file_read.under(self.work.streamed).widened(*_STREAM_ERROR) if self.file_read else Band(0, 0, 0)

    def _with_layers(self, work: Band) -> Band:
        more = 1 + _PACKED_LAYERS[self.packing] if self.packing else 1
        layers = self.rates.layer.times(self.work.layers * more).widened(*_LAYER_ERROR)
        # An accelerator works while Python prepares what comes next.
        return work + layers if self.name == CPU else work.beside(layers)


def _seconds_per_byte(rates: DtypeRates, heads_per_key: float | None) -> Band:
    """Return the seconds that a token takes for a byte of the KV cache."""
    if heads_per_key is None:
        least, likely, most = (_seconds_per_byte(rates, heads) for heads in (1, SHARED_HEADS, _MOST_SHARED_HEADS))
        return Band(min(least.low, likely.low), likely.likely, most.high)
    alone, shared = rates.cache_alone.under(1), rates.cache_shared.under(1)
    if heads_per_key >= SHARED_HEADS:
        return shared.times(heads_per_key / SHARED_HEADS)
    weight = (heads_per_key - 1) / (SHARED_HEADS - 1)
    return alone.times(1 - weight) + shared.times(weight)


def _crossings(route: Sequence[str], rates: MachineRates) -> Band:
    """Return the seconds that hidden states take between devices, and the logits back to the first."""
    ways = [(one, other) for one, other in pairwise([*route, route[0]]) if one != other]
    found = [rates.of(device) for way in ways for device in way]
    times = [device.crossing for device in found if device is not None and device.crossing is not None]
    return _total(times).times(_CROSSING_TENSORS)


def _rests_on(devices: Sequence[_Device], footprint: Footprint) -> str:
    parts = [part for device in devices for part in _reads(device)]
    cached = int(sum(device.work.cached for device in devices))
    parts += [f"{format_bytes(cached)} of KV cache (half of {footprint.context_length} tokens)"] if cached else []
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else "nothing"
    layers = sum(device.work.layers for device in devices)
    slowest = 1000 * max(_layer_seconds(device) for device in devices)
    return f"a token reads {listed}, and each of {layers} layers adds {slowest:.3g} ms"


def _layer_seconds(device: _Device) -> float:
    fused = device.rates.fused_layer if device.fused else None
    return (fused or device.rates.layer).likely


def _reads(device: _Device) -> Iterator[str]:
    here = int(device.work.plain + device.work.packed)
    if here:
        yield f"{format_bytes(here)} on {device.name} at {format_bytes(int(device.rates.read.likely))}/s"
    if device.work.from_file and device.file_read:
        rate = format_bytes(int(device.file_read.likely))
        yield f"{format_bytes(int(device.work.from_file))} from the file at {rate}/s"
