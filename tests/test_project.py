"""The project as a whole: pins, what importing costs, and which room may import which."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "onerec_jax"

# The road of the data: a room imports from rooms above it, and everyone from those that are shared.
ROAD = (
    "data",
    "tokenizer",
    "model",
    "train",
    "generate",
    "plan",
    "reward",
    "posttrain",
    "evaluate",
    "launch",
    "scaling",
    "export",
    "serve",
    "cli",
)
SHARED = {"config", "recipe", "errors", "parallel", "storage", "terminal"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """`onerec_jax.data.store` -> `data`; the package itself -> ``."""
    return [*module.split("."), ""][1]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} is a relative import"
            found.add(node.module or "")
            if node.module == "onerec_jax":
                found |= {f"onerec_jax.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("onerec_jax.")}


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_hold_exact_versions_and_nothing_else():
    pattern = r'[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*( ; python_version (<|>=) "3\.\d+")?'
    assert [line for line in pins() if not re.fullmatch(pattern, line)] == []


def test_no_interpreter_finds_two_pins_of_one_package():
    for version in ((3, 11), (3, 12), (3, 13)):
        applying = []
        for line in pins():
            requirement, _, marker = line.partition(" ; ")
            limit = re.search(r'(<|>=) "3\.(\d+)"', marker)
            if limit is None or (limit[1] == "<") == (version < (3, int(limit[2]))):
                applying.append(plain(requirement.split("==")[0]))
        assert len(applying) == len(set(applying))


def test_every_dependency_has_a_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {plain(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted}
    assert names - {plain(line.split("==")[0]) for line in pins()} == set()


def test_nothing_in_the_repository_names_the_machine_or_the_folder_it_was_made_in():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|/home/|/root/|/tmp/|/work/", text), name


def test_configuration_and_data_modules_import_without_jax():
    modules = [
        module_name(path) for path in MODULES if room_of(module_name(path)) in ("config", "recipe", "errors", "data")
    ]
    assert "onerec_jax.data.pipeline" in modules
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'jax' not in sys.modules, name\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_from_rooms_above_it_on_the_road(path: Path):
    room = room_of(module_name(path))
    if room in ("", "cli"):
        return
    allowed = {room} | SHARED
    if room in ROAD:
        allowed |= set(ROAD[: ROAD.index(room)])
    else:
        assert room in SHARED, f"{room} is not on the road: say in this test where it lies"
    assert {name for name in imported_modules(path) if room_of(name) not in allowed} == set()


def test_no_two_files_of_tests_have_one_name():
    """They are modules of no package, and the second would not be collected."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert [name for name in names if names.count(name) > 1] == []


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
