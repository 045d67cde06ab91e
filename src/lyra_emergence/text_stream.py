"""Turning tokens into text as they come: whole characters only, nothing of a stop text, and no endless repetition."""

from __future__ import annotations

from typing import Any

__all__ = ["LoopDetector", "StopScanner", "TextDecoder"]

_INCOMPLETE = "�"
_PROMPT_TAIL = 6
"""Prompt tokens that the first new token is decoded after: whether it starts with a space depends on what precedes."""

_LONGEST_CYCLE = 64
"""Tokens of what may be found to repeat itself, at most: two long sentences."""
_LEAST_REPEATED = 12
"""Tokens of a repetition at least: "0000" and "ha ha ha ha" are no endless loops."""


class LoopDetector:
    """Tells when tokens have come to repeat one and the same sequence.

    Args:
        repeats: How often a sequence may stand in a row; 0 for any number of times.
    """

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self._tokens: list[int] = []
        # For each length of cycle, how many of the last tokens equal the one that far before them.
        self._equal = [0] * (_LONGEST_CYCLE + 1)

    def push(self, token: int) -> bool:
        """Take the next token and return whether the tokens are in a loop."""
        if not self._repeats:
            return False
        self._tokens.append(token)
        found = False
        for length in range(1, min(_LONGEST_CYCLE, len(self._tokens) - 1) + 1):
            same = self._tokens[-1 - length] == token
            self._equal[length] = self._equal[length] + 1 if same else 0
            found |= self._equal[length] + length >= max(length * (self._repeats + 1), _LEAST_REPEATED)
        return found


class TextDecoder:
    """Decodes one token at a time.

    A token's text can depend on the tokens before it, and a character can span tokens. So each push decodes a short
    window twice, without and with the new token, and returns the difference once it ends in a whole character.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt[-_PROMPT_TAIL:]
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that `token` completes."""
        self._ids.append(token)
        return self._new_text(whole_only=True)

    def finish(self) -> str:
        """Return what is left, a broken character included."""
        return self._new_text(whole_only=False)

    def _new_text(self, *, whole_only: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or (whole_only and text.endswith(_INCOMPLETE)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopScanner:
    """Passes text on up to the first stop text, holding back what could become one.

    Attributes:
        found: Whether a stop text was met.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the part of the text so far that is certain to be before any stop text."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._let_go(min(places))
        return self._let_go(len(self._held) - self._longest_start())

    def finish(self, text: str) -> str:
        """Return what is left at the end of the answer."""
        passed = self.push(text)
        return passed if self.found else passed + self._let_go(len(self._held))

    def _let_go(self, count: int) -> str:
        passed, self._held = self._held[:count], self._held[count:]
        return passed

    def _longest_start(self) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
