"""Weights on their way to an accelerator, through pinned pieces of main memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from lyra_emergence.placement import STAGING_PIECE, STAGING_PIECES
from lyra_emergence.runtime import staging
from lyra_emergence.runtime.staging import Staging

if TYPE_CHECKING:
    from .simulated_accelerator import SimulatedAccelerator

TENSORS = [
    torch.arange(1000, dtype=torch.float32).view(10, 100),
    torch.arange(7, dtype=torch.int64),
    torch.tensor(3.5),
    torch.empty(0, 4),
    torch.tensor([True, False, True]),
    torch.arange(513, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("most", [1, 7, 4000, STAGING_PIECE + 1])
@pytest.mark.parametrize("with_stream", [True, False])
def test_what_arrives_is_what_was_sent(
    most: int, with_stream: bool, sim: SimulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_stream:
        monkeypatch.setattr(staging, "_side_stream", lambda _: None)
    device = torch.device("sim:1")
    pieces = Staging(device, most)
    targets = [torch.empty_like(tensor, device=device) for tensor in TENSORS]
    done = pieces.copy(zip(TENSORS, targets, strict=True), pieces.used())
    pieces.wait(done)
    assert (done is not None) == with_stream
    assert all(torch.equal(target.cpu(), tensor) for target, tensor in zip(targets, TENSORS, strict=True))


def test_pieces_are_pinned_and_no_larger_than_they_need_to_be(sim: SimulatedAccelerator) -> None:
    before = sim.pinned()
    pieces = Staging(torch.device("sim:0"), 1000)
    assert sim.pinned() - before == STAGING_PIECES * 1000
    del pieces
    pieces = Staging(torch.device("sim:0"), 10 * STAGING_PIECE)
    assert sim.pinned() - before == STAGING_PIECES * STAGING_PIECE
    del pieces
    assert sim.pinned() == before


def test_sources_may_be_made_one_by_one(sim: SimulatedAccelerator) -> None:
    made = []

    def sources() -> object:
        for number in range(4):
            made.append(number)
            yield torch.full((5,), float(number)), target[number]

    target = torch.empty(4, 5, device="sim:0")
    Staging(torch.device("sim:0"), 8).copy(sources())  # type: ignore[arg-type]
    assert made == [0, 1, 2, 3]
    assert target.cpu()[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
