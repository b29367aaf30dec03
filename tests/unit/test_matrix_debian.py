"""Which package holds a kernel, and where it lies once unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.matrix.debian import FetchError, find, newest

NAMES = [
    "linux-image-cloud-amd64",
    "linux-image-6.1.0-9-cloud-amd64",
    "linux-image-6.1.0-50-cloud-amd64",
    "linux-image-6.1.0-50-cloud-amd64-dbg",
    "linux-image-6.12.88+deb12-cloud-amd64",
    "linux-image-6.12.88+deb12-cloud-amd64-unsigned",
    "linux-headers-6.12.99+deb12-cloud-amd64",
    "linux-image-7.3.4+deb13-cloud-amd64",
    "linux-binary-7.3.4+deb13-cloud-amd64",
    "linux-modules-7.3.4+deb13-cloud-amd64",
    "linux-base-7.3.4+deb13-cloud-amd64",
]


@pytest.mark.parametrize(
    ("series", "packages"),
    [
        ("6.1", ["linux-image-6.1.0-50-cloud-amd64"]),  # by number, not by letter; not 6.12
        ("6.12", ["linux-image-6.12.88+deb12-cloud-amd64"]),
        (
            "7.3",
            ["linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"],
        ),
    ],
)
def test_the_newest_of_a_series(series: str, packages: list[str]) -> None:
    assert newest(NAMES, series) == packages


def test_a_series_nobody_has() -> None:
    with pytest.raises(FetchError, match=r"linux-image-5\.10"):
        newest(NAMES, "5.10")


@pytest.mark.parametrize(
    ("modules", "kernel"),
    [
        ("lib/modules/6.1.0-50", "boot/vmlinuz-6.1.0-50"),
        ("usr/lib/modules/7.3.4", "usr/lib/modules/7.3.4/vmlinuz"),
    ],
)
def test_where_a_kernel_lies(tmp_path: Path, modules: str, kernel: str) -> None:
    for name in (f"{modules}/kernel/x.ko", kernel):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find("s", tmp_path)
    assert (found.vmlinuz, found.modules) == (tmp_path / kernel, tmp_path / modules)
    assert found.release == Path(modules).name


def test_half_a_kernel(tmp_path: Path) -> None:
    (tmp_path / "lib/modules/6.1.0-50").mkdir(parents=True)
    with pytest.raises(FetchError, match="--refresh"):
        find("6.1", tmp_path)
