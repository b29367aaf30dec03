"""A VM that hangs, dies or cannot start: told with the console's last lines, and left behind by the
others.
"""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.matrix import cli, image, render, vm
from scripts.matrix.cpio import CpioWriter
from scripts.matrix.render import Outcome
from tests.support.need import need


def shell(text: str, folder: Path) -> list[str]:
    """In place of a VM: any process that writes the ports' files."""
    return ["sh", "-c", f"cd '{folder}'; {text}"]


def test_a_silent_machine_is_ended(tmp_path: Path) -> None:
    line = shell(f"echo $$ >pid; echo 'Oops: 0000' >{vm.CONSOLE}; exec sleep 600", tmp_path)
    boot = vm.run(line, tmp_path, vm.Limits(silence_s=1.5, total_s=60))
    assert "hung: nothing heard" in boot.problem
    assert "Oops: 0000" in boot.problem
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_machine_that_never_ends(tmp_path: Path) -> None:
    line = shell(f"while :; do echo x >>{vm.CONSOLE}; sleep 0.1; done", tmp_path)
    boot = vm.run(line, tmp_path, vm.Limits(silence_s=60, total_s=1.5))
    assert "not done within 1.5 s" in boot.problem


def test_a_machine_that_breaks_off(tmp_path: Path) -> None:
    cases = json.dumps({"type": "case", "case": "unit/one", "status": "pass"})
    boot = vm.run(shell(f"echo '{cases}' >{vm.CASES}; exit 3", tmp_path), tmp_path, vm.Limits())
    assert "before its plan did (exit status 3); 1 cases done, the last unit/one" in boot.problem


def test_a_machine_that_says_it_is_done(tmp_path: Path) -> None:
    line = shell(f"""echo '{{"step": "end"}}' >{vm.STEPS}""", tmp_path)
    assert vm.run(line, tmp_path, vm.Limits()).problem == ""


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / vm.CASES).write_text('{"type": "case", "case": "a", "status": "pass"}\n{"type": "c')
    render.save(tmp_path, Outcome("6.1"))
    assert [r["case"] for r in vm.records(tmp_path / vm.CASES)] == ["a"]
    assert (tmp_path / vm.CASES).read_text().count("\n") == 1


def test_one_broken_kernel_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(
        shutil.which("qemu-system-x86_64") and shutil.which("setpriv"),
        "no QEMU to start",
        remedy="apt-get install qemu-system-x86 util-linux",
    )
    cache, results = tmp_path / "cache", tmp_path / "results"
    (cache / "kernels" / "1.0").mkdir(parents=True)  # holds nothing
    modules = cache / "kernels" / "2.0" / "usr" / "lib" / "modules" / "2.0.1"
    modules.mkdir(parents=True)
    (modules / "vmlinuz").write_bytes(b"no kernel at all")
    with open(cache / f"root-{image.suite()}.cpio", "wb") as root:
        CpioWriter(root).end()
    options = ["--cache", str(cache), "--results", str(results), "--silence", "20"]
    assert cli.main([*options, "--kernels", "1.0,2.0", "--memory", "256"]) == 1
    assert "1.0 (no kernel)" in capsys.readouterr().out
    runs = render.load(results)
    assert [run.series for run in runs] == ["1.0", "2.0"]
    assert "holds no kernel" in runs[0].outcome.problem
    assert runs[1].outcome.release == "2.0.1"
    assert runs[1].outcome.problem
    errors = ET.parse(results / "junit.xml").getroot().findall("testsuite/testcase/error")
    assert len(errors) == 2
    assert "**2.0 did not come to its end**" in (results / "kernels.md").read_text()


def test_packages_with_what_they_need() -> None:
    names = {name.split("/")[0] for _, name in image.package_files(["cffi>=1.17", "nothing-such"])}
    assert {"cffi", "pycparser"} <= names
    assert any(name.startswith("_cffi_backend") for name in names)
    assert sys.version_info[:2] in image.SUITE_OF_PYTHON
