"""A VM that hangs, dies or cannot start: told with the console's last lines, and left behind by the
others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.matrix import cli, image, jobs, runs, vm
from scripts.matrix.cpio import CpioWriter
from scripts.matrix.runs import Outcome
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
    runs.save(tmp_path, Outcome("6.1"))
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
    empty_root(cache)
    options = ["--cache", str(cache), "--results", str(results), "--silence", "20"]
    assert cli.main([*options, "--kernels", "1.0,2.0", "--memory", "256"]) == 1
    assert "1.0 (no kernel)" in capsys.readouterr().out
    found = runs.load(results)
    assert [run.series for run in found] == ["1.0", "2.0"]
    assert "holds no kernel" in found[0].outcome.problem
    assert found[1].outcome.release == "2.0.1"
    assert found[1].outcome.problem
    moves = runs.load_crossings(results)
    assert [(move.source, move.destination) for move in moves] == [("1.0", "2.0"), ("2.0", "1.0")]
    assert not any(move.is_good for move in moves)
    root = ET.parse(results / "junit.xml").getroot()
    assert len(root.findall("testsuite/testcase/error")) == 2
    assert len(root.findall("testsuite[@name='crossings']/testcase/failure")) == 2
    assert "## 2.0 did not come to its end" in (results / "kernels.md").read_text()
    assert "<h2>2.0 did not come to its end</h2>" in (results / "kernels.html").read_text()


def empty_root(cache: Path) -> None:
    with open(image.root_in(cache), "wb") as root:
        CpioWriter(root).end()


def test_what_was_booted_is_not_booted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files and plan: the earlier outcome stands; another plan, or --fresh: a new boot."""
    booted: list[str] = []

    def ends_well(line: list[str], folder: Path, limits: vm.Limits) -> vm.Boot:
        booted.append(folder.name)
        (folder / vm.STEPS).write_text('{"step": "end"}\n')
        return vm.Boot(7.0)

    monkeypatch.setattr(vm, "run", ends_well)
    modules = tmp_path / "kernels" / "2.0" / "lib" / "modules" / "2.0.1"
    modules.mkdir(parents=True)
    (modules / "vmlinuz").write_bytes(b"a kernel")
    empty_root(tmp_path)
    settings = jobs.Settings(tmp_path, tmp_path / "results", 256, 1)
    for plan in ({"only": ["a"]}, {"only": ["a"]}, {"only": ["b"]}):
        jobs.one("2.0", plan, settings)
    assert len(booted) == 2
    assert capsys.readouterr().out.count("2.0 (2.0.1), as before") == 1
    jobs.one("2.0", {"only": ["b"]}, dataclasses.replace(settings, fresh=True))
    assert len(booted) == 3


def test_packages_with_what_they_need() -> None:
    names = {name.split("/")[0] for _, name in image.package_files(["cffi>=1.17", "nothing-such"])}
    assert {"cffi", "pycparser"} <= names
    assert any(name.startswith("_cffi_backend") for name in names)
    assert sys.version_info[:2] in image.SUITE_OF_PYTHON
