"""The command line as a whole: help, errors in sentences, exit statuses."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types

import pytest

from migration.commands import main as main_module
from migration.commands.main import main
from migration.commands.output import Output, UserError, histogram_lines, table_text
from tests.support.monitor_process import ROOT, postcopy_argv, run_postcopy


def test_help_lists_verbs_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for verb in ("demo", "run", "migrate"):
        assert verb in text
    assert "examples:" in text


@pytest.mark.parametrize("verb", ["demo", "run", "migrate"])
def test_each_verb_has_a_manual(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"postcopy {verb}" in capsys.readouterr().out.split("examples:")[1]


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().err


def test_help_needs_no_heavy_imports() -> None:
    """Neither the C extensions nor rich nor the QMP library are loaded to show help."""
    code = (
        "import sys\n"
        "from migration.commands.main import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'rich', 'qemu.qmp', 'cffi', 'asyncio', 'migration.toyvm', 'guestmem'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def failing_verb(error: BaseException) -> types.ModuleType:
    """A verb that only fails."""

    def run(args: argparse.Namespace) -> int:
        raise error

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        subparsers.add_parser("inspect").set_defaults(func=run)

    module = types.ModuleType("migration.commands.inspect")
    module.__spec__ = main_module.__spec__
    module.__dict__.update(add_parser=add_parser, run=run)
    return module


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("no room", hint="buy a house", status=3), 3, ["no room", "try: buy a house"]),
        (FileNotFoundError(2, "No such file", "x.bin"), 1, ["x.bin"]),
        (ZeroDivisionError("oops"), 1, ["internal error", "oops", "-vv"]),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_errors_are_sentences(
    error: BaseException,
    status: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "migration.commands.inspect", failing_verb(error))
    assert main(["inspect"]) == status
    text = capsys.readouterr().err
    assert all(word in text for word in words)
    assert "Traceback" not in text
    assert main(["inspect", "-vv"]) == status
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (not isinstance(error, KeyboardInterrupt))


def test_a_reader_that_leaves_is_no_traceback() -> None:
    done = run_postcopy("run", "--help")
    assert done.returncode == 0
    piped = " ".join(postcopy_argv("--help")) + " | true"
    result = subprocess.run(
        ["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["run", "-m", "64X"],
        ["run", "--smp", "many"],
        ["run", "--write-share", "150%"],
        ["demo", "--transport", "pigeon"],
        ["migrate"],
        ["nope"],
    ],
)
def test_usage_mistakes_are_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--json", "--monitor", "stdio"],
        ["run", "--monitor", "stdio", "--monitor", "stdio"],
        ["migrate", "x", "unix:y", "--timeout", "-1"],
        ["demo", "--postcopy-after", "-1"],
    ],
)
def test_impossible_wishes_are_explained(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    assert capsys.readouterr().err.startswith(f"postcopy {words[0]}: ")


def test_json_keeps_stdout_clean(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json_lines=True)
    output.say("for people")
    output.emit({"a": 1})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('{"a": 1}\n', "for people\n")


def test_tables_and_histograms_fit_a_terminal() -> None:
    assert table_text([("a", "1"), ("long", "22")]) == "  a     1\n  long  22"
    lines = histogram_lines([("x", 0), ("y", 1), ("z", 1000), ("w", 0)])
    assert [line.split()[0] for line in lines] == ["y", "z"]
    assert max(map(len, lines)) <= 60
    assert histogram_lines([("x", 0)]) == []
