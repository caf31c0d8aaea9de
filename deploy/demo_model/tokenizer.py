"""The demo model's tokenizer: tokenizer.model (SentencePiece) and tokenizer.json (the fast form, same ids).

Place in the flow: words → **tokenizer** → pretrain. One rule: a space is a piece of its own and no piece holds both
letters and anything else, so a word has the same ids after a space, after a quote and at the start of a text. A tiny
model can then copy an argument out of a request without knowing two spellings of everything.

    python -m deploy.demo_model.tokenizer
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from deploy.demo_model import words

HERE = Path(__file__).parent
VOCABULARY_SIZE = 4096
CONTEXT_LENGTH = 1024
SPACE = "\u2581"  # SentencePiece's mark for a space
ACCENTED = "àáâãäåæçèéêëìíîïñòóôõöøùúûüýßœÀÁÂÄÅÆÇÈÉÊËÍÎÑÓÔÖØÚÜ"
TYPOGRAPHY = "–—‘’“”…•€£°"


def main() -> None:
    (HERE / "tokenizer.model").write_bytes(train_sentencepiece())
    model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    convert(model).save(str(HERE / "tokenizer.json"))
    (HERE / "tokenizer_config.json").write_text(json.dumps(configuration(), indent=2) + "\n")
    print(f"{model.vocab_size()} pieces; {model.encode('Call Anna Kowalski at 7:30.', out_type=str)}")


def train_sentencepiece() -> bytes:
    """The model: byte-pair pieces of single words, bytes for the rest, `<s>` 1 and `</s>` 2.

    From memory to memory: SentencePiece writes the paths of files that it is given into the model.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_words()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=[SPACE],
        character_coverage=1.0,
        max_sentencepiece_length=12,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def training_words() -> list[str]:
    """Every listed word, plain and capitalised, and invented ones, so that pieces for unknown names exist too."""
    rng = random.Random(1)
    listed = sorted({part for word in listed_words() for part in word.replace("'", " ").split()})
    lines = [word for word in listed for _ in range(40)]
    lines += [word.capitalize() for word in listed if word.islower() for _ in range(4)]
    lines += ["USER", "ASSISTANT"] * 40
    lines += [invented_word(rng) for _ in range(16_000)]
    lines += [invented_word(rng).capitalize() for _ in range(4_000)]
    characters = [chr(code) for code in range(0x21, 0x7F)] + [*ACCENTED, *TYPOGRAPHY]
    return lines + [character for character in characters for _ in range(40)]


def listed_words() -> set[str]:
    """Each word of every list in `words`."""
    found: set[str] = set()
    for name, value in vars(words).items():
        if not name.isupper() or name in {"ONSETS", "NUCLEI", "CODAS"}:
            continue
        entries = [*value, *value.values()] if isinstance(value, dict) else list(value)
        found.update(part for entry in entries if isinstance(entry, str) for part in entry.split())
    return found


def invented_word(rng: random.Random) -> str:
    """One to three syllables that nobody listed."""
    syllables = rng.choices((1, 2, 3), (2, 5, 3))[0]
    return "".join(
        rng.choice(words.ONSETS) + rng.choice(words.NUCLEI) + rng.choice(words.CODAS) for _ in range(syllables)
    )


def convert(model: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The fast tokenizer with the same ids: merges in the order of SentencePiece's scores, byte fallback, BOS first."""
    vocabulary = {model.id_to_piece(index): index for index in range(model.vocab_size())}
    merges: list[tuple[float, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        if model.is_control(index) or model.is_unknown(index) or model.is_byte(index):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((model.get_score(index), (left, right)))
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = Tokenizer(
        BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", model.bos_id())]
    )
    return tokenizer


def configuration() -> dict[str, object]:
    """tokenizer_config.json, for transformers and the GGUF writer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
    }


if __name__ == "__main__":
    main()
