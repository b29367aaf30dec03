"""Whether a case can fail at all: it is run on broken kernels until it catches a defect."""

from collections.abc import Iterable, Iterator

from scripts.validate import mutants
from scripts.validate.case import Case
from scripts.validate.host import Host
from scripts.validate.runner import FAIL, PASS, Result, run_case


def catch(case: Case, host: Host) -> Result:
    """Passes when the case passes on this kernel and fails on a broken one; the remark says which
    defect it caught, and how.
    """
    healthy = run_case(case, host)
    if healthy.status != PASS:
        return healthy
    seconds = healthy.seconds
    for name in mutants.of_family(case.family):
        broken = run_case(case, host, mutant=name)
        seconds += broken.seconds
        if broken.status == FAIL:
            remark = f"catches {name}: {broken.reason.splitlines()[0]}"
            return Result(case.id, PASS, seconds, checks=healthy.checks, remarks=[remark])
    tried = ", ".join(mutants.of_family(case.family))
    return Result(case.id, FAIL, seconds, f"catches none of {tried}")


def catch_all(cases: Iterable[Case], host: Host) -> Iterator[Result]:
    """One after the other."""
    return (catch(case, host) for case in cases)
