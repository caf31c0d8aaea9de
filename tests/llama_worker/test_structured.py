"""Grammars and schemas held to, in pure Python: against llama.cpp's own sampler, and against what a schema means."""

from __future__ import annotations

import ctypes
import json
import math
import random
import re
from typing import Any

import llama_cpp.llama_cpp as llama
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import RequestError
from gateway.llama_worker.native import Model, NativeLog
from gateway.llama_worker.structured.automaton import DEAD, Automaton, GrammarTooCostly
from gateway.llama_worker.structured.compiler import Compiler, read_wish
from gateway.llama_worker.structured.constraint import Structure
from gateway.llama_worker.structured.gbnf import GrammarError
from gateway.llama_worker.structured.json_rules import ANY_OBJECT
from gateway.llama_worker.structured.json_schema import UnsupportedSchema, schema_to_gbnf
from gateway.llama_worker.structured.regex import UnsupportedRegex, regex_to_gbnf
from gateway.llama_worker.structured.rules import parse
from gateway.llama_worker.structured.vocabulary import Vocabulary
from gateway.llama_worker.vocabulary import NativeVocabulary
from tests.llama_worker.words import WORDS
from tests.tiny_gguf import EOS, write_tiny_gguf

ADDRESS = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["home", "work", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}$"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": ["number", "null"]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
        }
    },
    "$ref": "#/$defs/node",
}
LOOSE = {
    "type": "object",
    "properties": {"first": {"type": "boolean"}, "fist": {"const": {"a": [1, "x"]}}},
    "additionalProperties": {"anyOf": [{"type": "number", "minimum": -2, "maximum": 3}, {"const": "none"}]},
}
SCHEMAS: list[Any] = [
    ADDRESS,
    TREE,
    LOOSE,
    {"type": "array", "minItems": 2, "items": {"type": "string", "format": "date"}},
]


def takes(grammar: str, text: str) -> bool:
    """Whether `text` is one of the texts of a grammar."""
    automaton = Automaton(parse(grammar))
    state, _ = automaton.run(automaton.start, text.encode())
    return state != DEAD and automaton.accepts(state)


