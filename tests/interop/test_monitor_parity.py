"""Our monitor beside a stock QEMU's: the same names, types, defaults; the rest refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from migration.monitor.not_offered import NOT_OFFERED
from tests.support.monitor_process import RunningVM, start_postcopy_pair, switch_on
from tests.support.qemu import Qemu, newer_qemu, require_qemu
from tests.support.qmp import QmpClient, QmpError

pytestmark = [pytest.mark.interop, pytest.mark.kernel]

# In QEMU 10.1 and newer, so not in the schema of the one that is here.
NEWER = {
    "remaining": "int",
    "postcopy-latency": "int",
    "postcopy-latency-dist": ["int"],
    "postcopy-vcpu-latency": ["int"],
    "postcopy-non-vcpu-latency": "int",
}
# Of QEMU's commands, those about migration: by their names.
ABOUT_MIGRATION = (
    "migrat",
    "dirty-rate",
    "dirty-limit",
    "yank",
    "announce-self",
    "colo",
    "xen-set",
)
ALSO = ("getfd", "closefd", "snapshot-save", "snapshot-load", "snapshot-delete", "query-jobs")


class Schema:
    """``query-qmp-schema``, looked up by name."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._by_name = {entry["name"]: entry for entry in entries}
        self.commands = [e["name"] for e in entries if e["meta-type"] == "command"]

    def members(self, command: str, key: str) -> dict[str, dict[str, Any]]:
        """Members of what a command takes (``arg-type``) or returns (``ret-type``)."""
        return self.members_of(self._by_name[self._by_name[command][key]])

    def members_of(self, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        if entry["meta-type"] == "array":
            entry = self._by_name[entry["element-type"]]
        return {member["name"]: self._by_name[member["type"]] for member in entry["members"]}

    def type_of(self, entry: Mapping[str, Any]) -> object:
        if entry["meta-type"] == "array":
            return [self.type_of(self._by_name[entry["element-type"]])]
        if entry["meta-type"] == "builtin":
            return entry["json-type"]
        return "string" if entry["meta-type"] == "enum" else "object"


def type_of(value: object) -> object:
    if isinstance(value, list):
        return [type_of(value[0])] if value else []
    names: dict[type, str] = {bool: "boolean", int: "int", str: "string", float: "number"}
    return names.get(type(value), "object")


def fits(value: object, wanted: object) -> bool:
    have = type_of(value)
    return have == wanted or have == [] or (have == "int" and wanted == "number")


@pytest.fixture(scope="module")
def stock() -> Iterator[Qemu]:
    """The newest QEMU of this host."""
    with Qemu(newer_qemu() or require_qemu()) as qemu:
        yield qemu


@pytest.fixture(scope="module")
def schema(stock: Qemu) -> Schema:
    return Schema(stock.execute("query-qmp-schema"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QmpClient]:
    folder = tmp_path_factory.mktemp("vm")
    options = ("-m", "16M", "--snapshot-dir", str(folder))
    with RunningVM(folder, "vm", *options) as vm, vm.client() as client:
        yield client


def wrong_fields(
    info: Mapping[str, object], members: Mapping[str, Any], schema: Schema
) -> list[str]:
    """Fields that are not QEMU's by name and type; ours begin with x-."""
    found = []
    for name, value in info.items():
        wanted = schema.type_of(members[name]) if name in members else NEWER.get(name)
        if not name.startswith("x-") and not fits(value, wanted):
            found.append(f"{name}: {type_of(value)} instead of {wanted}")
        if isinstance(value, dict) and name in members:
            found += wrong_fields(value, schema.members_of(members[name]), schema)
    return found


def test_query_migrate_has_qemus_fields(schema: Schema, tmp_path: Path) -> None:
    """At both sides, in the middle and at the end, with all that adds fields."""
    members = schema.members("query-migrate", "ret-type")
    shape = ("-m", "16M", "--rate", "2000")
    with (
        RunningVM(tmp_path, "src", *shape) as source_vm,
        RunningVM(tmp_path, "dst", *shape, "--incoming", "defer") as destination_vm,
        source_vm.client() as source,
        destination_vm.client() as destination,
    ):
        switch_on(source, "xbzrle", "auto-converge")
        switch_on(destination, "postcopy-blocktime")
        start_postcopy_pair(tmp_path, source, destination, max_postcopy_bandwidth=1 << 20)
        middle = [client.execute("query-migrate") for client in (source, destination)]
        source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        for client in (source, destination):
            client.wait_event("MIGRATION", lambda data: data["status"] == "completed")
        end = [client.execute("query-migrate") for client in (source, destination)]
        for info in (*middle, *end):
            assert wrong_fields(info, members, schema) == []
        theirs = schema.members_of(members["ram"])
        # 'skipped' was a page count of 7.2 that never counted
        assert set(theirs) - {"skipped"} == set(end[0]["ram"])
        assert {"total-time", "downtime", "setup-time", "xbzrle-cache", "remaining"} <= set(end[0])
        assert set(NEWER) - {"remaining"} <= set(end[1])
        assert {"postcopy-blocktime", "postcopy-vcpu-blocktime"} <= set(end[1])
        destination.execute("stop")
        assert destination.execute("x-oracle-sweep")["errors"] == 0


def test_capabilities(ours: QmpClient, stock: Qemu) -> None:
    """Ours are QEMU's, with its defaults but one; its others are refused as not offered."""

    def read(client: Any) -> dict[str, bool]:
        listed = client.execute("query-migrate-capabilities")
        return {each["capability"]: each["state"] for each in listed}

    mine, theirs = read(ours), read(stock)
    if stock.binary.version >= (9, 0):  # mapped-ram is from then
        assert set(mine) <= set(theirs)
    assert {n for n in mine if n in theirs and mine[n] != theirs[n]} == {"return-path"}
    for name in set(theirs) - set(mine):
        with pytest.raises(QmpError, match=f"{name}' is not offered by this runtime"):
            switch_on(ours, name)
    with pytest.raises(QmpError, match="Invalid parameter 'teleport'"):
        switch_on(ours, "teleport")


def test_parameters(ours: QmpClient, stock: Qemu, schema: Schema) -> None:
    """The same for parameters; a refused one is named and nothing changes."""
    members = schema.members("query-migrate-parameters", "ret-type")
    mine, theirs = (c.execute("query-migrate-parameters") for c in (ours, stock))
    for name, value in mine.items():
        if name in members and not name.startswith("x-"):
            assert fits(value, schema.type_of(members[name])), name
            if name in theirs:
                assert value == theirs[name], name
    if stock.binary.version >= (10, 0):  # an older one does not know all of ours yet
        assert {n for n in mine if not n.startswith("x-")} <= set(members)
    for name in set(theirs) - set(mine):
        with pytest.raises(QmpError, match=name):
            ours.execute("migrate-set-parameters", {name: theirs[name]})
    assert ours.execute("query-migrate-parameters") == mine


def test_commands(ours: QmpClient, schema: Schema) -> None:
    """Every command about migration is here, or refused with the reason; no argument is missing."""
    mine = {each["name"] for each in ours.execute("query-commands")}
    about = [n for n in schema.commands if n in ALSO or any(w in n for w in ABOUT_MIGRATION)]
    assert len(about) > 25
    for name in about:
        if name not in mine:
            with pytest.raises(QmpError, match=r"not offered by this runtime: \w+") as refused:
                ours.execute(name)
            assert refused.value.error_class == "CommandNotFound"
            assert name in NOT_OFFERED
    with pytest.raises(QmpError) as unknown:
        ours.execute("migrate-teleport")
    assert unknown.value.error_class == "CommandNotFound"


def test_arguments(ours: QmpClient, schema: Schema) -> None:
    """An argument QEMU has is never taken for a mistake; one it has not, always."""
    mine = {each["name"] for each in ours.execute("query-commands")}
    # 7.2's migrate could move disks too (blk, inc)
    gone = {("migrate", "blk"), ("migrate", "inc")}
    for name in mine & set(schema.commands):
        if any(word in name for word in ABOUT_MIGRATION) and name != "migrate-set-parameters":
            for argument in schema.members(name, "arg-type"):
                if (name, argument) not in gone:
                    with pytest.raises(QmpError) as refused:
                        ours.execute(name, {argument: None})  # no command takes a null
                    assert "unexpected" not in str(refused.value), (name, argument)
            with pytest.raises(QmpError, match="teleport"):
                ours.execute(name, {"teleport": 1})


def test_dirty_rate(ours: QmpClient, stock: Qemu, schema: Schema) -> None:
    """Measured while the guest runs; the answer has QEMU's fields."""
    ours.execute("calc-dirty-rate", {"calc-time": 1})
    with pytest.raises(QmpError, match="already"):
        ours.execute("calc-dirty-rate", {"calc-time": 1})
    while (info := ours.execute("query-dirty-rate"))["status"] != "measured":
        pass
    assert info["dirty-rate"] > 0
    members = schema.members("query-dirty-rate", "ret-type")
    if "calc-time-unit" in members:  # from 8.2
        assert wrong_fields(info, members, schema) == []
    assert ours.execute("query-dirty-rate", {"calc-time-unit": "millisecond"})["calc-time"] == 1000


def test_yank(ours: QmpClient) -> None:
    """Nothing is there to be yanked without a migration; see test_qemu_suite for one with."""
    assert ours.execute("query-yank") == []
    with pytest.raises(QmpError, match="not found"):
        ours.execute("yank", {"instances": [{"type": "migration"}]})
