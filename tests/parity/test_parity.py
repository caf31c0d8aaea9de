"""The part of `make parity` that takes seconds, and proof that it notices what it is there to notice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.chat.jinja import JinjaTemplate
from gateway.chat.registry import registered_templates
from gateway.chat.render import IGNORED, TrainingSequence
from gateway.chat.tokenizer import Tokenizer
from tests.parity.__main__ import main
from tests.parity.matrix import expected_refusals, run
from tests.parity.oracles import llama_cpp_findings, vocabulary_findings
from tests.parity.sdist import SdistUnavailable, llama_cpp_models
from tests.parity.vocabularies import vocabulary, vocabulary_path


@pytest.fixture(scope="module", autouse=True)
def sdist() -> Path:
    """Downloaded into the user's cache the first time."""
    try:
        return llama_cpp_models()
    except SdistUnavailable as error:
        pytest.fail(str(error), pytrace=False)


def test_small_tokenizers_and_well_known_templates_agree_with_every_oracle() -> None:
    rows = list(run(quick=True))
    findings = [finding for row in rows for finding in row.findings]
    assert [f"{f.subject} · {f.case}: {f.detail}" for f in findings if f.verdict == "different"] == []
    refused = {(f.subject, f.case) for f in findings if f.verdict == "refused"}
    assert refused <= expected_refusals()
    assert {row.oracle for row in rows} == {
        "llama.cpp's expected ids",
        "llama.cpp",
        "FastChat's get_prompt",
        "transformers",
        "mask",
    }
    assert {t.name for t in registered_templates().values() if t.kind == "fastchat"} <= {row.subject for row in rows}


def _learn_one_more(sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    spoilt = []
    for sequence in sequences:
        labels = list(sequence.labels)
        start = next(n for n, label in enumerate(labels) if label != IGNORED)
        labels[start - 1] = sequence.ids[start - 1]
        spoilt.append(TrainingSequence(sequence.ids, labels))
    return spoilt


def _forget_the_stop(sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    spoilt = []
    for sequence in sequences:
        labels = list(sequence.labels)
        labels[max(n for n, label in enumerate(labels) if label != IGNORED)] = IGNORED
        spoilt.append(TrainingSequence(sequence.ids, labels))
    return spoilt


@pytest.mark.parametrize("spoil", [_learn_one_more, _forget_the_stop])
def test_a_mask_error_planted_on_purpose_is_told_and_fails_the_run(spoil, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert main(["--quick", "--only", "Qwen3.5-4B"], spoil) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith("FAILED")
    learnt = [f for row in run("Qwen3.5-4B", quick=True) if row.oracle == "mask" for f in row.findings]
    assert learnt
    assert f" {len(learnt)} different" in last, "in every example"


@pytest.mark.parametrize(("probe", "answer"), [("offers_tools", False), ("call_form", None), ("takes_answers", False)])
def test_a_probe_that_goes_wrong_is_told_and_fails_the_run(
    probe: str, answer: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(JinjaTemplate, probe, property(lambda template: answer))
    assert main(["--quick", "--only", "Qwen3.5-4B"]) == 1
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("FAILED")


def test_a_sound_run_says_so_in_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "Qwen3.5-4B"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("passed")


def test_an_id_that_is_wrong_is_noticed_by_both_of_llama_cpps_oracles() -> None:
    made = json.loads(vocabulary("llama-spm"))
    ids = made["model"]["vocab"]
    ids["▁world"], ids["▁World"] = ids["▁World"], ids["▁world"]
    wrong = Tokenizer(json.dumps(made).encode())
    path = vocabulary_path("llama-spm")
    expected = vocabulary_findings("wrong", wrong, Path(f"{path}.inp").read_text(), Path(f"{path}.out").read_text())
    assert any(finding.verdict == "different" for finding in expected)
    live = llama_cpp_findings("wrong", str(path), wrong, ["Hello world"])
    assert [finding.verdict for finding in live] == ["different"]
