"""Write protection of anonymous pages that were never touched."""

from scripts.validate.actors import Sleeper, next_fault
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.check import expect, same
from scripts.validate.host import feature
from scripts.validate.kinds import PAGE
from uffd import Advice, Feature, Mode


@case("unit", on=["anon"], needs=[feature(Feature.WP_UNPOPULATED)])
def wp_unpopulated(bench: Bench) -> None:
    """With the feature, protecting a never-touched anonymous page marks it; unprotecting clears
    the mark, DONTNEED clears it, a later write is then unprotected; reading a marked hole works.
    """
    uffd, memory = bench.registered(Mode.WP, Feature.WP_UNPOPULATED)
    page = memory.address
    uffd.write_protect(memory)
    expect(entry(page).is_write_protected, "protecting marks the hole")
    uffd.write_unprotect(memory)
    expect(not entry(page).is_write_protected, "unprotecting clears the mark")
    uffd.write_protect(memory)
    memory.advise(Advice.DONTNEED)
    expect(not entry(page).is_write_protected, "DONTNEED clears the mark")
    memory.store(0, 1)  # would sleep for ever if protected
    expect(not entry(page).is_write_protected, "a later write is unprotected")

    uffd.write_protect(memory)
    same(memory.load(PAGE), 0, "byte read from a marked hole")
    expect(entry(memory.page(1)).is_write_protected, "the mark stays after the read")
    writer = Sleeper(lambda: memory.store(2 * PAGE, 3))
    fault = next_fault(uffd)
    same((fault.address, int(fault.flags)), (memory.page(2), 3), "message of a write to a hole")
    uffd.write_unprotect(memory.page(2), PAGE)
    writer.join("the writer")


@case("unit", on=["anon"], needs=[feature(Feature.WP_UNPOPULATED)])
def wp_unpopulated_unasked(bench: Bench) -> None:
    """Without the feature anonymous holes are skipped: the first write passes unseen."""
    uffd, memory = bench.registered(Mode.WP)
    uffd.write_protect(memory)
    expect(not entry(memory.address).is_write_protected, "the hole is not marked")
    memory.store(0, 1)
    same(memory.load(0), 1, "byte written")
    expect(not uffd.wait(0), "no message comes")
