"""The repository's own rules: style, layers, exports, sizes."""

import ast
import graphlib
import itertools
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "kwflow").rglob("*.py"))
LAYERS = {
    "errors": 0, "durable": 1, "core": 2, "api": 3, "declarations": 3, "waits": 3, "activities": 3, "running": 3, "batches": 3, "feeds": 3, "flows": 3, "rest": 3, "schedules": 3, "ports": 3,
    "config": 3, "tokens": 3,
    "runners": 4, "client": 5, "worker": 5, "timers": 5, "testing": 6, "gateway": 6, "console": 6, "cli": 7,
}  # fmt: skip
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
PURE_MUST_NOT_IMPORT = {"time", "random", "logging", "socket", "asyncio", "subprocess", "uuid", "secrets"}


def layer_of(path: pathlib.Path) -> int:
    return LAYERS.get(path.relative_to(ROOT / "kwflow").parts[0].removesuffix(".py"), 7)


def imports_of(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("kwflow")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: pathlib.Path) -> None:
    """ARCHITECTURE §2."""
    if path == ROOT / "kwflow/__init__.py":
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "kwflow" and len(parts) > 1:
            assert LAYERS.get(parts[1], 0) <= layer_of(path), f"{path} imports {name}"
        if layer_of(path) in (1, 2):
            assert parts[0] not in PURE_MUST_NOT_IMPORT, f"{path} imports {name}; durable and core are pure"
        if parts[0] == "confluent_kafka":
            assert path.parent.name == "kafka", f"{path} imports confluent_kafka"


def loaded_by(name: str, path: pathlib.Path) -> set[str]:
    """The modules of kwflow that this one imports, and the packages, other than its own, that this loads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    packages = {package for module in found for package in itertools.accumulate(module.split("."), "{}.{}".format) if not f"{name}.".startswith(f"{package}.")}
    return (found | packages) & MODULES.keys()


def test_imports_have_no_circles() -> None:
    """ARCHITECTURE §2: also in functions and for type checkers. A file can be read once those that it imports are known."""
    graph = {name: loaded_by(name, path) for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_durable_says_what_each_file_owns() -> None:
    folder = ROOT / "kwflow/durable"
    for where in (folder, folder / "lower"):
        said = ast.get_docstring(ast.parse((where / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert [path.name for path in where.glob("*.py") if path.name not in said] == ["__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: pathlib.Path) -> None:
    """style.md §3: files under 600 lines, functions under 70."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 70, node.name


def test_make_test_knows_every_suite() -> None:
    """pyproject.toml lists them by hand, the long-running ones first."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    assert sorted(listed) == sorted({f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")})


def test_importing_kwflow_loads_no_driver() -> None:
    """ARCHITECTURE §2."""
    code = "import sys, kwflow; sys.exit(any(m in sys.modules for m in ('confluent_kafka', 'faust', 'rocksdict', 'prometheus_client', 'opentelemetry', 'httpx', 'jinja2', 'starlette', 'uvicorn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ruff_finds_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "kwflow", "tests", "workflows"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_mypy_strict_finds_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", "/dev/null"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_lies_at_the_top_that_does_not_belong_there() -> None:
    """ARCHITECTURE §2. A file that a command had left behind in a test was once committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("NOT TESTED: no git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {".ci", "benchmarks", "docs", "kwflow", "scheduler", "tests", "workflows"}
    files = {".gitattributes", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "docker-compose.yml", "pyproject.toml"}
    assert {name.partition("/")[0] for name in tracked} == folders | files
