from __future__ import annotations

import pytest

from cotune.runtime.errors import ConfigError
from cotune.web.settings import ServerSettings, is_loopback


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST"]
)
def test_a_loopback_host_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    ServerSettings(host=host).validate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.4", "localhost.example.org"])
def test_a_reachable_host_without_a_key_is_refused_with_the_remedy(host: str) -> None:
    with pytest.raises(ConfigError, match="COTUNE_API_KEY") as caught:
        ServerSettings(host=host).validate()
    assert caught.value.param == "host"
    ServerSettings(host=host, api_key="secret").validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("api_key", ""),
        ("api_key", "two words"),
        ("api_key", "schlüssel"),
        ("api_key", "line\nbreak"),
        ("max_body_bytes", 0),
        ("max_messages", 0),
        ("max_prompts", 0),
        ("max_n", 0),
        ("max_n", 129),
        ("backlog", 0),
        ("max_frame_bytes", 0),
        ("max_feedback_events", 0),
        ("feedback_window", 0),
        ("max_feedback_connections", 0),
        ("heartbeat_s", 0.0),
        ("read_timeout_s", 0.0),
        ("stall_timeout_s", -1.0),
        ("stall_timeout_s", float("nan")),
        ("keepalive_timeout_s", 0.0),
        ("shutdown_timeout_s", -0.1),
        ("allowed_origins", ("example.org",)),
        ("allowed_origins", ("https://example.org/",)),
    ],
)
def test_a_wrong_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**{field: value}).validate()  # type: ignore[arg-type]
    assert caught.value.param == field
    assert field in str(caught.value)


def test_the_key_is_in_no_message_about_it() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(api_key="very secret").validate()
    assert "very secret" not in str(caught.value)
