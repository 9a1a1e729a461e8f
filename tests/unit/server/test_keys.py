"""Who gets in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.server.app import PATHS
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.start import KEY_VARIABLE, read_keys, serve
from tests.unit.server.running import MODEL, PROMPT, Running, running

KEYS = ["secret-one", "secret-two"]


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(keys=KEYS) as started:
        yield started


def test_every_route_needs_a_key_but_health_and_the_page(locked: Running) -> None:
    assert len(PATHS) > 10
    open_paths = {path for path in PATHS if locked.http.get(path).status_code not in (401, 405)}
    health = {"/health", "/v1/health", "/health/live", "/health/ready", "/health_generate"}
    assert open_paths == {"/", *health} & PATHS
    for path in [*sorted(PATHS - open_paths), "/no/such/route"]:
        for method in ("GET", "POST", "PUT", "DELETE"):
            response = locked.http.request(method, path)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


def test_any_of_the_keys_opens_and_nothing_else(locked: Running) -> None:
    url = "/v1/models"
    for key in KEYS:
        assert locked.http.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert locked.http.get(url, headers={"authorization": f"bearer  {key}"}).status_code == 200
    for value in ("Bearer", "Bearer secret", "Bearer secret-one2", "Basic secret-one", "secret-one"):
        assert locked.http.get(url, headers={"Authorization": value}).status_code == 401
    assert locked.http.get(url + "?api_key=secret-one").status_code == 401


def test_pages_of_other_origins_and_foreign_names_are_kept_out(locked: Running) -> None:
    allowed = {"Authorization": f"Bearer {KEYS[0]}"}
    host = locked.url.removeprefix("http://")
    for headers, status in (
        ({"Origin": f"http://{host}"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]"}, 200),
    ):
        assert locked.http.get("/v1/models", headers=allowed | headers).status_code == status, headers


def test_prompts_share_nothing_between_keys_or_salts(locked: Running) -> None:
    """How soon an answer comes must not tell what others asked."""

    def cached(key: str, **fields: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"prompt": PROMPT * 3, "max_tokens": 1} | fields
        usage = locked.http.post("/v1/completions", json=body, headers=headers).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEYS[0]) == 0 and cached(KEYS[0]) > 50
    assert cached(KEYS[1]) == 0 and cached(KEYS[0], cache_salt="x") == 0 and cached(KEYS[0], cache_salt="x") > 50


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(ServerConfig(load=MODEL, api_key_file=file)) == ["one", "two"]
    assert read_keys(ServerConfig(load=MODEL)) == []
    monkeypatch.setenv(KEY_VARIABLE, "three")
    assert read_keys(ServerConfig(load=MODEL, api_key_file=file)) == ["three", "one", "two"]
    for text in ("\n", "with blank", "schlüssel"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="key"):
            read_keys(ServerConfig(load=MODEL, api_key_file=file))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_are_let_in_with_keys_only(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="--api-key-file"):
        serve(ServerConfig(load=MODEL, host=host))


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    """The resolver would take it modulo 65536, and the server listen where nobody looks."""
    with pytest.raises(ConfigError, match=f"--port {port} is none"):
        ServerConfig(load=MODEL, port=port)
