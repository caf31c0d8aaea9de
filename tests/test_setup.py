"""What `make setup` rests on: the compiled wheel's key, the flags it is compiled with, and the pins."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.setup_venv import AMX_OFF, llama_cmake_args, pinned, wheel_key

ROOT = Path(__file__).resolve().parent.parent
OURS = {"gateway", "trainer", "clients", "deploy", "tests"}
# Whose code runs in processes or environments of its own.
ELSEWHERE = {"gateway/llama_worker", "gateway/vllm_plugin", "tests/conformance/programs"}
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def knows_everything(flag: str) -> bool:
    return True


def knows_nothing(flag: str) -> bool:
    return False


def test_llama_cpp_is_compiled_without_amx_on_x86_for_c_and_for_cpp() -> None:
    arguments = llama_cmake_args("", "x86_64", knows_everything)
    assert arguments == f"-DCMAKE_C_FLAGS='{' '.join(AMX_OFF)}' -DCMAKE_CXX_FLAGS='{' '.join(AMX_OFF)}'"


def test_the_callers_own_cmake_arguments_are_kept() -> None:
    assert llama_cmake_args("-DGGML_CUDA=on", "x86_64", knows_everything).startswith("-DGGML_CUDA=on -DCMAKE_C_FLAGS=")


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_no_x86_flag_is_given_on_other_machines(machine: str) -> None:
    assert llama_cmake_args("-DX=1", machine, knows_everything) == "-DX=1"


def test_a_compiler_that_knows_no_amx_is_given_no_flag_about_it() -> None:
    assert llama_cmake_args("", "x86_64", knows_nothing) == ""


def test_the_wheels_key_changes_with_everything_that_the_compiled_code_depends_on() -> None:
    given = ("0.3.36", "-DX=1", "cpython-311-linux-x86_64", "avx2 avx512f")
    keys = {wheel_key(*given)}
    for place in range(len(given)):
        changed = list(given)
        changed[place] += "x"
        keys.add(wheel_key(*changed))
    assert len(keys) == len(given) + 1
    assert wheel_key(*given) in keys


def test_every_package_that_setup_installs_is_pinned_at_the_version_that_is_here() -> None:
    waiting = [("tunegate", frozenset({"llama", "train", "dev"}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    unpinned = []
    while waiting:
        package, extras = waiting.pop()
        if (package, extras) in seen or package == "torch":  # what torch asks for differs between its builds
            continue
        seen.add((package, extras))
        for line in requires(package) or []:
            needed = Requirement(line)
            name = canonicalize_name(needed.name)
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            try:
                here = version(name)
            except PackageNotFoundError:
                continue  # asked for by an extra that nothing here asks for
            if PINS.get(name) != here.partition("+")[0]:
                unpinned.append(f"{name} {here} (pinned: {PINS.get(name)})")
            waiting.append((name, frozenset(needed.extras)))
    assert sorted(set(unpinned)) == []
    assert len(seen) > 50


def test_what_setup_asks_for_by_version_is_pinned() -> None:
    assert (pinned("torch"), pinned("llama-cpp-python")) == (PINS["torch"], PINS["llama-cpp-python"])


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("gateway", ("trace",)),  # imported where it is configured only
        ("gateway/llama_worker", ("llama",)),
        ("trainer", ("llama", "train", "quantize", "track", "deepspeed")),  # those where a job asks for them
        ("clients", ("dev",)),
        ("deploy", ("llama", "train", "dev")),
        ("tests", ("llama", "train", "quantize", "track", "dev")),
    ],
)
def test_every_library_that_is_imported_is_declared_in_pyproject(folder: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    homes = packages_distributions()
    missing = set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        if any(path.is_relative_to(ROOT / other) for other in ELSEWHERE if other != folder):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            beside = {other.stem for other in path.parent.glob("*.py")}  # the SDK's tests load theirs by such names
            for top in {name.split(".")[0] for name in names} - OURS - beside - sys.stdlib_module_names:
                if not declared & {canonicalize_name(home) for home in homes.get(top, [top])}:
                    missing.add(f"{path.relative_to(ROOT)} imports {top}")
    assert sorted(missing) == []
