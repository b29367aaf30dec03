"""Guard regions together with userfaultfd."""

from scripts.validate.actors import loading, next_fault
from scripts.validate.bench import Bench, marked
from scripts.validate.case import case
from scripts.validate.cases.guard import GUARDS, PAGES, expect_guards, install, is_guarded, remove
from scripts.validate.check import expect, refused, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import PAGE
from uffd import Feature, Mode, PageAlreadyPresent, touch

_MEMORIES = ("anon", "shmem", "shmem-private")


@case("guard", on=_MEMORIES, needs=[GUARDS], needs_of=mode(Mode.MISSING), name="uffd-missing")
def uffd_missing(bench: Bench) -> None:
    """In a range registered for missing faults a guarded page stops the access without a message;
    without the guard it is an ordinary missing fault again.
    """
    uffd, memory = bench.registered(pages=PAGES)
    install(memory, 1)
    with touch.guarded_accesses():
        expect(is_guarded(memory.page(1)), "the page is guarded")
    same(uffd.read_events(), [], "messages about the guarded page")
    remove(memory, 1)
    reader = loading(memory.page(1))
    same(next_fault(uffd).address, memory.page(1), "address of the fault without the guard")
    uffd.copy(memory.page(1), bench.page(1))
    same(reader.join(), bench.page(1)[0], "byte read")


@case("guard", on=_MEMORIES, needs=[GUARDS], needs_of=mode(Mode.MISSING), name="uffd-copy")
def uffd_copy(bench: Bench) -> None:
    """COPY onto a guard either replaces it (up to 7.2) or says that something exists (7.3), never
    half of both.
    """
    uffd, memory = bench.registered(pages=PAGES)
    install(memory, 1)
    try:
        uffd.copy(memory.page(1), bench.page(1))
        answer = "replaces the guard"
    except PageAlreadyPresent:
        answer = "EEXIST"
    bench.either("COPY onto a guard", answer, up_to_7_2="replaces the guard", from_7_3="EEXIST")
    with touch.guarded_accesses():
        same(is_guarded(memory.page(1)), answer == "EEXIST", "the guard is still there")
    if answer != "EEXIST":
        bench.holds(memory, 1, bench.page(1))


@case(
    "guard",
    on=_MEMORIES,
    needs=[GUARDS, feature(Feature.WP_ASYNC)],
    needs_of=mode(Mode.WP),
    name="uffd-wp",
)
def uffd_wp(bench: Bench) -> None:
    """Protecting and unprotecting a range with guards in it keeps the guards, marks the other
    pages, and no access to a guard is reported.
    """
    uffd, memory = bench.registered(Mode.WP, pages=PAGES)
    memory.write(0, bytes([1]) * memory.length)
    install(memory, 2, 2)
    uffd.write_protect(memory)
    same(
        [i for i, m in enumerate(marked(memory)) if m and i not in (2, 3)],
        [0, 1, 4, 5, 6, 7],
        "marked pages beside the guards",
    )
    with touch.guarded_accesses():
        expect(is_guarded(memory.page(2), write=True), "the guard stops a write")
    same(uffd.read_events(), [], "messages")
    uffd.write_unprotect(memory)
    expect_guards(memory, {2, 3}, "after unprotecting", write=True)


@case("guard", on=["anon"], needs=[GUARDS, feature(Feature.POISON)], name="uffd-poison")
def uffd_poison(bench: Bench) -> None:
    """POISON where a guard is says that something exists; a guard over poison replaces it."""
    uffd, memory = bench.registered(pages=PAGES)
    install(memory, 1)
    with refused(17, what="POISON of a guarded page"):
        uffd.poison(memory.page(1), PAGE)
    uffd.poison(memory.page(2), PAGE)
    install(memory, 2)
    with touch.guarded_accesses():
        found = {i for i in (1, 2) if is_guarded(memory.page(i))}
    same(found, {1, 2}, "guarded pages")
