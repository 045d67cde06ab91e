"""One model divided between several processes, which torchrun starts on one machine or on several.

transformers divides and runs the model (`from_pretrained(distributed_config=...)`); this package checks what it is
asked for, plans each process's share, keeps the processes together, and ends them together:

    launch, layout      what torchrun started, and how the configuration divides the model (no torch)
    shares, rank_plan   the bytes of each process's share, and whether they fit its device
    board               notes that the processes leave each other in torchrun's store: what to load, errors, the end
    leader, following   rank 0, which talks; the others, which run what rank 0 runs
    channel, passes     the passes of the model that rank 0 begins, and that all of them run
    loading             a `LoadedModel` whose passes run on all ranks

Every token is chosen by rank 0: the others get token ids and never choose, so that they cannot drift apart. Nothing
moves between devices while a divided model runs: memory that runs out on any rank is an error that ends all.
"""

from lyra_emergence.distributed.launch import Launch, find_launch
from lyra_emergence.distributed.layout import Layout, is_divided

__all__ = ["Launch", "Layout", "find_launch", "is_divided"]
