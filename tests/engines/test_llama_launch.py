"""What a llama worker is started with."""

from __future__ import annotations

import pytest

from gateway.engines.llama_launch import huge_pages

OURS = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"GLIBC_TUNABLES": OURS}),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, {"GLIBC_TUNABLES": f"glibc.malloc.tcache_count=0:{OURS}"}),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),  # somebody's own wish
    ],
)
def test_huge_pages_are_asked_for_beside_what_is_set(given: dict[str, str], added: dict[str, str]) -> None:
    assert huge_pages(given) == added
