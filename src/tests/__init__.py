"""Tests; `test_<module>.py` mirrors `lyra_emergence/<module>.py`."""
