"""What `/set` changes in a running chat: its names, their ranges, and the values as text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.chunks import GenerationOptions
    from lyra_emergence.cli.answers import View

__all__ = ["SETTINGS", "Settings", "change"]

_MOST_PASSAGES: Final = 50
_MOST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Settings:
    """All that `/set` can change.

    Attributes:
        options: How answers are generated.
        passages: Journal passages for each question, at most.
        view: How answers are shown.
    """

    options: GenerationOptions
    passages: int
    view: View


@dataclass(frozen=True, slots=True)
class Setting:
    """One of them.

    Attributes:
        help: What it does, and what it may be.
        show: Returns its value as text.
        change: Returns the settings with another value; raises ValueError where the text is none.
    """

    help: str
    show: Callable[[Settings], str]
    change: Callable[[Settings, str], Settings]


def change(settings: Settings, name: str, text: str) -> Settings:
    """Return `settings` with `name` set to what `text` says.

    Raises:
        ConfigError: There is no such setting, or it cannot be that.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        near = get_close_matches(name, SETTINGS, n=1)
        raise ConfigError(f"there is no setting {name}", hint=f"did you mean {near[0]}?" if near else "/set lists them")
    try:
        return setting.change(settings, text)
    except ValueError:
        raise ConfigError(f"{name} cannot be '{text}'", hint=f"it is {setting.help}") from None


def _generation(help_: str, name: str, read: Callable[[str], float | None]) -> Setting:
    def show(settings: Settings) -> str:
        value = getattr(settings.options, name)
        return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def put(settings: Settings, text: str) -> Settings:
        given: dict[str, Any] = {name: read(text)}
        return replace(settings, options=replace(settings.options, **given))

    return Setting(help_, show, put)


def _whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not least <= int(text) <= most:
            raise ValueError(text)
        return int(text)

    return read


def _number(above: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not above < float(text) <= most:
            raise ValueError(text)
        return float(text)

    return read


def _seed(text: str) -> int | None:
    return None if text == "off" else _whole(0)(text)


def _on(text: str) -> bool:
    if text not in {"on", "off"}:
        raise ValueError(text)
    return text == "on"


def _show_temperature(settings: Settings) -> str:
    return f"{settings.options.temperature:g}" if settings.options.do_sample else "0"


def _change_temperature(settings: Settings, text: str) -> Settings:
    if float(text) == 0:
        options = replace(settings.options, do_sample=False, temperature=1.0)
    else:
        options = replace(settings.options, do_sample=True, temperature=_number(0, 100)(text))
    return replace(settings, options=options)


SETTINGS: Final[dict[str, Setting]] = {
    "temperature": Setting(
        "0 for the likeliest words, a number up to 100 for surprises", _show_temperature, _change_temperature
    ),
    "max_new_tokens": _generation("the most tokens of an answer, 1 or more", "max_new_tokens", _whole(1)),
    "top_p": _generation("the share of likely words to draw from, above 0, 1 for all", "top_p", _number(0, 1)),
    "top_k": _generation("how many likely words to draw from, 0 for all", "top_k", _whole(0)),
    "repetition_penalty": _generation("above 0, 1 for none", "repetition_penalty", _number(0, 100)),
    "max_repeats": _generation("how often the same may stand in a row, 0 for any", "max_repeats", _whole(0)),
    "seed": _generation("a whole number to repeat answers, or off", "seed", _seed),
    "passages": Setting(
        f"journal passages for a question, 0 to {_MOST_PASSAGES}",
        lambda settings: str(settings.passages),
        lambda settings, text: replace(settings, passages=_whole(0, _MOST_PASSAGES)(text)),
    ),
    "markdown": Setting(
        "on or off: whether answers are rendered",
        lambda settings: "on" if settings.view.markdown else "off",
        lambda settings, text: replace(settings, view=replace(settings.view, markdown=_on(text))),
    ),
}
