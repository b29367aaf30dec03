"""All runs as one JUnit file, for whatever shows such files."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.matrix import vm
from scripts.matrix.runs import Crossing, Run


def write(runs: Sequence[Run], crossings: Sequence[Crossing], path: Path) -> None:
    """A suite for each kernel and one for the migrations between them; a VM that broke off is an
    error in its suite.
    """
    root = ET.Element("testsuites")
    for run in runs:
        suite = _cases(run)
        for backing, demo in run.demos.items():
            _add(suite, "demo", backing, demo)
        if run.outcome.problem:
            case = ET.SubElement(suite, "testcase", classname="vm", name=run.series)
            first = run.outcome.problem.splitlines()[0]
            ET.SubElement(case, "error", message=first).text = run.outcome.problem
        root.append(suite)
        if run.test_results:
            root.append(_tests(run))
    if crossings:
        suite = ET.SubElement(root, "testsuite", name="crossings")
        for move in crossings:
            where = f"{move.source} to {move.destination}"
            _add(suite, where, str(move.record["backing"]), move.record)
    tree = ET.ElementTree(root)
    ET.indent(tree)
    tree.write(path, encoding="unicode", xml_declaration=True)


def _cases(run: Run) -> ET.Element:
    """What the guest wrote itself; what is cut off is left out (the problem says so)."""
    written = run.folder / vm.JUNIT
    suite = ET.Element("testsuite", name="validate-kernel")
    if written.exists() and written.stat().st_size:
        try:
            found = ET.parse(written).getroot().find("testsuite")
            suite = suite if found is None else found
        except ET.ParseError:
            pass
    suite.set("name", f"{suite.get('name')} {run.series}")
    return suite


def _tests(run: Run) -> ET.Element:
    """What pytest ran there."""
    suite = ET.Element("testsuite", name=f"tests {run.series}")
    for test, result in run.test_results.items():
        file, _, name = test.partition("::")
        case = ET.SubElement(suite, "testcase", classname=file, name=name)
        word, _, reason = result.partition(" ")
        if word == "SKIPPED":
            ET.SubElement(case, "skipped", message=reason[1:-1])
        elif word != "PASSED":
            ET.SubElement(case, "failure", message=run.why_tests_failed.get(test, ""))
    return suite


def _add(suite: ET.Element, group: str, name: str, record: Mapping[str, object]) -> None:
    case = ET.SubElement(suite, "testcase", classname=group, name=name)
    if record.get("status") != "ok":
        kind = "skipped" if record.get("status") == "skip" else "failure"
        reason = str(record.get("reason", ""))
        ET.SubElement(case, kind, message=(reason.splitlines() or [""])[0]).text = reason