def conforms(schema: Any, document: Any) -> bool:
    """Whether a document is one of a schema's: a second, straightforward reading of the keywords used here."""
    if schema is True or schema == {}:
        return True
    if "$ref" in schema:
        return conforms(TREE["$defs"]["node"], document)  # type: ignore[index]
    if "anyOf" in schema:
        return any(conforms(option, document) for option in schema["anyOf"])
    if "const" in schema:
        return bool(document == schema["const"])
    if "enum" in schema:
        return document in schema["enum"]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    by_kind = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    if not any(
        type(document) in (int, float) if kind == "number" else type(document) is by_kind[kind] for kind in kinds
    ):
        return False
    if isinstance(document, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", False)
        return set(schema.get("required", ())) <= document.keys() and all(
            conforms(known.get(name, more), value) if name in known or more else False
            for name, value in document.items()
        )
    if isinstance(document, list):
        fits = schema.get("minItems", 0) <= len(document) <= schema.get("maxItems", 10**9)
        return fits and all(conforms(schema["items"], item) for item in document)
    if isinstance(document, str):
        pattern = r"^\d{4}-\d\d-\d\d$" if schema.get("format") == "date" else schema.get("pattern", "")
        fits = schema.get("minLength", 0) <= len(document) <= schema.get("maxLength", 10**9)
        return fits and re.search(pattern, document) is not None
    if document is None:
        return True
    return bool(schema.get("minimum", -math.inf) <= document <= schema.get("maximum", math.inf))


def wander(automaton: Automaton, rng: random.Random) -> str:
    """A random text of the grammar, ended as soon as it may end and a coin says so."""
    state, text = automaton.start, bytearray()
    while not automaton.is_over(state):
        if automaton.accepts(state) and rng.random() < 0.5:
            break
        mask = automaton.first_bytes(state)
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        # What closes something is likelier than the rest, so that texts end.
        closing = [byte for byte in allowed if byte in b'"]}']
        byte = rng.choice(closing if closing and rng.random() < 0.3 + len(text) / 400 else allowed)
        state = automaton.step(state, byte)
        assert state != DEAD
        text.append(byte)
    return text.decode()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_text_of_a_schemas_grammar_is_one_of_its_documents(schema: Any) -> None:
    automaton = Automaton(parse(schema_to_gbnf(schema)))
    automaton.limit = 10**9
    seen = set()
    for seed in range(150):
        text = wander(automaton, random.Random(seed))
        assert conforms(schema, json.loads(text)), text
        seen.add(text)
    assert len(seen) > 75


def test_every_text_of_the_object_grammar_is_an_object_in_json() -> None:
    automaton = Automaton(parse(ANY_OBJECT))
    automaton.limit = 10**9
    for seed in range(300):
        assert isinstance(json.loads(wander(automaton, random.Random(seed))), dict)


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_object_in_json_is_a_text_of_the_object_grammar(document: dict[str, Any], escaped: bool) -> None:
    text = json.dumps(document, ensure_ascii=escaped).replace("\x7f", "\\u007f")
    assert takes(ANY_OBJECT, text)
    assert takes(ANY_OBJECT, json.dumps(document, ensure_ascii=escaped, indent=2).replace("\x7f", "\\u007f"))


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": "string"}, ['""', '"a\\"b"', '"é\\u00e9"', '"\\ud83d\\ude00"'], ['"\n"', '"\\ud83d"', "a", '"']),
        ({"type": "number"}, ["0", "-1.5", "2e10", "1E-5"], ["01", "1.", ".5", "+1", "1e999"]),
        ({"type": "string", "pattern": "b+"}, ['"abba"', '"b"'], ['"a"', '""']),
        ({"type": "string", "pattern": '^"\\\\$'}, ['"\\"\\\\"'], ['""', '"""', '"\\""']),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"éé"', '"\\n\\n\\n"'], ['"a"', '"abcd"']),
        ({"type": ["integer", "null"]}, ["1", "null"], ["1.0", '"1"']),
        ({"enum": ["a", 1, [2, {"b": None}]]}, ['"a"', "1", '[2, {"b": null}]', '[2,{"b":null}]'], ['"b"', "[2]"]),
        ({"enum": ["a", 1], "type": "integer"}, ["1"], ['"a"']),
        ({"const": 'say "é"\\'}, ['"say \\"é\\"\\\\"'], ['"say"']),
        ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1]", "[1, 2,3]"], ["[1,]", "[,]", '["a"]']),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, ["[1]"], ["[]", "[1, 1]"]),
        ({"type": "array", "items": {}, "minItems": 2}, ['[1, {"a": []}]', "[1,2,3]"], ["[1]", "[]"]),
        ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, ['{"b":1}', '{"a":[],"b":1}'], ["{}", '{"a":1}', "1"]),
        (LOOSE, ["{}", '{"firs":3,"":-1.5}', '{"first":true,"x":"none"}'], ['{"first":3}', '{"x":4}', '{"x":-2.5}']),
        ({"anyOf": [{"minLength": 1}, {"maximum": 3}], "type": "string"}, ['"a"'], ["1"]),
        ({}, ["1", "null", '{"a":[]}'], ["nul", ""]),
    ],
)
def test_a_schema_takes_and_refuses(schema: Any, taken: list[str], refused: list[str]) -> None:
    grammar = schema_to_gbnf(schema)
    assert [text for text in taken if not takes(grammar, text)] == []
    assert [text for text in refused if takes(grammar, text)] == []


