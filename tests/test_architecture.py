"""The arrows between rooms: who may import whom. Read off the source, so that a forbidden import fails before it runs.

An import under `if TYPE_CHECKING:` names a type and draws no arrow.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"gateway", "trainer", "clients", "deploy", "tests"}

# A room, and the rooms that it may import besides itself. `gateway` alone stands for the package's __init__ (its version).
LEAVES: set[str] = set()
ARROWS: dict[str, set[str]] = {
    "gateway.access": LEAVES,
    "gateway.errors": LEAVES,
    "gateway.jobdir": LEAVES,
    "gateway.vllm_plugin": LEAVES,
    "gateway.chat": LEAVES,
    "gateway.engine_settings": {"gateway.errors"},
    "gateway.tracking_settings": {"gateway.errors"},
    "gateway.settings": {"gateway.engine_settings", "gateway.errors", "gateway.tracking_settings"},
    "gateway.fleet": {
        "gateway.bases",
        "gateway.engine_settings",
        "gateway.engines",
        "gateway.errors",
        "gateway.settings",
    },
    "gateway.hangup": LEAVES,
    "gateway.logs": LEAVES,
    "gateway.limits": {"gateway.access", "gateway.errors"},
    "gateway.keys": {"gateway.access", "gateway.errors", "gateway.limits", "gateway.store"},
    "gateway.openapi": {"gateway.wire"},
    "gateway.metrics": LEAVES,
    "gateway.tracing": {"gateway", "gateway.access", "gateway.errors"},
    "gateway.metering": {"gateway.access", "gateway.errors", "gateway.store"},
    "gateway.connection": {"gateway.errors", "gateway.routes"},
    "gateway.batches": {"gateway.access", "gateway.errors", "gateway.store"},
    "gateway.front": {"gateway.access", "gateway.errors", "gateway.keys", "gateway.logs", "gateway.routes"},
    "gateway.llama_worker": {"gateway", "gateway.errors"},
    "gateway.bases": {"gateway", "gateway.errors", "gateway.jobdir"},
    "gateway.wire": {"gateway.chat", "gateway.errors", "gateway.jobdir"},
    "gateway.store": {"gateway.access", "gateway.errors", "gateway.jobdir"},
    "gateway.engines": {
        "gateway",
        "gateway.access",
        "gateway.bases",
        "gateway.chat",
        "gateway.errors",
        "gateway.jobdir",
    },
    "gateway.embedding": {"gateway.engines", "gateway.errors"},
    "gateway.engine_request": {"gateway.engines", "gateway.errors"},
    "gateway.generation": {
        "gateway.access",
        "gateway.chat",
        "gateway.engine_request",
        "gateway.engines",
        "gateway.errors",
    },
    "gateway.inference": {
        "gateway.access",
        "gateway.chat",
        "gateway.embedding",
        "gateway.engine_request",
        "gateway.engines",
        "gateway.errors",
        "gateway.generation",
    },
    "gateway.patience": {"gateway.errors"},
    "gateway.replies": {"gateway.chat", "gateway.generation", "gateway.wire"},
    "gateway.responses": {
        "gateway.access",
        "gateway.chat",
        "gateway.errors",
        "gateway.generation",
        "gateway.inference",
        "gateway.patience",
        "gateway.replies",
        "gateway.store",
        "gateway.wire",
    },
    "gateway.evals": {
        "gateway.access",
        "gateway.errors",
        "gateway.grading",
        "gateway.generation",
        "gateway.inference",
        "gateway.patience",
        "gateway.replies",
        "gateway.store",
        "gateway.wire",
    },
    "gateway.grading": {
        "gateway.access",
        "gateway.chat",
        "gateway.errors",
        "gateway.inference",
        "gateway.patience",
        "gateway.replies",
        "gateway.wire",
    },
    "gateway.jobs": {
        "gateway",
        "gateway.access",
        "gateway.bases",
        "gateway.engines",
        "gateway.errors",
        "gateway.jobdir",
        "gateway.settings",
        "gateway.tracking_settings",
    }
    | {"gateway.store", "gateway.chat"},
    "gateway.templates": {"gateway.chat", "gateway.engines", "gateway.errors", "gateway.settings", "gateway.store"}
    | {"gateway.wire"},
    "gateway.imports": {
        "gateway",
        "gateway.bases",
        "gateway.chat",
        "gateway.engines",
        "gateway.errors",
        "gateway.jobdir",
    },
    "gateway.export_plan": {"gateway.errors"},
    "gateway.exports": {
        "gateway.access",
        "gateway.errors",
        "gateway.export_plan",
        "gateway.jobs",
        "gateway.store",
    },
    "gateway.model_source": {"gateway.bases", "gateway.errors"},
    "gateway.models": {"gateway", "gateway.bases", "gateway.errors", "gateway.jobdir", "gateway.store"}
    | {"gateway.model_source"},
    "gateway.terminal": {"gateway.bases", "gateway.errors"},
    "gateway.routes": {
        "gateway",
        "gateway.access",
        "gateway.openapi",
        "gateway.errors",
        "gateway.evals",
        "gateway.export_plan",
        "gateway.grading",
        "gateway.generation",
        "gateway.inference",
        "gateway.jobs",
        "gateway.replies",
        "gateway.responses",
        "gateway.settings",
        "gateway.store",
    }
    | {"gateway.templates", "gateway.wire"},
    "trainer": {"gateway.chat", "gateway.jobdir"},
    "clients": LEAVES,
}
# Where every object is built and handed in: these may import any room of the gateway.
BUILDERS = {"gateway", "gateway.app", "gateway.house", "gateway.__main__", "gateway.models_command"}
BUILDERS |= {"gateway.export_command", "gateway.keys_command", "gateway.usage_command"}

# What no process that serves requests may carry.
HEAVY = {"torch", "vllm", "llama_cpp", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"}
HEAVY |= {"wandb", "tensorboard", "mlflow"}
# Ways out of the process, which the pure rooms do not take.
INPUT_OUTPUT = {
    "asyncio",
    "httpx",
    "io",
    "os",
    "pathlib",
    "requests",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "urllib.request",
}
INPUT_OUTPUT |= {"sqlalchemy", "starlette", "uvicorn"}


def modules(package: str) -> list[Path]:
    """The source files of a package or of a module, by dotted name."""
    path = ROOT / package.replace(".", "/")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `path` imports at run time; `from a import b` gives `a.b`."""
    tree = ast.parse(path.read_text(), str(path))
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str:
    """The room that a dotted name belongs to: `gateway.wire.chat.parse` is in `gateway.wire`."""
    top, _, rest = name.partition(".")
    if top != "gateway" or not rest:
        return top
    second = rest.split(".")[0]
    place = ROOT / "gateway" / second
    return f"gateway.{second}" if place.is_dir() or place.with_suffix(".py").exists() else "gateway"


