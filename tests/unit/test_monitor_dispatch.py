"""One request, one reply: negotiation, forms, arguments, error classes. No sockets."""

from __future__ import annotations

import pytest

from migration.monitor.commands_migration import MIGRATION_COMMANDS
from migration.monitor.commands_vm import VM_COMMANDS
from migration.monitor.context import Monitor
from migration.monitor.dispatch import Client, Dispatcher, read_request
from tests.support.monitor_fake import FakeGuest, FakeService


class Talk:
    """A client's conversation with the dispatcher."""

    def __init__(self) -> None:
        self.guest = FakeGuest()
        self.service = FakeService(self.guest)
        self.reasons: list[str] = []
        monitor = Monitor(self.service, self.guest, on_quit=self.reasons.append, name="vm")
        self.dispatcher = Dispatcher(monitor, (*VM_COMMANDS, *MIGRATION_COMMANDS))
        self.client = Client()

    def say(self, message: object) -> dict[str, object]:
        answer = self.dispatcher.execute(read_request(message, self.client), self.client)
        if answer.after_reply is not None:
            answer.after_reply()
        return answer.reply

    def run(self, name: str, **arguments: object) -> object:
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        reply = self.say({"execute": name, "arguments": named})
        return reply["return"] if "return" in reply else reply["error"]


@pytest.fixture
def talk() -> Talk:
    talk = Talk()
    talk.say({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
    return talk


def error_class(reply: dict[str, object]) -> object:
    error = reply["error"]
    assert isinstance(error, dict)
    assert set(error) == {"class", "desc"}
    return error["class"]


def test_negotiation_comes_first_and_once() -> None:
    talk = Talk()
    assert error_class(talk.say({"execute": "query-status"})) == "CommandNotFound"
    bad = {"execute": "qmp_capabilities", "arguments": {"enable": ["xyz"]}}
    assert error_class(talk.say(bad)) == "GenericError"
    assert talk.say({"execute": "qmp_capabilities", "id": 7}) == {"return": {}, "id": 7}
    assert error_class(talk.say({"execute": "qmp_capabilities"})) == "CommandNotFound"
    assert error_class(talk.say({"exec-oob": "migrate-pause"})) == "GenericError"  # not enabled


@pytest.mark.parametrize(
    "message",
    [
        [],
        1,
        None,
        {},
        {"execute": 1},
        {"execute": "stop", "arguments": []},
        {"execute": "stop", "extra": 1},
        {"execute": "stop", "exec-oob": "stop"},
        {"execute": "stop", "arguments": {"force": True}},
        {"execute": "migrate"},
        {"execute": "migrate", "arguments": {"uri": 3}},
        {"execute": "migrate", "arguments": {"uri": "unix:x", "channels": []}},
        {"execute": "human-monitor-command", "arguments": {"command-line": "", "cpu-index": True}},
        {"exec-oob": "query-status"},
        {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [3]}},
        {
            "execute": "migrate-set-capabilities",
            "arguments": {"capabilities": [{"capability": "events", "state": 1}]},
        },
    ],
)
def test_bad_forms_are_generic_errors(talk: Talk, message: object) -> None:
    assert error_class(talk.say(message)) == "GenericError"


def test_unknown_commands_are_told_apart(talk: Talk) -> None:
    assert error_class(talk.say({"execute": "nope"})) == "CommandNotFound"


def test_an_id_of_any_kind_comes_back_with_errors_too(talk: Talk) -> None:
    assert talk.say({"execute": "nope", "id": {"a": [1]}})["id"] == {"a": [1]}
    assert talk.say({"execute": 5, "id": None})["id"] is None


def test_query_commands_lists_what_is_offered(talk: Talk) -> None:
    names = {entry["name"] for entry in talk.run("query-commands")}  # type: ignore[attr-defined]
    assert {"qmp_capabilities", "query-commands", "migrate", "x-oracle-sweep", "quit"} <= names


def test_settings_round_trip(talk: Talk) -> None:
    change = [{"capability": "postcopy-ram", "state": True}]
    assert talk.run("migrate-set-capabilities", capabilities=change) == {}
    assert {"capability": "postcopy-ram", "state": True} in talk.run(  # type: ignore[operator]
        "query-migrate-capabilities"
    )
    assert talk.run("migrate-set-parameters", downtime_limit=5) == {}
    assert talk.service.parameters()["downtime-limit"] == 5


def test_a_whole_migration_by_commands(talk: Talk) -> None:
    assert talk.run("query-migrate") == {}
    talk.service.set_capabilities({"postcopy-ram": True})
    assert talk.run("migrate", uri="unix:/x", detach=True) == {}
    assert talk.run("migrate-start-postcopy") == {}
    assert talk.say({"exec-oob": "migrate-pause"}) == {"return": {}}
    assert talk.say({"exec-oob": "migrate-recover", "arguments": {"uri": "unix:/y"}}) == {
        "return": {}
    }
    assert talk.run("query-migrate") == {"status": "postcopy-recover"}
    assert talk.service.uris == ["unix:/x", "unix:/y"]


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ({"transport": "socket", "type": "unix", "path": "/s"}, "unix:/s"),
        ({"transport": "socket", "type": "inet", "host": "::1", "port": "4"}, "tcp:[::1]:4"),
        ({"transport": "exec", "args": ["/bin/sh", "-c", "cat >x"]}, "exec:/bin/sh -c 'cat >x'"),
        ({"transport": "file", "filename": "f", "offset": 4096}, "file:f,offset=4096"),
    ],
)
def test_channels_mean_the_same_as_a_uri(talk: Talk, address: object, uri: str) -> None:
    talk.run("migrate", channels=[{"channel-type": "main", "addr": address}])
    assert talk.service.uris == [uri]


def test_the_guest_is_stopped_before_it_is_checked(talk: Talk) -> None:
    assert "running" in str(talk.run("x-oracle-sweep"))
    talk.run("stop")
    assert talk.run("query-status") == {"status": "paused", "running": False}
    assert talk.run("x-oracle-sweep") == {"pages_checked": 4, "errors": 0}


def test_quit_answers_before_it_acts(talk: Talk) -> None:
    answer = talk.dispatcher.execute(read_request({"execute": "quit"}, talk.client), talk.client)
    assert answer.reply == {"return": {}}
    assert talk.reasons == []
    assert answer.after_reply is not None


def test_our_own_bug_is_an_error_reply_not_a_dead_monitor(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk.service, "query", lambda: 1 / 0)
    reply = talk.say({"execute": "query-migrate"})
    assert error_class(reply) == "GenericError"
    assert "ZeroDivisionError" in str(reply)