@given(st.integers(-(10**6), 10**6), st.integers(0, 3000), st.booleans(), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_bounds_hold_for_integers_and_decimals(
    low: int, width: int, open_low: bool, open_high: bool, data: st.DataObject
) -> None:
    high = low + width + 2
    bounds = {"exclusiveMinimum" if open_low else "minimum": low, "exclusiveMaximum" if open_high else "maximum": high}
    whole = data.draw(st.integers(low - 20, low + 20) | st.integers(high - 20, high + 20) | st.integers())
    within = (low < whole if open_low else low <= whole) and (whole < high if open_high else whole <= high)
    for kind in ("integer", "number"):
        assert takes(schema_to_gbnf({"type": kind, **bounds}), str(whole)) == within
    decimal = whole + data.draw(st.sampled_from([0.5, 0.25, 0.0]))
    within = (low < decimal if open_low else low <= decimal) and (decimal < high if open_high else decimal <= high)
    text = f"{decimal:.2f}"
    assert takes(schema_to_gbnf({"type": "number", **bounds}), text) == within


@pytest.mark.parametrize(
    ("schema", "where", "keyword"),
    [
        (
            {"type": "object", "properties": {"age": {"type": "integer", "multipleOf": 3}}},
            ("properties", "age"),
            "multipleOf",
        ),
        ({"type": "array", "items": {"not": {}}}, ("items",), "not"),
        (
            {"anyOf": [{"type": "string"}, {"type": "object", "patternProperties": {}}]},
            ("anyOf", "1"),
            "patternProperties",
        ),
        ({"allOf": [{}, {}]}, (), "allOf"),
        ({"$ref": "https://example.com/schema"}, (), "$ref"),
        ({"$ref": "#/$defs/none"}, (), "$ref"),
        ({"type": "text"}, (), "type"),
        ({"type": "string", "pattern": "(?=a)b"}, ("pattern",), "looking ahead"),
        ({"type": "string", "pattern": "("}, ("pattern",), "not valid"),
        ({"type": "string", "format": "color"}, (), "format"),
        ({"type": "string", "minLength": 10**9}, (), "minLength"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, (), "maxLength"),
        ({"type": "number", "minimum": 0.5}, (), "minimum"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, (), "maximum"),
        ({"type": "array", "uniqueItems": True}, (), "uniqueItems"),
        ({"enum": []}, (), "enum"),
        ({"properties": {"a": False}}, ("properties", "a"), "False"),
        ({"required": ["a"], "properties": {}, "additionalProperties": False}, (), "required"),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_its_path(schema: Any, where: tuple[str, ...], keyword: str) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        schema_to_gbnf(schema)
    assert f"In context={where!r}" in caught.value.message
    assert keyword in caught.value.message
    assert (caught.value.status, caught.value.param) == (400, "structured_outputs")


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(200),
        {"enum": ["x" * 300_000]},
        {"enum": list(range(30_000))},
        {"properties": {f"p{n}": {"type": "object", "properties": {}} for n in range(30_000)}},
        {"$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(5000)}, "$ref": "#/$defs/d0"},
        {"type": "string", "pattern": "^" + "(" * 1500},
        {"type": "string", "pattern": "a{19999}" * 20},
        {"type": "array", "minItems": 20_000, "items": {"type": "array", "minItems": 20_000, "items": {"maxLength": 19_999}}},
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    ],
    ids=["deep", "long", "many-values", "many-properties", "chain", "parentheses", "repeats", "sizes", "self", "loop"],
)  # fmt: skip
def test_a_hostile_schema_is_refused_or_small(schema: Any) -> None:
    try:
        grammar = parse(schema_to_gbnf(schema))
    except RequestError as error:
        assert len(error.message) < 1000
    else:
        assert len(grammar.masks) <= 60_000


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= root "a" | "b"', "left recursion"),
        ('root ::= a\na ::= "x"? b\nb ::= a "y"', "left recursion"),
        ("root ::= (a | b)\na ::= b\nb ::= a", "left recursion"),
        ("root ::= a", "no rule `a`"),
        ('other ::= "a"', "no rule `root`"),
        ('root ::= "a\nroot ::= "b"', "line 2"),
        ('root ::= "a"\nroot ::= "b"', "twice"),
        ("root ::= [a-z", "closing `]`"),
        ('root ::= "a', 'closing `"`'),
        ("root ::= (", "`)`"),
        ("root ::= *", "nothing before it"),
        ('root ::= "a"**', "parentheses"),
        ('root ::= "a"{3,2}', "impossible"),
        ('root ::= "a"{99999}', "20000"),
        ('root ::= "\\q"', "no escape"),
        ('root ::= "\\uD800"', "surrogate"),
        ("root ::= <think>", "not supported"),
        ("root = 5", "::="),
        ("", "no rule"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "deeper"),
        ('root ::= ("a" b){20000}\nb ::= [a-z]{20000}\nc ::= ("d" b){20000}', "60000"),
        ('root ::= "' + "a" * 300_000 + '"', "262144"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        parse(grammar)
    assert message in caught.value.message
    assert len(caught.value.message) < 400


def test_a_chain_that_doubles_at_each_rule_is_read_all_the_same() -> None:
    chain = [f'r{n} ::= r{n + 1} | r{n + 1} "x"' for n in range(60)]
    automaton = Automaton(parse("root ::= r0\n" + "\n".join([*chain, 'r60 ::= "y"'])))
    assert automaton.accepts(automaton.run(automaton.start, b"y" + b"x" * 60)[0])
    assert automaton.work < 10**5


def test_an_ambiguous_grammar_ends_its_request_and_its_work_is_bounded() -> None:
    ways = [f'w{n} ::= "[" root "]" t{n}\nt{n} ::= "{n}"?' for n in range(6)]
    automaton = Automaton(parse("root ::= " + " | ".join(f"w{n}" for n in range(6)) + "\n" + "\n".join(ways)))
    with pytest.raises(GrammarTooCostly):
        automaton.run(automaton.start, b"[" * 40)
    assert automaton.work < 10**5


def test_a_repetition_of_what_may_be_empty_goes_round_no_more_than_it_must() -> None:
    grammar = 'root ::= ("a"? "b"?)* "c"'
    assert takes(grammar, "c")
    assert takes(grammar, "abbac")
    assert not takes(grammar, "ab")


def test_a_rebuilt_automaton_goes_on_where_it_was() -> None:
    automaton = Automaton(parse(schema_to_gbnf(TREE)))
    begun = b'{"value": 1, "children": [{"value": null, "chil'
    state, taken = automaton.run(automaton.start, begun)
    assert taken == len(begun)
    fresh, state = automaton.rebuilt(state)
    state, _ = fresh.run(state, b'dren": []}]}')
    assert fresh.is_over(state)


@pytest.mark.parametrize(
    ("pattern", "taken", "refused"),
    [
        ("a|bc", ["a", "bc"], ["abc", ""]),
        (r"\d{2,3}-[^a-c\s]+\.", ["12-xyz.", "123-é."], ["1-x.", "12-a.", "12-x"]),
        (r"(?:x(?P<n>y)?)+?", ["x", "xyx"], ["y", ""]),
        (r"(?<year>[12]\d{3})", ["1999"], ["3999"]),
        (r"^.\W\\$", ["a-\\"], ["\n-\\", "aa\\"]),
        ("", [""], ["a"]),
        (r"[\]\^\-\"]+", ['^-]"'], ["a"]),
    ],
)
def test_a_regex_takes_what_the_re_module_takes(pattern: str, taken: list[str], refused: list[str]) -> None:
    grammar = f"root ::= {regex_to_gbnf(pattern)}"
    python = re.compile(pattern.replace("(?<year>", "(?P<year>"), re.ASCII)
    for text in taken + refused:
        assert takes(grammar, text) == (text in taken) == (python.fullmatch(text) is not None), text


@pytest.mark.parametrize(
    "pattern", [r"a\b", "(?!a)b", r"(a)\1", "(?i)a", "a{1,99999}", "[", "a" * 3000, r"a(?i:b)", "a$b"]
)
def test_a_regex_that_cannot_be_held_to_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedRegex):
        regex_to_gbnf(pattern)


@pytest.fixture(scope="module")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_tiny_gguf(tmp_path_factory.mktemp("words") / "model.gguf", words=WORDS)
    model = Model(path, NativeLog())
    yield model
    model.close()


NUL = 3  # the token of the byte 0, which ends a text in C


def is_text(before: bytes, piece: bytes) -> bool:
    """Whether `piece` goes on with a text in UTF-8, whole or up to the middle of a character; a NUL is none."""
    ends = [b"", *(first + b"\x80" * rest for first in (b"\x80", b"\xa0", b"\x90") for rest in range(3))]
    return bool(piece) and piece[0] != 0 and any(is_utf8(before + piece + end) for end in ends)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


ORACLE_GRAMMARS = [
    ANY_OBJECT,
    *map(schema_to_gbnf, SCHEMAS),
    'root ::= ("yes" | "no" | "né") [^a-y]{0,3} .',
    r'root ::= [é-ü\U0001F600-\U0001F64F]+ "!" | "\u00e9\n\t" # comment' + "\n",
    f"root ::= {regex_to_gbnf('[A-Za-z]+(, [A-Za-z]+)*')}",
]


@pytest.mark.parametrize("grammar", ORACLE_GRAMMARS)
def test_the_same_tokens_are_allowed_as_by_llama_cpps_own_sampler(word_model: Model, grammar: str) -> None:
    vocabulary = NativeVocabulary(word_model)
    structure = Structure(parse(grammar), Vocabulary(vocabulary.pieces()))
    pieces = vocabulary.pieces()
    native_vocab = llama.llama_model_get_vocab(word_model.pointer)
    data = (llama.llama_token_data * word_model.vocab_size)()
    steps = 0
    for seed in range(4):
        rng = random.Random(seed)
        sampler = llama.llama_sampler_init_grammar(native_vocab, grammar.encode(), b"root")
        constraint = structure.constraint([EOS])
        text = b""
        for _ in range(60):
            for token in range(word_model.vocab_size):
                data[token] = llama.llama_token_data(token, 0.0, 0.0)
            candidates = llama.llama_token_data_array(data, word_model.vocab_size, -1, False)
            llama.llama_sampler_apply(sampler, ctypes.byref(candidates))
            # It takes control tokens for their names, and bytes that are no UTF-8 for characters past the last one.
            theirs = {entry.id for entry in data if entry.logit == 0.0 and is_text(text, pieces[entry.id])}
            theirs |= {EOS} if data[EOS].logit == 0.0 else set()
            constraint.begin()
            ours = set(constraint.allowed().tolist()) - {NUL}
            assert ours == theirs
            constraint.begin()
            assert {token for token in range(word_model.vocab_size) if constraint.allows(token)} - {NUL} == theirs
            choices = sorted(theirs - {EOS}) or [EOS]
            token = rng.choice(choices)
            if token == EOS:
                assert constraint.ended
                break
            assert constraint.ended == (theirs == {EOS})
            llama.llama_sampler_accept(sampler, token)
            constraint.accept(token)
            text += pieces[token]
            steps += 1
        llama.llama_sampler_free(sampler)
    assert steps > 10


def test_a_wish_is_compiled_once_and_old_ones_are_forgotten() -> None:
    asked = []

    def pieces() -> list[bytes]:
        asked.append(1)
        return [b"a", b"b", b"{", b"}"]

    compiler = Compiler(pieces)
    wish = read_wish({"choice": ["a", "b"]})
    assert wish is not None
    assert compiler.known(wish) is None
    first = compiler.compile(wish)
    assert compiler.compile(wish) is compiler.known(wish) is first
    for number in range(40):
        other = read_wish({"regex": f"a{{{number}}}"})
        assert other is not None
        compiler.compile(other)
    assert compiler.known(wish) is None
    assert asked == [1]


@pytest.mark.parametrize(
    "value",
    [
        5,
        {},
        {"json": {}, "regex": "a"},
        {"lark": "a"},
        {"json": "{"},
        {"json": 5},
        {"regex": 5},
        {"choice": "a"},
        {"json_object": "yes"},
    ],
)
def test_a_wish_of_the_wrong_shape_is_refused(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        read_wish(value)
    assert caught.value.param == "structured_outputs"


def test_no_wish_is_none() -> None:
    assert read_wish(None) is None


@pytest.mark.parametrize(
    "value", [{"choice": []}, {"choice": [""]}, {"choice": [5]}, {"regex": "(?i)a"}, {"grammar": "?"}]
)
def test_a_wish_that_cannot_be_compiled_is_refused(value: Any) -> None:
    wish = read_wish(value)
    assert wish is not None
    with pytest.raises(RequestError) as caught:
        Compiler(lambda: [b"a"]).compile(wish)
    assert caught.value.param == "structured_outputs"
