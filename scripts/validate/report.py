"""A run as others read it: TAP while it goes, JSON lines, JUnit XML."""

import json
import platform
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from scripts.validate.host import Host
from scripts.validate.runner import FAIL, SKIP, Result


class Tap:
    """TAP version 14: https://testanything.org."""

    def __init__(self, out: TextIO, count: int) -> None:
        self._out = out
        self._number = 0
        print(f"TAP version 14\n1..{count}", file=out, flush=True)

    def add(self, result: Result) -> None:
        self._number += 1
        mark = "not ok" if result.status == FAIL else "ok"
        line = f"{mark} {self._number} - {result.case}"
        if result.status == SKIP:
            line += f" # SKIP {_with_remedy(result)}"
        print(line.replace("\n", " "), file=self._out)
        for remark in result.remarks:
            print(f"# {remark}", file=self._out)
        if result.status == FAIL:
            self._explain(result)
        self._out.flush()

    def _explain(self, result: Result) -> None:
        lines = ["---", "message: |", *(f"  {x}" for x in _with_remedy(result).splitlines()), "..."]
        for line in lines:
            print(f"  {line}", file=self._out)

    def end(self, results: Sequence[Result]) -> None:
        print(f"# {summary(results)}", file=self._out, flush=True)


def _with_remedy(result: Result) -> str:
    return f"{result.reason}; remedy: {result.remedy}" if result.remedy else result.reason


def summary(results: Sequence[Result]) -> str:
    """``412 cases: 380 pass, 0 fail, 32 skip; 5120 checks in 33.1 s``."""
    count = Counter(r.status for r in results)
    seconds = sum(r.seconds for r in results)
    checks = sum(r.checks for r in results)
    states = ", ".join(f"{count[s]} {s}" for s in ("pass", "fail", "skip"))
    return f"{len(results)} cases: {states}; {checks} checks in {seconds:.1f} s"


class JsonLines:
    """One object per line: the run, each case as it ends."""

    def __init__(self, out: TextIO, host: Host) -> None:
        self._out = out
        header: dict[str, object] = {
            "type": "run",
            "kernel": host.release,
            "machine": host.machine,
            "features": int(host.features) if host.features is not None else None,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write(header)

    def add(self, result: Result) -> None:
        self._write(result.record())

    def _write(self, record: dict[str, object]) -> None:
        print(json.dumps(record), file=self._out, flush=True)


def write_junit(path: Path, results: Sequence[Result], host: Host) -> None:
    """One suite, a class per family."""
    count = Counter(r.status for r in results)
    suite = ET.Element(
        "testsuite",
        name="validate-kernel",
        hostname=host.release,
        tests=str(len(results)),
        failures=str(count[FAIL]),
        skipped=str(count[SKIP]),
        time=f"{sum(r.seconds for r in results):.3f}",
    )
    for result in results:
        family, _, name = result.case.partition("/")
        case = ET.SubElement(
            suite, "testcase", classname=family, name=name, time=f"{result.seconds:.3f}"
        )
        if result.status == FAIL:
            ET.SubElement(case, "failure", message=_xml(result.reason.split("\n")[0])).text = _xml(
                _with_remedy(result)
            )
        elif result.status == SKIP:
            ET.SubElement(case, "skipped", message=_xml(_with_remedy(result)))
        if result.remarks:
            ET.SubElement(case, "system-out").text = _xml("\n".join(result.remarks))
    suites = ET.Element("testsuites")
    suites.append(suite)
    tree = ET.ElementTree(suites)
    ET.indent(tree)
    tree.write(path, encoding="unicode", xml_declaration=True)


def _xml(text: str) -> str:
    """Without what XML 1.0 cannot hold."""
    return "".join(c if c >= " " or c in "\n\t" else "�" for c in text)
