"""llama.cpp's convert_hf_to_gguf.py in a process of its own: `python -m trainer.export.run_converter FOLDER ARGUMENTS…`.

Place in the flow: `convert` starts it. One rule: it imports llama.cpp's own copy of gguf, which is why nothing of ours
that does may be imported here. What it adds to the script: a tokenizer that cuts words in a way the script has no name
for is taken all the same. The engine is sent ids and never tokenises, so the name that would be written for it is read by
nobody.
"""

from __future__ import annotations

import logging
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

UNNAMED = "default"


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    model = import_module("conversion.base").TextModel

    named = model.get_vocab_base_pre

    def name_or_default(self: Any, tokenizer: Any) -> str:
        try:
            return str(named(self, tokenizer))
        except NotImplementedError:
            logging.getLogger("hf-to-gguf").warning("the tokenizer's way to cut words has no name; it is not needed")
            return UNNAMED

    model.get_vocab_base_pre = name_or_default
    script = folder / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
