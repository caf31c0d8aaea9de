"""Pieces that make a random model's vocabulary one in which JSON has long tokens, split in awkward places."""

from __future__ import annotations

WORDS = (
    '{"', '":', '": ', '",', '", "', '"}', '"]', "},", "}}", "]}", "[]", "{}", '["', ' "', " {", " [", " ", "  ", "\n ", ", ",
    "true", "false", "null", "tru", "12", "0.", "-1", "1e", "name", "age", "kind", "home", "wo", "rk", "value", "child", "ren",
    '\\"', "\\u", "00e9", "é", "né", "😀", "yes", "no", "2024", "-0", "first", "fi", "st", "the", " the", "Paris",
)  # fmt: skip
