"""`lyra.py serve` as clients see it: a real process on loopback, the real `openai` client, and LangChain's."""

from __future__ import annotations

import io
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from lyra_emergence.cli import main

from . import families
from .running import reference
from .serving import ServerProcess, story

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY = "a-secret-of-the-tests"
PROMPT = story(4)  # "The river was high"


@pytest.fixture(scope="module")
def directory(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(
        directory, tmp_path_factory.mktemp("server"), "--max-body", "20kB", "--parallel", "2", LYRA_SERVE_KEY=KEY
    )
    yield process
    process.end()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.root, headers=headers, timeout=60, trust_env=False) as made:
        yield made


def told(text: str, new_tokens: int, directory: Path) -> str:
    """What the model goes on with by itself."""
    tokenizer = families.make_tokenizer()
    tokens = reference(directory, new_tokens, tuple(tokenizer(text)["input_ids"]))
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- what it answers --------------------------------------------------------------------------------------------------


def test_a_completion(client: openai.OpenAI, directory: Path) -> None:
    made = client.completions.create(model="llama", prompt=PROMPT, max_tokens=12)
    assert made.choices[0].text == told(PROMPT, 12, directory)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    prompt = len(families.make_tokenizer()(PROMPT)["input_ids"])
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (prompt, 12)
    assert made.usage.total_tokens == prompt + 12
    timings = (made.model_extra or {})["timings"]
    assert timings["prefill_seconds"] > 0
    assert timings["recoveries"] == []


def test_a_completion_of_token_ids_and_to_its_end(client: openai.OpenAI, directory: Path) -> None:
    ids = families.make_tokenizer()(PROMPT)["input_ids"]
    made = client.completions.create(model="llama", prompt=ids, max_tokens=200)
    assert made.choices[0].text == families.STORY.removeprefix(PROMPT)
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].text == told(PROMPT, 200, directory)


def test_a_completion_in_pieces(client: openai.OpenAI, directory: Path) -> None:
    stream = client.completions.create(
        model="llama", prompt=PROMPT, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == told(PROMPT, 12, directory)
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-2:] == [None, "length"]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 12
    assert len({piece.id for piece in pieces}) == 1


def test_a_chat_whole_and_in_pieces(client: openai.OpenAI, directory: Path) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What did I write "}, {"type": "text", "text": "then?"}]},
        {"role": "assistant", "content": "The river."},
        {"role": "user", "content": "And?"},
    ]
    asked = "system: Be brief.\nuser: What did I write then?\nassistant: The river.\nuser: And?\nassistant:"
    expected = told(asked, 10, directory)
    whole = client.chat.completions.create(model="llama", messages=messages, max_completion_tokens=10)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(model="llama", messages=messages, max_tokens=10, stream=True)
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert "timings" in (pieces[-1].model_extra or {})


def test_stop_texts_are_not_part_of_the_answer(client: openai.OpenAI) -> None:
    made = client.completions.create(model="llama", prompt=PROMPT, stop=["until", "never"])
    assert made.choices[0].text == " this morning, and I walked along it "
    assert made.choices[0].finish_reason == "stop"
    assert client.completions.create(model="llama", prompt=PROMPT, stop=" this").choices[0].text == ""


def test_a_seed_repeats_an_answer_and_no_temperature_is_the_likeliest(client: openai.OpenAI, directory: Path) -> None:
    def ask(**options: Any) -> str:
        return client.completions.create(model="llama", prompt="Nobody", max_tokens=24, **options).choices[0].text

    assert ask(temperature=2, seed=5) == ask(temperature=2, seed=5)
    assert len({ask(temperature=2, seed=seed) for seed in range(4)} | {ask(temperature=2)}) > 2
    likeliest = told("Nobody", 24, directory)
    assert [ask(temperature=0, seed=1), ask(top_p=0), ask(temperature=1, top_p=1e-9, seed=3)] == [likeliest] * 3
    assert ask(temperature=1e-300) == likeliest


def test_models_and_health(client: openai.OpenAI, http: httpx.Client, server: ServerProcess) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, (model.model_extra or {})["max_model_len"]) == ("llama", "lyra", 256)
    assert client.models.retrieve("llama").id == "llama"
    assert httpx.get(f"{server.root}/health", trust_env=False).json()["status"] == "ok"
    assert metric(http, 'lyra_http_responses_total{status="200"}') > 0
    assert metric(http, "lyra_tokens_room") == 512


def test_langchains_own_client(server: ServerProcess, directory: Path) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=server.url, api_key=KEY, model="llama", max_tokens=10, temperature=0, max_retries=0)
    expected = told("user: What now?\nassistant:", 10, directory)
    answer = chat.invoke("What now?")
    assert answer.content == expected
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 10
    assert "".join(str(piece.content) for piece in chat.stream("What now?")) == expected


