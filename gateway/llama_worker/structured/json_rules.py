"""The rules that every grammar of JSON shares, and the known formats of strings. Pure."""

from __future__ import annotations

_HEX = "[0-9a-fA-F]"
COMMON = f"""\
ws ::= (" " | "\\n" [ \\t]{{0,20}})?
char ::= [^"\\\\\\x00-\\x1F\\x7F] | "\\\\" (["\\\\/bfnrt] | "u" unicode)
unicode ::= [0-9a-cA-CefEF] {_HEX}{{3}} | [dD] [0-7] {_HEX}{{2}} | [dD] [89abAB] {_HEX}{{2}} "\\\\u" [dD] [c-fC-F] {_HEX}{{2}}
string ::= "\\"" char* "\\""
integer ::= "-"? ("0" | [1-9] [0-9]{{0,15}})
number ::= integer ("." [0-9]{{1,16}})? ([eE] [-+]? [0-9]{{1,2}})?
boolean ::= "true" | "false"
null ::= "null"
object ::= "{{" ws (string ":" ws value ("," ws string ":" ws value)* ws)? "}}"
array ::= "[" ws (value ("," ws value)* ws)? "]"
value ::= object | array | string | number | boolean | null
key-char ::= [^"\\\\\\x00-\\x1F\\x7F]
"""
# Where words begin with their space, a reply does too; it is no part of the document, and JSON allows it.
ANY_OBJECT = 'root ::= " "? object\n' + COMMON

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]{1,4}Y)?([0-9]{1,4}M)?([0-9]{1,4}D)?T[0-9]{1,4}[HMS]|P[0-9]{1,4}[YMWD]",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL})+",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": "([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}",
    "uuid": "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
}
