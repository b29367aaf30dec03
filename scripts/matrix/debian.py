"""Kernels from Debian's packages: fetched beside the machine's own, never installed.

apt runs with a state of its own, so that the machine's sources stay as they are; the mirror is the
one they name. Versions move: the newest package of a series is looked up, none is pinned.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Where a series lives. Another series is looked for in all of them.
_SUITES = {
    "5.10": ("bullseye", "bullseye-security"),
    "6.1": ("bookworm", "bookworm-security"),
    "6.12": ("bookworm-backports", "trixie", "trixie-security"),
    "7.3": ("trixie-backports",),
}
# The small build for virtual machines: boots fastest, and has every option the cases need.
_FLAVOUR = "cloud-amd64"


class FetchError(Exception):
    """A package, a mirror or a tool is missing; the text says which, and the remedy."""


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel. ``modules`` is the folder named like the release."""

    series: str
    release: str
    vmlinuz: Path
    modules: Path


def mirrors() -> tuple[str, str | None]:
    """The machine's archive and its security archive.

    :raises FetchError: no apt, or it knows none.
    """
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = _uris(command)
    if not found and os.geteuid() == 0:  # a new machine has no package lists yet
        subprocess.run(["apt-get", "-qq", "update"], capture_output=True)
        found = _uris(command)
    main = next((uri for uri in found if "security" not in uri), None)
    if main is None:
        raise FetchError("this machine's apt knows no mirror; run: apt-get update")
    return main, next((uri for uri in found if "security" in uri), None)


def _uris(command: Sequence[str]) -> list[str]:
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise FetchError(f"needs a Debian host with apt: {error}") from None
    return [uri for uri in dict.fromkeys(out.split()) if not uri.startswith("file:")]


def latest(series: str, suite: str) -> list[str]:
    """The packages of a suite that hold its newest kernel of ``series``.

    :raises FetchError: there is none.
    """
    with tempfile.TemporaryDirectory(prefix="apt-") as folder:
        return _Apt(Path(folder), [suite]).newest(series)


def fetch(series: str, cache: Path, *, refresh: bool = False) -> Kernel:
    """The newest kernel of ``series``, from the cache when it was fetched before.

    :param refresh: look again whether there is a newer one.
    :raises FetchError: there is none, or it cannot be had.
    """
    home = cache / "kernels" / series
    if refresh:
        shutil.rmtree(home, ignore_errors=True)
    if not home.exists():
        apt = _Apt(cache / "apt" / series, _SUITES.get(series))
        packages = apt.newest(series)
        new = home.with_name(f"{series}.new.{os.getpid()}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            apt.unpack(packages, new)
            new.rename(home)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return find(series, home)


def find(series: str, home: Path) -> Kernel:
    """The kernel in an unpacked tree. From 7.2 on it lies with its modules, before in ``boot``.

    :raises FetchError: it holds none.
    """
    modules = next(
        iter(sorted([*home.glob("lib/modules/*"), *home.glob("usr/lib/modules/*")])), None
    )
    if modules is not None:
        beside = modules / "vmlinuz", home / "boot" / f"vmlinuz-{modules.name}"
        for vmlinuz in beside:
            if vmlinuz.is_file():
                return Kernel(series, modules.name, vmlinuz, modules)
    raise FetchError(f"{home} holds no kernel with modules; --refresh fetches it again")


def newest(names: Iterable[str], series: str) -> list[str]:
    """Of package names the ones that hold the newest kernel of ``series``.

    :raises FetchError: none does.
    """
    pattern = re.compile(rf"linux-(image|binary|modules)-({re.escape(series)}\.[^ ]*-{_FLAVOUR})")
    releases: dict[str, dict[str, str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            releases.setdefault(match[2], {})[match[1]] = name
    if not releases:
        raise FetchError(f"no linux-image-{series}.*-{_FLAVOUR} in these sources")
    parts = releases[
        max(releases, key=lambda release: [int(n) for n in re.findall(r"\d+", release)])
    ]
    # Split from 7.2 on; the image is an empty package then.
    return [parts["binary"], parts["modules"]] if "binary" in parts else [parts["image"]]


class _Apt:
    """apt with sources and a state of its own."""

    def __init__(self, folder: Path, suites: Sequence[str] | None) -> None:
        if not _KEYRING.is_file():
            raise FetchError(f"no {_KEYRING}; run: apt-get install debian-archive-keyring")
        for needed in ("lists/partial", "cache/archives/partial", "none"):
            (folder / needed).mkdir(parents=True, exist_ok=True)
        main, security = mirrors()
        lines = []
        for suite in suites or [name for group in _SUITES.values() for name in group] + ["sid"]:
            uri = security if suite.endswith("-security") else main
            if uri is not None:
                lines.append(f"deb [signed-by={_KEYRING}] {uri} {suite} main\n")
        (folder / "sources.list").write_text("".join(lines))
        (folder / "apt.conf").write_text(_configuration(folder))
        self._environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}

    def newest(self, series: str) -> list[str]:
        # A suite the mirror no longer has must not keep the others from being read.
        self._run("apt-get", "-qq", "update", may_fail=True)
        out = self._run("apt-cache", "search", "--names-only", f"^linux-.*-{_FLAVOUR}$")
        return newest((line.split(" ")[0] for line in out.splitlines()), series)

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        self._run("apt-get", "-qq", "download", *packages, cwd=into)
        for archive in sorted(into.glob("*.deb")):
            self._run("dpkg-deb", "-x", str(archive), str(into))
            archive.unlink()

    def _run(self, *command: str, cwd: Path | None = None, may_fail: bool = False) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=self._environment, capture_output=True, text=True
        )
        if done.returncode and not may_fail:
            raise FetchError(f"{' '.join(command)}: {done.stderr.strip()[-600:]}")
        return done.stdout


def _configuration(folder: Path) -> str:
    return "".join(
        f'{name} "{value}";\n'
        for name, value in (
            ("Dir::Etc::sourcelist", folder / "sources.list"),
            ("Dir::Etc::sourceparts", folder / "none"),
            ("Dir::Etc::preferencesparts", folder / "none"),
            ("Dir::State::lists", folder / "lists"),
            ("Dir::Cache", folder / "cache"),
            ("Dir::State::status", "/dev/null"),
            ("APT::Sandbox::User", "root"),
            ("Acquire::http::Timeout", "30"),
            ("Acquire::Retries", "1"),
        )
    )