def test_lyras_own_client(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LYRA_ENDPOINT_KEY", KEY)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["--endpoint", server.url, "--no-log", "--max-new-tokens", "6", "Hello?"]) == 0
    assert capsys.readouterr().out.strip()


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "code", "param", "message"),
    [
        ({"model": "gpt"}, 404, "model_not_found", "model", "the model 'gpt' does not exist here"),
        ({"prompt": "a " * 300}, 400, "context_length_exceeded", "prompt", "the prompt has"),
        ({"prompt": None}, 400, "invalid_value", "prompt", "'prompt': "),
        ({"prompt": []}, 400, "invalid_value", "prompt", "'prompt': the prompt is empty"),
        (
            {"prompt": [1, 384]},
            400,
            "invalid_value",
            "prompt",
            "'prompt': there is no token 384; they go from 0 to 383",
        ),
        ({"prompt": ["a", "b"]}, 400, "invalid_value", "prompt", "'prompt': "),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens", "'max_tokens': input should be greater than or equal"),
        ({"max_tokens": "5"}, 400, "invalid_value", "max_tokens", "'max_tokens': input should be a valid integer"),
        ({"temperature": 3}, 400, "invalid_value", "temperature", "'temperature': input should be less than or equal"),
        ({"top_p": -1}, 400, "invalid_value", "top_p", "'top_p': "),
        ({"seed": 2**63}, 400, "invalid_value", "seed", "'seed': "),
        ({"stop": ""}, 400, "invalid_value", "stop", "'stop': "),
        ({"n": 2}, 400, "invalid_value", "n", "'n': input should be 1"),
        ({"logit_bias": {"5": 1}}, 400, "invalid_value", "logit_bias", "'logit_bias': "),
        ({"nonsense": 1}, 400, "unknown_parameter", "nonsense", "'nonsense' is not a field of such a request"),
    ],
    ids=str,
)
def test_wrong_completions_are_refused_by_name(  # noqa: PLR0917 - a table
    fields: dict[str, Any], status: int, code: str, param: str, message: str, http: httpx.Client
) -> None:
    response = http.post("/v1/completions", json={"model": "llama", "prompt": PROMPT, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"messages": []}, "invalid_value", "'messages': list should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "'messages.0.content': field required"),
        ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "'messages.0.role': input should be '"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]},
            "unsupported_value",
            "'messages.0': messages of tools are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_value",
            "'messages.0.content': a part of type 'image_url' is not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "'messages.0.content': "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "invalid_value", "'tools': "),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "'reasoning_effort' is not supported by this server"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "context_length_exceeded", "the prompt has"),
    ],
    ids=str,
)
def test_wrong_chats_are_refused_by_name(fields: dict[str, Any], code: str, message: str, http: httpx.Client) -> None:
    body = {"model": "llama", "messages": [{"role": "user", "content": "Hi"}], **fields}
    response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code)
    assert error["message"].startswith(message)
    assert error["hint"]


