"""Templates registered at run time, in the settings and through the API, on a real server: who is rendered through which."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastchat.conversation import Conversation, SeparatorStyle, get_conv_template

from gateway.bases import PreparedBase, prepare
from gateway.chat.bundle import Bundle, make_bundle
from gateway.chat.conversation import Message
from gateway.chat.render import render_prompt
from gateway.engines.catalog import Base, Catalog, TunedModel
from gateway.engines.client import Deadlines
from gateway.errors import RequestError, SettingsError
from gateway.settings import load_settings
from gateway.store.database import Store
from gateway.templates import Templates, settings_entries
from gateway.wire.templates import parse_registration
from tests.engines.parts import At, pool_of
from tests.server import Server
from tests.tiny_model import write_tiny_model
from tests.tiny_tokenizers import sentencepiece_like

BASE = "tunegate-demo"
JINJA = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OWN = """
[bases.tunegate-demo]
path = "{demo}"

[bases.brought]
path = "{brought}"
template = "model"

[bases.other]
path = "{demo}"
template = "of-the-house"
options = {{ system = "Be quick.", date = 2026-01-02 }}

[templates.of-the-house]
system_template = "<<{{system_message}}>>"
system_message = "Be kind."
roles = ["Q", "A"]
sep_style = "ADD_COLON_TWO"
sep = " "
sep2 = "</s>"
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a template in its settings, and a base that names it."""
    demo = Path(__file__).resolve().parent.parent / "deploy" / "demo_model"
    folder = tmp_path_factory.mktemp("templates")
    brought = shutil.copytree(demo, folder / "brought", ignore=shutil.ignore_patterns("*.py", "*.md"))
    (brought / "chat_template.jinja").write_text(JINJA)
    running = Server(folder, OWN.format(demo=demo, brought=brought))
    try:
        yield running.start()
    finally:
        running.stop()


def call(server: Server, method: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request(method, f"{server.base_url}{path}", json=body, timeout=60)


def conversation_of(server: Server, model: str) -> dict[str, Any]:
    address = server.base_url.removesuffix("/v1")
    response = httpx.get(f"{address}/worker_get_conversation_template", params={"model": model}, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def prompt_tokens(server: Server, model: str = BASE) -> int:
    reply = server.client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Repeat after me: hello."}], max_tokens=1
    )
    assert reply.usage is not None
    return reply.usage.prompt_tokens


def fastchat_body(name: str, **fields: Any) -> dict[str, Any]:
    source = {"system_template": "{system_message}", "roles": ["Human", "Bot"], "sep_style": "ADD_COLON_TWO"}
    return {"name": name, "kind": "fastchat", "source": source | {"sep": " ", "sep2": "</s>"} | fields}


def test_built_in_templates_are_listed_with_their_version_and_the_bases_that_use_them(server: Server) -> None:
    listed = {template["id"]: template for template in call(server, "GET", "/templates").json()["data"]}
    vicuna = listed["vicuna_v1.1"]
    assert vicuna["origin"] == "built-in" and vicuna["kind"] == "fastchat" and vicuna["version"].startswith("sha256:")
    assert [base["id"] for base in vicuna["bases"]] == [BASE]
    assert "source" not in vicuna and listed["chatml"]["bases"] == []
    whole = call(server, "GET", "/templates/vicuna_v1.1").json()
    assert whole["source"]["roles"] == ["USER", "ASSISTANT"]


def test_an_unknown_template_is_404_and_named(server: Server) -> None:
    for method in ("GET", "DELETE"):
        response = call(server, method, "/templates/no-such")
        assert response.status_code == 404 and "'no-such'" in response.json()["error"]["message"]


def test_a_registered_template_is_kept_over_a_restart_and_can_be_deleted(own: Server) -> None:
    made = call(own, "POST", "/templates", {"name": "mine", "kind": "jinja", "source": JINJA})
    assert made.status_code == 200, made.text
    assert made.json()["origin"] == "api" and made.json()["bases"] == []
    again = call(own, "POST", "/templates", {"name": "mine", "kind": "jinja", "source": JINJA})
    assert again.json() == made.json(), "asking again for the same changes nothing"
    own.stop()
    own.start()
    assert call(own, "GET", "/templates/mine").json() == made.json()
    assert call(own, "DELETE", "/templates/mine").json() == {"id": "mine", "object": "template", "deleted": True}
    assert call(own, "GET", "/templates/mine").status_code == 404


def test_a_name_is_overridden_on_purpose_only_and_its_base_is_rendered_through_it_at_once(own: Server) -> None:
    before, tokens = conversation_of(own, BASE), prompt_tokens(own)
    body = fastchat_body("vicuna_v1.1", system_message="One two three four five six seven eight nine ten eleven. " * 4)
    refused = call(own, "POST", "/templates", body)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "template_exists"
    assert conversation_of(own, BASE) == before
    made = call(own, "POST", "/templates", body | {"override": True}).json()
    assert made["overrides"] == "built-in" and [base["id"] for base in made["bases"]] == [BASE]
    try:
        assert conversation_of(own, BASE)["conv"]["roles"] == ["Human", "Bot"]
        assert prompt_tokens(own) > tokens + 20
    finally:
        assert call(own, "DELETE", "/templates/vicuna_v1.1").status_code == 200
    assert conversation_of(own, BASE) == before and prompt_tokens(own) == tokens


def test_a_base_whose_settings_name_a_template_of_the_settings_is_rendered_through_it(own: Server) -> None:
    shown = call(own, "GET", "/templates/of-the-house").json()
    assert shown["origin"] == "settings" and [base["id"] for base in shown["bases"]] == ["other"]
    assert conversation_of(own, "other")["conv"]["system_message"] == "Be kind."
    refused = call(own, "DELETE", "/templates/of-the-house")
    assert refused.status_code == 400 and "settings" in refused.json()["error"]["message"]
    assert prompt_tokens(own, "other") != prompt_tokens(own, BASE)


def test_render_options_of_a_base_are_part_of_its_bundle(own: Server) -> None:
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    found = call(own, "POST", "/fine_tuning/preview", {"model": "other", "lines": lines}).json()
    runs = found["data"][0]["sequences"][0]["runs"]
    assert "<<Be quick.>>" in "".join(run["text"] for run in runs if not run["trained"])
    (base,) = call(own, "GET", "/templates/of-the-house").json()["bases"]
    assert base == {"id": "other", "version": found["template"]["version"]}


def test_a_base_may_be_rendered_through_the_template_that_its_model_brings(own: Server) -> None:
    shown = conversation_of(own, "brought")
    assert (shown["name"], shown["kind"], shown["source"]["template"]) == ("model", "jinja", JINJA)
    assert shown["source"]["tokens"]["eos_token"] == "</s>" and "conv" not in shown
    listed = call(own, "GET", "/templates/brought:model").json()
    assert listed["origin"] == "model" and [base["id"] for base in listed["bases"]] == ["brought"]
    assert listed["version"] == shown["version"]
    assert 0 < prompt_tokens(own, "brought") < prompt_tokens(own), "it has no system text of its own"


@pytest.mark.parametrize("form", ["text", "list", "file", "none"])
def test_a_models_own_template_is_found_where_models_keep_it(tmp_path: Path, form: str) -> None:
    source = write_tiny_model(tmp_path / "source")
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    if form == "text":
        config["chat_template"] = JINJA
    elif form == "list":
        config["chat_template"] = [{"name": "default", "template": JINJA}, {"name": "tool_use", "template": JINJA}]  # type: ignore[assignment]
    elif form == "file":
        (source / "chat_template.jinja").write_text(JINJA)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    making = prepare("tiny", source, "model", tmp_path / "bases/tiny")
    if form == "none":
        with pytest.raises(SettingsError, match="brings no chat template"):
            asyncio.run(making)
        return
    base = asyncio.run(making)
    assert base.template == "model"
    written = json.loads((base.path / "template.json").read_bytes())
    template = written["source"]["template"]
    assert (template if form != "list" else template["default"]) == JINJA
    assert written["source"]["tokens"] == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_model_with_a_sentencepiece_file_alone_is_prepared_with_the_same_ids(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    whole = asyncio.run(prepare("tiny", source, "vicuna_v1.1", tmp_path / "bases/whole"))
    (source / "tokenizer.json").unlink()
    converted = asyncio.run(prepare("tiny", source, "vicuna_v1.1", tmp_path / "bases/converted"))
    asked = [Message("system", "Set  a timer."), Message("user", "What is the weather in Boston? café \n\n</s>")]
    prompts = [render_prompt(read_bundle(base.path), asked) for base in (whole, converted)]
    assert prompts[0].ids == prompts[1].ids and prompts[0].stop_ids == prompts[1].stop_ids


def read_bundle(folder: Path) -> Bundle:
    return Bundle.from_files({name: (folder / name).read_bytes() for name in ("template.json", "tokenizer.json")})


def test_a_template_that_a_base_cannot_be_rendered_through_never_reaches_it(own: Server) -> None:
    before = conversation_of(own, BASE)
    no_reply = {"name": "vicuna_v1.1", "kind": "jinja", "source": "{{ messages | length }}", "override": True}
    response = call(own, "POST", "/templates", no_reply)
    assert response.status_code == 400 and response.json()["error"]["param"] == "source"
    assert "'vicuna_v1.1'" in response.json()["error"]["message"]
    assert conversation_of(own, BASE) == before


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ m.content * 999999999 }}{% endfor %}",
        "{% if %}",
        "x" * 300_000,
    ],
)
def test_a_template_that_loops_escapes_or_swells_is_refused_and_others_are_served_meanwhile(
    server: Server, source: str
) -> None:
    response = call(server, "POST", "/templates", {"name": "bad", "kind": "jinja", "source": source})
    assert response.status_code == 400 and response.json()["error"]["param"] == "source", response.text
    assert call(server, "GET", "/templates/bad").status_code == 404


def test_fastchats_own_address_answers_as_fastchats_workers_do(server: Server) -> None:
    address = server.base_url.removesuffix("/v1") + "/worker_get_conv_template"
    (base,) = call(server, "GET", "/templates/vicuna_v1.1").json()["bases"]
    for response in (httpx.get(address), httpx.post(address), httpx.post(address, json={"model": BASE})):
        assert response.json()["bundle"] == base["version"]
        conversation = response.json()["conv"]
        fields = {**conversation, "sep_style": SeparatorStyle(conversation["sep_style"])}
        known = get_conv_template("vicuna_v1.1")
        assert Conversation(**{**fields, "roles": tuple(fields["roles"])}).get_prompt() == known.get_prompt()
    assert httpx.get(address, params={"model": "gpt-9"}).status_code == 404
    assert httpx.post(address, json={"model": 5}).json()["error"]["param"] == "model"


def test_a_template_cannot_be_sent_along_with_a_chat_request(server: Server) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "chat_template": JINJA}
    response = call(server, "POST", "/chat/completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "chat_template"


@pytest.mark.anyio
async def test_an_override_reaches_a_base_under_all_its_names_but_no_tuned_model(tmp_path: Path) -> None:
    override = parse_registration(fastchat_body("vicuna_v1.1") | {"override": True})
    prepared = make_bundle("vicuna_v1.1", sentencepiece_like(), [2])
    async with opened(tmp_path, "vicuna_v1.1", prepared) as (templates, catalog):
        catalog.publish(TunedModel("ft:tiny:x", "tiny", prepared, "ft:tiny:x@1", 1, "local"))
        await templates.register(override)
        changed = catalog.model("tiny", "default").bundle
        assert changed.digest != prepared.digest
        assert (
            catalog.model("alias", "default").bundle is changed
            and catalog.base_for_tuning("alias", "default").bundle is changed
        )
        assert catalog.model("ft:tiny:x", "default").bundle is prepared
        assert catalog.base_for_tuning("ft:tiny:x", "default").bundle is prepared, (
            "to preview it, and to train it further"
        )
    async with opened(tmp_path, "vicuna_v1.1", prepared) as (templates, catalog):
        assert catalog.model("alias", "default").bundle.digest == changed.digest, "after a restart too"
        await templates.remove("vicuna_v1.1")
        assert catalog.model("alias", "default").bundle is catalog.base("tiny").bundle is prepared


@pytest.mark.anyio
async def test_a_template_that_a_base_needs_cannot_be_deleted(tmp_path: Path) -> None:
    prepared = make_bundle("vicuna_v1.1", sentencepiece_like(), [2])
    async with opened(tmp_path, "mine", prepared) as (templates, catalog):
        await templates.register(parse_registration(fastchat_body("mine")))
        assert catalog.model("tiny", "default").bundle.template.name == "mine"
        with pytest.raises(RequestError, match="'tiny' is rendered through the template 'mine'"):
            await templates.remove("mine")
        assert templates.entry("mine").origin == "api"


@asynccontextmanager
async def opened(folder: Path, template: str, bundle: Bundle) -> AsyncIterator[tuple[Templates, Catalog]]:
    """The registry over a store in `folder`, and a base that names `template`; its engine is never asked."""
    store, catalog = Store.open(folder / "tunegate.db"), Catalog(Deadlines(1, 1))
    templates = Templates({}, catalog)
    await templates.open(store)
    files = PreparedBase("tiny", folder, folder / "none.gguf", "sha256:0", "LlamaForCausalLM", 256, template, (2,))
    base = Base("tiny", bundle, pool_of(At(1)), "tiny", 256, 1, files)
    await templates.add_base(base, ["alias"], {})
    try:
        yield templates, catalog
    finally:
        templates.close()
        catalog.close()
        store.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": "../up"}, "name"),
        ({"name": "model"}, "name"),
        ({"name": None}, "name"),
        ({"kind": "mako"}, "kind"),
        ({"override": "yes"}, "override"),
        ({"colour": 1}, "colour"),
        ({"source": "text"}, "source"),
        ({"source": {"seperator": " "}}, "source"),
        ({"source": {"messages": [["a"]]}}, "source.messages"),
        ({"source": {"messages": [["a", "b"]], "offset": 2}}, "source.offset"),
        ({"source": {"system_template": "nothing"}}, "source.system_template"),
        ({"source": {"system_template": "{system_message.__class__}"}}, "source.system_template"),
        ({"source": {"system_template": "{system_message:>99999999}"}}, "source.system_template"),
        ({"source": {"roles": ["one"]}}, "source.roles"),
        ({"source": {"sep_style": "SIDEWAYS"}}, "source.sep_style"),
        ({"source": {"sep_style": True}}, "source.sep_style"),
        ({"source": {"stop_str": ["", "x"]}}, "source.stop_str"),
        ({"source": {"stop_token_ids": [-1]}}, "source.stop_token_ids"),
        ({"tokens": {"eos_token": "</s>"}}, "tokens"),
    ],
)
def test_a_registration_is_checked_field_by_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_registration(fastchat_body("mine") | change)
    assert caught.value.param == param


def test_separator_styles_are_taken_by_name_and_by_number_and_kept_by_name() -> None:
    for style in ("add_colon_two", SeparatorStyle.ADD_COLON_TWO.value):
        assert parse_registration(fastchat_body("mine", sep_style=style)).source["sep_style"] == "ADD_COLON_TWO"


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ('jinja = "nowhere.jinja"', "cannot read"),
        ('jinja = "{{ x }}"\nsep = " "', "both"),
        ("override = true", "needs `jinja`"),
        ('roles = ["a"]', "roles"),
        ('colour = "blue"', "colour"),
    ],
)
def test_a_template_table_that_makes_no_sense_refuses_to_start(tmp_path: Path, table: str, what: str) -> None:
    config = tmp_path / "tunegate.toml"
    config.write_text(f"[templates.mine]\n{table}\n")
    with pytest.raises(SettingsError, match=what):
        load_settings(config, {}, {})


def test_a_jinja_template_in_the_settings_is_a_text_or_a_file_beside_them(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(JINJA)
    config = tmp_path / "tunegate.toml"
    config.write_text(f"[templates.a]\njinja = 'mine.jinja'\n[templates.b]\njinja = '''{JINJA}'''\n")
    entries = settings_entries(load_settings(config, {}, {}).templates)
    assert entries["a"].source["template"] == entries["b"].source["template"] == JINJA
    assert entries["a"].version != entries["b"].version, "the name is part of a version"


def test_the_settings_override_a_built_in_template_on_purpose_only(tmp_path: Path) -> None:
    config = tmp_path / "tunegate.toml"
    config.write_text("[templates.chatml]\njinja = '{{ messages }}'\n")
    with pytest.raises(SettingsError, match="override = true"):
        settings_entries(load_settings(config, {}, {}).templates)
    config.write_text("[templates.chatml]\njinja = '{{ messages }}'\noverride = true\n")
    assert settings_entries(load_settings(config, {}, {}).templates)["chatml"].overrides == "built-in"