def test_each_room_imports_only_what_its_arrows_allow() -> None:
    wrong = []
    for room, allowed in ARROWS.items():
        for path in modules(room):
            for line, name in imports(path):
                if name.split(".")[0] in OURS and room_of(name) not in allowed | {room}:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_every_module_of_the_gateway_belongs_to_a_room_with_arrows() -> None:
    found = {room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in modules("gateway")}
    assert found - {"gateway.__init__"} - BUILDERS - set(ARROWS) == set()


def test_the_gateway_never_imports_the_trainer_or_the_clients() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("gateway")
        for line, name in imports(path)
        if name.split(".")[0] in OURS - {"gateway"}
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["gateway.chat", "gateway.wire"])
def test_pure_rooms_import_nothing_that_reaches_outside_the_process(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(room)
        for line, name in imports(path)
        if any(name == way or name.startswith(f"{way}.") for way in INPUT_OUTPUT)
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["gateway.chat", "gateway.wire"])
def test_pure_rooms_open_no_files(room: str) -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "exec", "eval"}
    ]
    assert calls == []


def test_only_what_runs_in_an_engine_imports_an_engine_or_a_training_library_in_the_gateway() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("gateway")
        for line, name in imports(path)
        if name.split(".")[0] in HEAVY and not {"llama_worker", "vllm_plugin"} & set(path.parts)
    ]
    assert wrong == []


def test_importing_the_app_in_a_fresh_interpreter_loads_no_heavy_library() -> None:
    script = (
        "import sys, gateway.app, gateway.__main__\n"
        f"print(sorted({HEAVY | {'trainer', 'clients'}!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.stderr == ""
    assert finished.stdout.strip() == "[]"


def test_the_top_level_holds_what_the_design_names_and_nothing_else() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    folders = {".ci", "clients", "deploy", "gateway", "tests", "trainer"}
    files = {".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
    assert top == folders | files
