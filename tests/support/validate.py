"""Running ``scripts/validate-kernel`` as its users do, and reading what it saved."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.process import tied_to_us

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "validate-kernel"


@dataclass(frozen=True)
class Run:
    """One run: exit status, standard output, and the records of ``--json`` without the header."""

    status: int
    output: str
    records: list[dict[str, object]]

    def ids(self, status: str) -> list[str]:
        return [str(r["case"]) for r in self.records if r["status"] == status]

    def explain(self) -> str:
        """What failed, with reasons."""
        failed = [f"{r['case']}: {r['reason']}" for r in self.records if r["status"] == "fail"]
        return "\n".join(failed) or self.output[-2000:]


def validate_kernel(*arguments: str, timeout_s: float = 110) -> Run:
    """Run the script with this interpreter; huge pages through the lock the other tests use."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as saved:
        command = [sys.executable, str(SCRIPT), "--journal", tempfile.gettempdir()]
        done = subprocess.run(
            tied_to_us([*command, "--json", saved.name, *arguments]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        lines = Path(saved.name).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return Run(done.returncode, done.stdout, [r for r in records if r["type"] == "case"])
