"""``postcopy analyze`` as a command: what goes where, exit statuses, files written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from migration.wire.ram_setup import RamSetupBlock
from tests.support.analyze_streams import PAGE, StreamBuilder, page, zero
from tests.support.analyze_vectors import SWEEPS, content, expected_ram, recording

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60


def analyze(*words: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; text decoded."""
    command = [sys.executable, "-m", "migration", "analyze", *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, timeout=TIMEOUT_S)
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(command, done.returncode, out, err)


def json_lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    """stdout, one object per line, and nothing else."""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def pc() -> Path:
    """A whole pc with a running guest."""
    return recording("7.2", "pc-running-kvm-8m").to_destination[0]


def test_json_goes_to_stdout_alone(pc: Path) -> None:
    """In stream order, the last line says how it ended."""
    done = analyze(pc, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = json_lines(done)
    assert lines[0] == {"kind": "header", "version": 3}
    assert lines[1]["machine"] == "pc-i440fx-7.2"
    assert lines[-1] == {"kind": "end", "offset": len(content(pc))}
    offsets = [line["offset"] for line in lines if line["kind"] in ("section", "command")]
    assert offsets == sorted(offsets, key=lambda offset: int(str(offset)))
    names = [line["name"] for line in lines if line["kind"] == "section"]
    assert names[-1] == "globalstate"
    assert "0000:00:01.0/PIIX3" in names


def test_text_is_for_people(pc: Path) -> None:
    """Plain lines when it is no terminal: no colour codes, no wrapping."""
    done = analyze(pc)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "machine pc-i440fx-7.2" in done.stdout
    assert "pckbd #0 version 3" in done.stdout
    assert "the stream is complete" in done.stdout.splitlines()[-1]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["runstate", "'running'"] in lines
    assert ["timer[0]"] in lines
    assert any(line[-1:] == ["all:"] for line in lines), "equal array elements are shown once"


def test_one_device_with_all_its_fields(pc: Path) -> None:
    """By name, by pattern; a name nobody has lists those there are."""
    lines = json_lines(analyze(pc, "--json", "--device", "pckbd"))
    assert [line["name"] for line in lines] == ["pckbd"]
    device = lines[0]["device"]
    assert isinstance(device, dict)
    assert device["kbd"]["status"] == 24
    lines = json_lines(analyze(pc, "--json", "--device", "*/PIIX3"))
    assert [line["name"] for line in lines] == ["0000:00:01.0/PIIX3"]
    lines = json_lines(analyze(pc, "--json", "--device", "dma#1"))
    assert [line["instance"] for line in lines] == [1]
    done = analyze(pc, "--device", "floppy")
    assert done.returncode == 2
    assert "no section 'floppy'" in done.stderr
    assert "pckbd" in done.stderr


def test_a_damaged_stream_says_where(pc: Path, tmp_path: Path) -> None:
    """Exit status 1, the error last, the last good section named, in JSON and in text."""
    path = tmp_path / "cut"
    path.write_bytes(content(pc)[:2_000_000])
    done = analyze(path, "--json")
    assert done.returncode == 1
    error = json_lines(done)[-1]
    assert error["kind"] == "error"
    assert error["section"] == "ram"
    good = error["last_good"]
    assert isinstance(good, dict)
    done = analyze(path)
    assert done.returncode == 1
    assert "broken" in done.stdout
    assert f"last good: ram ({good['type']}) at {good['offset']:#x}" in done.stdout


def test_standard_input(pc: Path) -> None:
    """One pass, nothing seeked."""
    done = analyze("-", "--json", stdin=content(pc))
    assert json_lines(done)[-1] == {"kind": "end", "offset": len(content(pc))}


def test_ram_map(tmp_path: Path) -> None:
    """Drawn in text, runs in JSON."""
    stream = (
        StreamBuilder()
        .ram_start(RamSetupBlock("ram", 8 * PAGE))
        .ram_part(page(0, b"a" * PAGE, "ram"))
    )
    stream.ram_part(zero(PAGE, "ram"), page(2 * PAGE, b"b" * PAGE), zero(2 * PAGE)).ram_end().end()
    path = tmp_path / "stream"
    path.write_bytes(stream.data)
    assert "0x0000000000  #02....." in analyze(path, "--ram-map").stdout
    lines = json_lines(analyze(path, "--ram-map", "--json"))
    block_line = next(line for line in lines if line["kind"] == "ram-block")
    assert block_line["map"] == [
        [0, PAGE, "normal"],
        [PAGE, PAGE, "zero"],
        [2 * PAGE, PAGE, "zero-resent"],
        [3 * PAGE, 5 * PAGE, "absent"],
    ]


def test_dump_ram(tmp_path: Path) -> None:
    """The block's content, nothing overwritten without --force, an unknown block named."""
    source = recording("7.2", "none-pattern-2m").to_destination[0]
    out = tmp_path / "ram"
    assert analyze(source, "--dump-ram", "ram", out).returncode == 0
    assert out.read_bytes() == expected_ram("none-pattern-2m")
    done = analyze(source, "--dump-ram", "ram", out)
    assert done.returncode == 2
    assert "--force" in done.stderr
    out.write_bytes(b"x" * (3 << 20))
    assert analyze(source, "--dump-ram", "ram", out, "--force").returncode == 0
    assert out.read_bytes() == expected_ram("none-pattern-2m")
    done = analyze(source, "--dump-ram", "pc.rom", tmp_path / "rom")
    assert done.returncode == 2
    assert "no RAM block 'pc.rom'" in done.stderr
    assert not (tmp_path / "rom").exists()


def test_a_dump_of_a_cut_migration_is_whole_with_its_recovery(tmp_path: Path) -> None:
    """Both channels given, in any order."""
    files = recording("7.2", "none-postcopy-recover-2m")
    out = tmp_path / "ram"
    words: list[str | Path] = [*reversed(files.to_destination), "--dump-ram", "ram", out]
    for path in files.to_source:
        words += ["--return-path", path]
    done = analyze(*words, "--json")
    assert done.returncode == 0, done.stdout[-500:]
    assert out.read_bytes() == expected_ram("none-postcopy-recover-2m")
    kinds = [line["kind"] for line in json_lines(done)]
    assert "cut" in kinds
    assert kinds.count("end") == 1


def test_diff(tmp_path: Path) -> None:
    """Nothing between a stream and itself; every field, page and configuration that differs."""
    running = recording("7.2", "pc-running-kvm-8m").to_destination[0]
    done = analyze(running, "--diff", running)
    assert (done.returncode, done.stdout) == (0, "no difference\n")
    other = recording("7.2", "pc-xbzrle-8m").to_destination[0]
    done = analyze(running, "--diff", other, "--json")
    assert done.returncode == 3
    lines = json_lines(done)
    assert lines[-1] == {"kind": "differences", "count": len(lines) - 1}
    names = {str(line["name"]) for line in lines if line.get("what") == "device"}
    assert "timer#0 cpu_clock_offset" in names
    ram = next(line for line in lines if line.get("what") == "ram")
    assert ram["name"] == "pc.ram"
    sweep = SWEEPS["pc-running-kvm-8m"]
    ranges = ram["ranges"]
    assert isinstance(ranges, list)
    assert any(start <= 1 << 20 < start + length <= sweep.limit for start, length in ranges)
    none = recording("7.2", "none-zero-1m").to_destination[0]
    text = analyze(running, "--diff", none).stdout
    assert "configuration machine: pc-i440fx-7.2 → none" in text
    assert "device pckbd#0: present → absent" in text
    assert "ram-block ram: absent → 1048576" in text


def test_diff_against_a_broken_stream_is_an_error(pc: Path, tmp_path: Path) -> None:
    """Not a list of differences."""
    path = tmp_path / "cut"
    path.write_bytes(content(pc)[:5000])
    done = analyze(pc, "--diff", path)
    assert done.returncode == 1
    assert "breaks at" in done.stderr


def test_held_bytes(pc: Path) -> None:
    """The bound is the user's."""
    done = analyze(pc, "--hold", "1K", "--json")
    assert done.returncode == 1
    assert "--hold" in str(json_lines(done)[-1]["message"])
    assert analyze(pc, "--hold", "much").returncode == 2


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["/nonexistent/stream"], 2, "No such file"),
        ([], 2, "FILE"),
        (["/dev/null"], 1, "the file ends"),
    ],
)
def test_files_that_are_not_there(words: list[str], status: int, message: str) -> None:
    """A sentence, no traceback."""
    done = analyze(*words)
    assert done.returncode == status
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_two_migrations_at_once_are_refused(pc: Path) -> None:
    """With what to do instead."""
    done = analyze(pc, pc)
    assert done.returncode == 2
    assert "--diff" in done.stderr


def test_help_has_examples() -> None:
    """It is the manual."""
    done = analyze("--help")
    assert done.returncode == 0
    for word in ("examples:", "--ram-map", "--dump-ram", "exit status", "pages.resent"):
        assert word in done.stdout


def test_a_reader_that_leaves_early_is_no_crash(pc: Path) -> None:
    """``| head``."""
    command = f"{sys.executable} -m migration analyze {pc} --json --ram-map | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, cwd=ROOT, timeout=TIMEOUT_S, check=True
    )
    assert done.stdout == b'{"kind": "header", "version": 3}\n'
    assert b"Traceback" not in done.stderr
