"""HMP: QEMU's commands, options and units, on an in-memory service."""

from __future__ import annotations

import threading

import pytest

from migration.monitor.context import Monitor
from migration.monitor.hmp import HMP
from migration.monitor.hmp_info import migration_text
from tests.support.monitor_fake import FakeGuest, FakeService


class Console:
    def __init__(self) -> None:
        self.guest = FakeGuest()
        self.service = FakeService(self.guest)
        self.reasons: list[str] = []
        self.hmp = HMP(Monitor(self.service, self.guest, on_quit=self.reasons.append, name="vm"))

    def type(self, line: str, *, may_wait: bool = False) -> str:
        return self.hmp.execute(line, may_wait=may_wait).replace("\r\n", "\n")


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("max-bandwidth 1", "max-bandwidth", 1 << 20),  # plain numbers are MiB here only
        ("max-bandwidth 1.5", "max-bandwidth", 3 << 19),
        ("max-bandwidth 100k", "max-bandwidth", 100 << 10),
        ("max-postcopy-bandwidth 1", "max-postcopy-bandwidth", 1),
        ("max-postcopy-bandwidth 1G", "max-postcopy-bandwidth", 1 << 30),
        ("downtime-limit 500", "downtime-limit", 500),
        ("cpu-throttle-tailslow on", "cpu-throttle-tailslow", True),
        ("multifd-compression zstd", "multifd-compression", "zstd"),
    ],
)
def test_parameters_in_qemus_units(console: Console, line: str, name: str, value: object) -> None:
    assert console.type(f"migrate_set_parameter {line}") == ""
    assert console.service.parameters()[name] == value


def test_migrate_set_speed_is_kept_for_old_hands(console: Console) -> None:
    assert console.type("migrate_set_speed 2") == ""
    assert console.service.parameters()["max-bandwidth"] == 2 << 20
    console.type("migrate_set_capability postcopy-ram on")
    console.type("migrate -d unix:/x")
    console.type("migrate_start_postcopy")
    assert "postcopy" in console.type("migrate_set_speed 1g")


def test_a_migration_from_the_console(console: Console) -> None:
    assert console.type("info migrate") == "No migration so far\n"
    assert console.type("migrate -d 'unix:/with space'") == ""
    assert console.service.uris == ["unix:/with space"]
    assert console.type("info migrate") == "Migration status: active\n"
    assert console.type("migrate_cancel") == ""
    assert console.type("info migrate") == "Migration status: cancelled\n"


def test_without_d_the_console_waits_for_the_end(console: Console) -> None:
    """The end comes from another thread, once the migration is seen to be active."""

    def end(name: str, data: dict[str, object]) -> None:
        if data.get("status") == "active":
            threading.Thread(target=console.service.cancel).start()

    console.service.add_listener(end)
    assert console.type("migrate unix:/x", may_wait=True) == "Migration cancelled\n"


def test_inside_qmp_the_console_does_not_wait(console: Console) -> None:
    assert "detached" in console.type("migrate unix:/x", may_wait=False)


@pytest.mark.parametrize(
    "line",
    [
        "nope",
        "info nope",
        "migrate",
        "migrate -x unix:/y",
        "migrate_set_capability events",
        "migrate_set_capability events maybe",
        "migrate_set_capability nope on",
        "migrate_set_parameter nope 1",
        "migrate_set_parameter downtime-limit fast",
        "migrate_set_parameter downtime-limit 0.5",
        "stop now",
        "migrate 'unix:/x",
        "migrate_pause",
        "savevm x",
        "migrate fd:unknown",
        "x_take_back",
        "x_take_back -x",
        "x_take_back -n now",
    ],
)
def test_mistakes_are_one_clear_line(console: Console, line: str) -> None:
    text = console.type(line)
    assert text.strip()
    assert "Traceback" not in text
    assert console.service.uris == []


def test_empty_lines_say_nothing(console: Console) -> None:
    assert console.type("   ") == ""


def test_help_and_info_list_only_what_works(console: Console) -> None:
    text = console.type("help")
    assert "migrate_start_postcopy" in text
    assert "savevm" not in text  # this service keeps no snapshots
    assert "info migrate_parameters" in console.type("info")
    assert console.type("help migrate").startswith("migrate [-d] [-r] uri")


def test_stop_cont_status_quit(console: Console) -> None:
    console.type("stop")
    assert console.type("info status") == "VM status: paused\n"
    console.type("c")
    assert console.type("info status") == "VM status: running\n"
    assert console.type("q") == ""
    assert console.hmp.after_reply is not None
    console.hmp.after_reply()
    assert console.reasons == ["host-qmp-quit"]


def test_completion_knows_names_of_the_running_vm(console: Console) -> None:
    assert console.hmp.complete("migrate_set_cap") == ["migrate_set_capability"]
    assert console.hmp.complete("migrate_set_capability post") == ["postcopy-ram"]
    assert console.hmp.complete("migrate_set_capability events o") == ["off", "on"]
    assert "migrate_parameters" in console.hmp.complete("info ")


def test_info_migrate_shows_what_the_query_has() -> None:
    text = migration_text(
        {
            "status": "failed",
            "error-desc": "no route",
            "total-time": 12,
            "ram": {"transferred": 5, "mbps": 1.25},
            "postcopy-latency-dist": [0, 0, 3, 1, 0],
            "x-postcopy": {"a": 1},
        },
        everything=True,
    )
    assert "Migration status: failed (no route)" in text
    assert "total time: 12 ms" in text
    assert "throughput: 1.2 mbps" in text
    assert "[4 us, 8 us): 3" in text
    assert '"a": 1' in text
