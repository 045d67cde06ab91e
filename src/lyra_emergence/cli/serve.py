"""`lyra.py serve`: the model behind an OpenAI-compatible address on this machine, and a page to chat on."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from lyra_emergence.cli.prepare import loaded_model, prepare
from lyra_emergence.cli.ready import describe_journal
from lyra_emergence.errors import ConfigError, MissingExtraError
from lyra_emergence.server.room import DEFAULT_PARALLEL, room_of
from lyra_emergence.units import parse_bytes

if TYPE_CHECKING:
    import socket

    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.prepare import Prepared
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.server.guard import Limits

__all__ = ["KEY_VARIABLE", "ServeRequest", "run_serve"]

KEY_VARIABLE: Final = "LYRA_SERVE_KEY"
"""The environment variable whose content clients have to send, where --api-key-env names no other."""
_PACKAGES: Final = ("fastapi", "openai", "prometheus_client", "uvicorn")


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """How to serve.

    Attributes:
        host: The address to listen on.
        port: The port; 0 for any free one.
        key_variable: The environment variable that holds the key; None for LYRA_SERVE_KEY, if that is set.
        parallel: Answers that run at once at most.
        queue: Requests that wait at most.
        max_body: The most that a request's body may have, as written.
        grace: Seconds that answers have to end after the first signal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key_variable: str | None = None
    parallel: int = DEFAULT_PARALLEL
    queue: int = 64
    max_body: str = "4MiB"
    grace: float = 30.0


def run_serve(options: Options, request: ServeRequest, console: Console) -> int:
    """Load the configured model and serve it until a signal comes.

    Raises:
        ConfigError: An option is wrong, two contradict each other, or the address cannot be had.
        LyraError: The model cannot be loaded.
        MissingExtraError: The extra 'serve' is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in _PACKAGES):
        raise MissingExtraError("'lyra.py serve'", extra="serve")
    if options.no_journal and options.journal is not None:
        raise ConfigError("--no-journal and --journal contradict each other", hint="leave one of them out")
    if options.offline:
        from lyra_emergence.cli.start import go_offline

        go_offline()
    limits = _limits(request)
    from lyra_emergence.server.running import bound_socket

    with bound_socket(request.host, request.port) as bound:  # before seconds go into loading
        _warn(request, limits, console)
        prepared = prepare(_with_safe_journal(options, limits, console), console)
        console.tell(prepared.summary())
        console.tell(describe_journal(prepared.journal))
        with loaded_model(prepared, console) as loaded:
            _serve(loaded, prepared, request, limits, bound=bound, console=console)
    return 0


def _serve(
    loaded: LoadedModel,
    prepared: Prepared,
    request: ServeRequest,
    limits: Limits,
    *,
    bound: socket.socket,
    console: Console,
) -> None:
    from lyra_emergence.server.app import make_app
    from lyra_emergence.server.engine import Engine
    from lyra_emergence.server.running import LyraServer

    as_planned = loaded.report.rung == loaded.plan.rung.name
    room = room_of(loaded.plan, request.parallel, as_planned=as_planned)
    engine = Engine(loaded, room, request.queue)
    name = loaded.plan.model
    console.tell(f"{name}: {room}; {request.queue} more may wait")
    app = make_app(loaded, engine, limits, name=name, journal=prepared.journal, passages=prepared.passages)

    def ready() -> None:
        console.tell(f"the page: {_root(bound)}/")
        console.print(f"{_root(bound)}/v1")

    server = LyraServer(app, engine, request.grace, on_ready=ready)
    server.run(sockets=[bound])
    figures = engine.figures()
    answers = sum(figures.ended.values())
    console.tell(f"served {answers} answer{'' if answers == 1 else 's'}, {figures.new_tokens} tokens")


def _limits(request: ServeRequest) -> Limits:
    from lyra_emergence.server.guard import Limits, is_loopback

    variable = request.key_variable or KEY_VARIABLE
    key = os.environ.get(variable, "").strip()
    if request.key_variable is not None and not key:
        raise ConfigError(f"--api-key-env: {variable} is not set", hint=f"put the key into {variable}")
    if not key.isascii():
        raise ConfigError(f"the key in {variable} has characters beyond ASCII", hint="take letters and digits")
    try:
        body = parse_bytes(request.max_body)
    except ValueError as error:
        raise ConfigError(f"--max-body: {error}", hint="write 4MiB") from error
    return Limits(key, body, local_names_only=is_loopback(request.host))


def _warn(request: ServeRequest, limits: Limits, console: Console) -> None:
    if limits.local_names_only:
        return
    told = f"{request.host} can be reached from other machines, and nothing that is sent is encrypted"
    if not limits.key:
        told += f"; anyone who reaches it may ask: put a key into {KEY_VARIABLE}"
    console.warning(told)


def _with_safe_journal(options: Options, limits: Limits, console: Console) -> Options:
    """Return the options without a journal that nobody named where other machines could read in it without a key."""
    if limits.local_names_only or limits.key or options.journal is not None or options.no_journal:
        return options
    console.note("without a key no journal is served to other machines; --journal names one all the same")
    return replace(options, no_journal=True)


def _root(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
