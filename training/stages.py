"""The stages of the curriculum: from copying one sentence to choosing among several entries."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """What the prompts of one stage hold; ranges include both ends, the others are shares in 0..1.

    Attributes:
        entries: Journal entries in a prompt.
        events: Sentences that hold a fact, in each entry.
        fillers: Sentences without facts.
        absent: Questions that the entries do not answer.
        talk: Greetings and the like.
        plain: Of the grammar's prompts, those of short sentences only.
        scenes: Prompts whose question comes from a scene and not from the grammar.
        foreign: Prompts in other scripts than the Latin one.
        runs: Of the scenes' prompts with an answer, those in which it repeats a word many times.
        odd: Of the scenes' prompts, summaries, follow-up questions and questions by a word or a title.
    """

    entries: tuple[int, int]
    events: tuple[int, int]
    fillers: float
    absent: float
    talk: float
    plain: float = 0.0
    scenes: float = 0.6
    foreign: float = 0.0
    odd: float = 0.0
    runs: float = 0.0


# In the stages of short sentences, choosing, the weak half, is most of the loss.
STAGES = (
    Stage((1, 1), (1, 1), 0.0, 0.0, 0.0, scenes=0.5),
    Stage((1, 1), (2, 2), 0.0, 0.0, 0.0, plain=1.0, scenes=0.5),
    Stage((1, 2), (1, 3), 0.0, 0.05, 0.02, plain=1.0),
    Stage((1, 3), (1, 3), 0.1, 0.15, 0.02, plain=0.8),
    Stage((1, 3), (1, 4), 0.2, 0.2, 0.04, plain=0.4, odd=0.1),
    Stage((1, 4), (1, 5), 0.3, 0.33, 0.04, plain=0.2, scenes=0.88, foreign=0.04, odd=0.2, runs=0.03),
)
