"""The C core on its own under the sanitizers, and proof that the sanitizers would speak up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.run_drivers import SANITIZERS, TIMEOUT_S, compiler, drivers, run
from tests.support.need import need


@pytest.fixture(autouse=True)
def _a_compiler() -> None:
    need(compiler(), "no C compiler", remedy="apt-get install gcc libc6-dev")


@pytest.mark.timeout(TIMEOUT_S + 120)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("driver", drivers(), ids=lambda path: path.stem)
def test_driver(driver: Path, sanitizer: str) -> None:
    """Warnings are errors, any report is a failure."""
    outcome = run(driver, sanitizer)
    if outcome.verdict == "skipped":
        reason, _, remedy = outcome.last_line.partition("remedy:")
        need(False, f"{driver.stem}: {reason}".rstrip("; "), remedy=remedy.strip() or None)
    assert outcome.verdict == "passed", f"exit code {outcome.code}\n{outcome.output}"


PROGRAMS = {
    "clean": ("int main(void) { return 0; }", {"address": "passed", "thread": "passed"}),
    "skipping": (
        '#include <stdio.h>\nint main(void) { puts("no cake; remedy: bake"); return 77; }',
        {"address": "skipped", "thread": "skipped"},
    ),
    "failing": ("int main(void) { return 1; }", {"address": "FAILED", "thread": "FAILED"}),
    "warned": ("int main(void) { int unused; return 0; }", {"address": "FAILED"}),
    "overrun": (
        "#include <stdlib.h>\n"
        "int main(int n, char **v) { (void)v; char *p = malloc(8); p[7 + n] = 1; free(p);"
        " return 0; }",
        {"address": "FAILED"},
    ),
    "leak": (
        "#include <stdlib.h>\nvoid *volatile p;\n"
        "int main(void) { p = malloc(8); p = 0; return 0; }",
        {"address": "FAILED"},
    ),
    "overflow": (
        "#include <limits.h>\nint main(int n, char **v) { (void)v; int x = INT_MAX; x += n;"
        " return x == 7; }",
        {"address": "FAILED"},
    ),
    "race": (
        "#include <pthread.h>\nstatic int shared;\n"
        "static void *add(void *unused) { (void)unused; shared++; return 0; }\n"
        "int main(void) { pthread_t a, b; pthread_create(&a, 0, add, 0);"
        " pthread_create(&b, 0, add, 0); pthread_join(a, 0); pthread_join(b, 0); return 0; }",
        {"thread": "FAILED"},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_runner_tells_right_from_wrong(name: str, tmp_path: Path) -> None:
    """A tiny driver with one known fault each."""
    program, expected = PROGRAMS[name]
    driver = tmp_path / f"{name}_driver.c"
    driver.write_text(f"/* sources: */\n{program}\n")
    outcomes = {sanitizer: run(driver, sanitizer, into=tmp_path) for sanitizer in expected}
    assert {s: o.verdict for s, o in outcomes.items()} == expected, outcomes


def test_a_driver_without_its_comment_is_refused(tmp_path: Path) -> None:
    """Instead of a linker's guess at what is missing."""
    driver = tmp_path / "bare_driver.c"
    driver.write_text("int main(void) { return 0; }\n")
    outcome = run(driver, "address", into=tmp_path)
    assert outcome.verdict == "FAILED"
    assert "sources:" in outcome.output
