"""A JSON list is read item by item: the same values wherever the pieces of the file are cut, and whatever is wrong named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.json_list import split_list
from trainer.data.jsonl import parse_line, read_lines
from trainer.data.lines import BadLine, Line, Raw

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


class Dripping(io.BytesIO):
    """Gives a few bytes at a time."""

    def __init__(self, content: bytes, piece: int) -> None:
        super().__init__(content)
        self._piece = piece

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self._piece)


def found_in(content: bytes, tmp_path: Path, limit_bytes: int = 1 << 20) -> list[Any]:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    return [line.value if isinstance(line, Line) else str(line) for line in read_lines(path, limit_bytes)]


@settings(max_examples=30, deadline=None)
@given(st.lists(VALUES, max_size=4), st.sampled_from([None, 2]), st.integers(1, 9))
def test_the_items_are_those_of_the_list(values: list[Any], indent: int | None, piece: int) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=indent is None).encode("utf-8", "surrogatepass")
    raws = list(split_list(Dripping(content, piece), 1 << 20))
    assert [json.loads(raw.content) for raw in raws if isinstance(raw, Raw)] == json.loads(content)
    assert [raw.item for raw in raws] == list(range(1, len(values) + 1))


def test_each_item_has_the_line_that_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps([{"a": "b\n"}, [1], {}], indent=1).replace("\n", "\r\n").encode())
    assert [(line.number, line.item) for line in read_lines(path)] == [(3, 1), (6, 2), (9, 3)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[]", []),
        (b" [ \n ] ", []),
        (b"[{},]", [{}, "Item 2 (line 1): is empty: there is a comma"]),
        (b"[,{}]", ["Item 1 (line 1): is empty: there is a comma", {}]),
        (b'[{},\n{"a', [{}, "Line 1: begins an item that is not closed"]),
        (b"[{}]\n{}", [{}, "Line 2: goes on after the end of the list"]),
        (b"[{}, 1}, {}]", [{}, "Item 2 (line 1): is not JSON: Extra data", {}]),
        (
            b'[{"a": NaN},\n\n{"a": 1, "a": 2}]',
            ["Item 1 (line 1): holds NaN", "Item 2 (line 3): has the key 'a' twice"],
        ),
        (b'["caf\xe9"]', ["Item 1 (line 1): byte 5 (0xe9) is not UTF-8"]),
        (b"[" * 1900 + b"]" * 1900 + b"\n", ["Item 1 (line 1): is nested too deeply"]),
        (b"[{}," + b"[" * 9000, [{}, "Item 2 (line 1): is nested too deeply"]),
        (b'[{"a": "' + b"x\n" * (1 << 20) + b'"},\n{}]', ["Item 1 (line 1): is longer than 1 MiB", {}]),
    ],
    ids=range(12),
)
def test_what_is_wrong_with_a_list_is_named(content: bytes, found: list[Any], tmp_path: Path) -> None:
    for said, expected in zip(found_in(content, tmp_path), found, strict=True):
        assert said == expected if isinstance(expected, dict) else str(said).startswith(expected)


def test_a_line_of_its_own_that_begins_like_a_list_is_one_item_of_no_form() -> None:
    assert parse_line(BadLine(3, "is not JSON")) == BadLine(3, "is not JSON")


MEASURED = """
import sys
from pathlib import Path
from trainer.data.jsonl import read_lines
count = sum(1 for _ in read_lines(Path(sys.argv[1])))
peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(count, peak.split()[1])
"""


@pytest.mark.parametrize("kind", ["lines", "list", "one string", "nesting"])
def test_reading_takes_the_same_memory_however_large_the_file_is(kind: str, tmp_path: Path) -> None:
    peaks = []
    for megabytes in (2, 50):
        path = tmp_path / f"{megabytes}.json"
        item = json.dumps({"messages": [], "note": "x" * 100_000}).encode()
        with path.open("wb") as file:
            file.write({"lines": b"", "list": b"[", "one string": b'[{"a": "', "nesting": b"[" * 10_000}[kind])
            for number in range(megabytes * 10):
                piece = {"one string": b"x" * 100_000, "nesting": b"[" * 100_000}.get(kind, item)
                file.write((b",\n" if kind == "list" and number else b"") + piece + (b"\n" if kind == "lines" else b""))
            file.write(b"]" if kind == "list" else b"")
        done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
        count, peak = map(int, done.stdout.split())
        assert count == (megabytes * 10 if kind in ("lines", "list") else 1)
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 24 << 10, "KiB: three times what one line may have; the file is 50 MB"
