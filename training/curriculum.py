"""Draws training examples stage by stage, from scenes and from the grammar."""

import random
from dataclasses import replace

from training.answers import Example
from training.entries import World
from training.questions import history, lookup, talk
from training.recall import Recall
from training.scripts import draw_foreign
from training.stages import STAGES

LAST = len(STAGES) - 1


class Examples:
    """An endless source of examples, fixed by its seed.

    Args:
        seed: Any number.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._recall = Recall(self._rng)

    def draw(self, stage: int = LAST) -> Example:
        """Returns one example of the given stage; the later ones mix in one in eight of an earlier one."""
        rng = self._rng
        if stage and rng.random() < 0.12:
            stage = rng.randrange(stage)
        setting = STAGES[stage]
        world = World(rng, plain=rng.random() < setting.plain)
        if rng.random() < setting.foreign:
            return draw_foreign(rng)
        if rng.random() < setting.talk:
            example = talk(world, setting)
        elif rng.random() < setting.scenes:
            example = self._recall.draw(setting)
        else:
            example = lookup(world, setting)
        if stage >= 3 and not example.turns and rng.random() < 0.06:
            return replace(example, turns=history(World(rng), setting))
        return example
