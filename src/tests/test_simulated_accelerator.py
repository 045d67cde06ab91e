"""The device that stands in for a GPU behaves like one where it matters to placing and running models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from .simulated_accelerator import SimulatedAccelerator


def test_beyond_the_cap_torch_s_own_error_says_what_was_asked_and_what_there_is(sim: SimulatedAccelerator) -> None:
    sim.set_cap(1000)
    kept = torch.empty(600, dtype=torch.uint8, device="sim:0")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(401, dtype=torch.uint8, device="sim:0")
    assert str(caught.value).startswith(
        "SIM out of memory. Tried to allocate 401 bytes. Device 0 has a total capacity of 1000 bytes of which "
        "400 bytes are free. 600 bytes are in use by this process."
    )
    assert torch.empty(400, dtype=torch.uint8, device="sim:0").nbytes + kept.nbytes == sim.peak()