def test_fields_without_effect_are_taken(client: openai.OpenAI, directory: Path) -> None:
    made = client.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "What now?"}],
        max_tokens=5,
        n=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
    )
    assert made.choices[0].message.content == told("user: What now?\nassistant:", 5, directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{nothing", "the body is not valid JSON"),
        (b"", "the body is not a JSON object"),
        (b"[1]", "the body is not a JSON object"),
        (b'{"model": "\xff"}', ""),
        (b"[" * 20_000, ""),
    ],
    ids=["broken", "none", "a list", "no UTF-8", "deep"],
)
def test_malformed_bodies(content: bytes, message: str, http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("field", [b'"prompt": "\\ud800"', b'"prompt": "a", "\\udfff": 1'])
def test_text_that_is_no_unicode_is_refused(field: bytes, http: httpx.Client) -> None:
    body = b'{"model": "llama", ' + field + b"}"
    response = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize("content", [b'"\\ud800"', b'[{"type": "text", "text": "\\ud800"}]'])
def test_messages_that_are_no_unicode_are_refused(content: bytes, http: httpx.Client) -> None:
    body = b'{"model": "llama", "messages": [{"role": "user", "content": ' + content + b"}]}"
    response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(
        "'messages.0.content': the text holds half of a surrogate pair"
    )


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(chunked: bool, http: httpx.Client) -> None:
    body = b" " * 20_001
    content: Any = (body[at : at + 5000] for at in range(0, len(body), 5000)) if chunked else body
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.json()["error"]["message"].startswith("the body has more than 20.0 kB")


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Basic " + KEY, "Bearer \xe4"])
def test_a_wrong_key(given: str, server: ServerProcess) -> None:
    headers = {"Authorization": given.encode("latin-1")} if given else {}
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        response = httpx.get(server.root + path, headers=headers, trust_env=False)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in response.text
    assert httpx.get(f"{server.root}/health", headers=headers, trust_env=False).status_code == 200


def test_the_openai_client_knows_these_errors(server: ServerProcess) -> None:
    wrong = openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
        wrong.models.list()
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist here"):
            client.models.retrieve("gpt")
        with pytest.raises(openai.NotFoundError, match="Not Found"):
            client.embeddings.create(model="llama", input="x")


def test_pages_of_other_sites_may_not_ask(http: httpx.Client) -> None:
    response = http.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")
    response = http.get("/v1/models", headers={"Host": "rebound.example"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_host")
    host = http.base_url.netloc.decode()
    assert http.get("/v1/models", headers={"Origin": f"http://{host}"}).status_code == 200


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/v2").status_code == 404
    response = http.get("/v1/completions")
    assert (response.status_code, response.json()["error"]["message"]) == (405, "Method Not Allowed")
    assert response.headers["Allow"] == "POST"


# --- clients that leave, and the end ----------------------------------------------------------------------------------

ENDLESS = {"model": "llama", "prompt": "Nobody", "max_tokens": 250, "temperature": 2, "seed": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(stream: bool, http: httpx.Client, server: ServerProcess) -> None:
    before = metric(http, 'lyra_answers_total{outcome="stopped"}')
    with socket.create_connection(("127.0.0.1", http.base_url.port or 0)) as raw:
        body = json.dumps(ENDLESS | {"stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        if stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200 OK")
        else:
            until(lambda: metric(http, "lyra_answers_running") == 1)
    until(lambda: metric(http, 'lyra_answers_total{outcome="stopped"}') == before + 1)
    assert metric(http, "lyra_answers_running") == 0
    assert server.process.poll() is None


def test_a_queue_that_is_full(directory: Path, tmp_path: Path) -> None:
    process = ServerProcess(directory, tmp_path, "--parallel", "1", "--queue", "1")
    try:
        # Without a key, none is wanted.
        with openai.OpenAI(base_url=process.url, api_key="any", max_retries=0, timeout=60) as client:

            def ask(_: int) -> str:
                try:
                    made = client.completions.create(**ENDLESS)
                except openai.RateLimitError as error:
                    assert int(error.response.headers["Retry-After"]) >= 1  # noqa: PT017 - some succeed
                    return str(error.code)
                return made.choices[0].text

            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, range(8)))
        assert answers.count("queue_full") >= 1
        served = [answer for answer in answers if answer != "queue_full"]
        assert len(served) >= 2
        assert len(set(served)) == 1
    finally:
        assert process.end() == 0
    assert process.said.splitlines()[-1].startswith(f"served {len(answers)} answers, ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(number: int, directory: Path, tmp_path: Path) -> None:
    process = ServerProcess(directory, tmp_path)
    pieces: list[str] = []
    try:
        with openai.OpenAI(base_url=process.url, api_key="any", max_retries=0, timeout=60) as client:
            stream = iter(client.completions.create(**ENDLESS, stream=True))
            pieces.append(next(stream).choices[0].text)
            process.process.send_signal(number)
            rest = list(stream)
            assert rest[-1].choices[0].finish_reason in {"length", "stop"}
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
        while number == signal.SIGINT and process.process.poll() is None:
            process.process.send_signal(number)  # an impatient hand breaks nothing
            time.sleep(0.02)
    finally:
        assert process.end(number) == 0
    assert process.said.splitlines()[-1].startswith("served 1 answer, ")


def test_answers_that_take_too_long_to_end_are_cut(directory: Path, tmp_path: Path) -> None:
    process = ServerProcess(directory, tmp_path, "--grace", "0")
    started = threading.Event()

    def ask() -> Any:
        with openai.OpenAI(base_url=process.url, api_key="any", max_retries=0, timeout=60) as client:
            stream = iter(client.completions.create(**ENDLESS, stream=True))
            next(stream)
            started.set()
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            return caught.value

    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            assert started.wait(60)
            assert process.end() == 0
            error = asked.result()
        assert error.code == "shutting_down"
        assert error.message.startswith("the server is shutting down")
    finally:
        process.end()


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: 127.0.0.1 port {port} cannot be had: address already in use\nhint: name another one with --port\n"
    )


def test_a_key_variable_that_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--api-key-env", "NOT_SET"]) == 2
    assert capsys.readouterr().err == ("error: --api-key-env: NOT_SET is not set\nhint: put the key into NOT_SET\n")


def test_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--max-body", "4Mb"]) == 2
    assert capsys.readouterr().err.startswith("error: --max-body: ")


def test_the_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.cli.serve._PACKAGES", ("no_such_package",))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == (
        "error: 'lyra.py serve' needs the extra 'serve', which is not installed\n"
        "hint: run: pip install 'lyra-emergence[serve]'   (in a checkout: uv sync --extra serve)\n"
    )


def test_other_machines_are_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The warning comes before the model, which is not there."""
    monkeypatch.chdir(tmp_path)
    bound: list[tuple[str, int]] = []
    from lyra_emergence.server import running

    real = running.bound_socket
    monkeypatch.setattr(running, "bound_socket", lambda host, port: bound.append((host, port)) or real("127.0.0.1", 0))
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--model", "./nothing"]) == 1
    assert bound == [("0.0.0.0", 0)]
    assert capsys.readouterr().err.startswith(
        "warning: 0.0.0.0 can be reached from other machines, and nothing that is sent is encrypted; anyone who "
        "reaches it may ask: put a key into LYRA_SERVE_KEY\n"
    )
