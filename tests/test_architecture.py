"""The import law, the size of files, and the tree that the README shows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("bot", "connectors", "learning")
ALLOWED = {"bot": {"bot"}, "connectors": {"bot", "connectors"}, "learning": {"bot", "learning"}}
ROOTS = {ROOT / "bot" / name for name in ("__main__.py", "app.py", "doctor_command.py")}  # these join the packages
HEAVY = ("torch", "trl", "vllm", "sentence_transformers", "transformers", "datasets")


def imports(source: str) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def broken(package: str, source: str) -> set[str]:
    """The imports that the law does not allow."""
    return (imports(source) & set(PACKAGES)) - ALLOWED[package]


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_the_import_law_and_holds_one_noun(path):
    source = path.read_text()
    if path not in ROOTS:
        assert not broken(path.relative_to(ROOT).parts[0], source)
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source)), "a module says its duty"


def test_the_import_law_would_notice_a_breach():
    assert broken("bot", "def late():\n    from learning import trainer") == {"learning"}
    assert broken("connectors", "import learning.loop") == {"learning"}
    assert not broken("learning", "from bot import types")


def test_no_module_of_bot_or_connectors_imports_anything_heavy():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules()
        if path.parent.name in ("bot", "connectors") and path.name not in ("__init__.py", "__main__.py")
    ]
    code = f"import sys, {', '.join(names)}\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_tree_in_the_readme_is_the_tree():
    shown = set(re.findall(r"^\s+(\w+\.(?:py|txt|html)) ", (ROOT / "README.md").read_text(), flags=re.M))
    real = {path.name for path in modules() if path.name != "__init__.py" and "migrations" not in path.parts}
    real |= {path.name for package in PACKAGES for path in (ROOT / package).glob("*.[th][xt]*")}
    assert shown == real


def test_what_deploys_kibitz_names_what_is_there():
    dockerfile, unit = ((ROOT / name).read_text() for name in ("Dockerfile", "docs/kibitz.service"))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():  # no profile asks for what only another needs, or for a file that few have
        assert not any(":?" in value for value in service["build"]["args"].values())
        assert all(not file["required"] for file in service["env_file"])
        assert all(f"ARG {name}" in dockerfile for name in service["build"]["args"])
    for part in re.findall(r"^COPY (\w+) \w+$", dockerfile, flags=re.M):
        assert (ROOT / part).is_dir()
    assert {"bot", "connectors", "learning"} <= set(re.findall(r"^COPY (\w+) \w+$", dockerfile, flags=re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"{name} ?=" in makefile for name in re.findall(r"(\w+)=", re.search(r"RUN make setup (.*)", dockerfile)[1]))
    assert re.search(r'CMD \["serve", "--config", \S+, "--data-dir"', dockerfile)
    assert re.search(r"ExecStart=\S+/kibitz serve --config \S+ --data-dir", unit)
