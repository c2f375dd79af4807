"""The import law, the size of files, and the trees that the documents show."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("bot", "connectors", "learning")
HEAVY = ("torch", "trl", "vllm", "sentence_transformers", "transformers", "datasets")


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_holds_one_noun_and_says_its_duty(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source))


def test_the_import_law_is_kept_and_a_breach_and_a_cycle_are_noticed(tmp_path):
    """`make lint` asks the same; the law is in pyproject.toml."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def broken() -> str:
        command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."})
        return "" if done.returncode == 0 else done.stdout.partition("Broken contracts")[2]

    assert not broken()
    for module, line, found in (
        ("connectors/reading.py", "from learning.data import rewards", "connectors.reading -> learning.data.rewards"),
        (
            "learning/data/rewards.py",
            "def late():\n    from connectors import reading",
            "rewards -> connectors.reading",
        ),
        ("bot/store/lineage.py", "from bot.store.registry import BASE", "No cycles are allowed in bot.store"),
    ):
        with (tmp_path / module).open("a") as file:
            file.write(f"\n{line}\n")
        assert found in broken(), "a control"


def test_no_module_of_bot_or_connectors_imports_anything_heavy():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules()
        if path.relative_to(ROOT).parts[0] in ("bot", "connectors")
        and path.name not in ("__init__.py", "__main__.py")
        and "migrations" not in path.parts
    ]
    code = f"import sys, {', '.join(names)}\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def shown_tree(document: str) -> set[str]:
    """The paths of a tree in a document, where indentation says what lies in what."""
    shown, above = set(), [""]
    for indent, name in re.findall(r"^((?:  ){0,2})(\w+(?:/|\.(?:py|txt|html)))  ", document, flags=re.M):
        above = [*above[: len(indent) // 2 + 1], name]
        shown.add("".join(above))
    return shown


def test_the_trees_in_the_documents_are_the_tree():
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in modules() if path.name == "__init__.py"}
    shown = [path for path in modules() if path.name != "__init__.py" and "migrations" not in path.parts]
    shown += [path for package in PACKAGES for path in (ROOT / package).rglob("*.[th][xt]*")]
    tests = {"tests/"}
    assert shown_tree((ROOT / "README.md").read_text()) == packages | tests
    files = {str(path.relative_to(ROOT)) for path in shown}
    assert shown_tree((ROOT / "docs" / "architecture.md").read_text()) == packages | files | tests


def names_in(path: Path) -> set[str]:
    """What a Python file defines: its functions, classes and values, and the methods of its classes as Class.method."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def missing_names(document: str) -> list[str]:
    """The files, names in files, linked documents and make targets that a document in docs names and that are not there."""
    part = r"\w[\w.-]*"
    named = re.findall(rf"\b((?:bot|connectors|learning|tests|docs)/(?:{part}/)*(?:{part}\w)?)(?:::([\w.]*\w))?", document)
    missing = [
        f"{path}::{name}" if name else path
        for path, name in named
        if not (ROOT / path).exists() or (name and name not in names_in(ROOT / path))
    ]
    missing += [name for name in re.findall(r"\]\(([\w./-]+)\)", document) if not (ROOT / "docs" / name).is_file()]
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
    return missing + [name for name in re.findall(r"(?:`|^)make ([a-z-]+)", document, flags=re.M) if name not in targets]


def test_what_the_page_for_developers_names_is_there():
    document = (ROOT / "docs" / "development.md").read_text()
    assert document.count("::") > 40
    assert missing_names(document) == []
    gone = ("bot/gone.py", "bot/gone/", "bot/config.py::Gone", "bot/config.py::Config.gone", "[it](gone.md)", "`make gone`")
    assert all(missing_names(f"{document}\n{text}") for text in gone), "a control"


def test_the_twelve_questions_of_a_newcomer_are_answered_by_files():
    _, _, table = (ROOT / "docs" / "development.md").read_text().partition("## Twelve questions")
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 12
    assert all(re.search(r"\? \| .*`[\w/]+\.py", row) for row in rows)


def test_the_hooks_before_a_commit_are_the_linters_of_make_lint():
    """The tools are those of .venv, so that a commit needs no network."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    assert hooks == {line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe.splitlines()}
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_make_help_lists_every_target():
    asked = subprocess.run(["make", "--no-print-directory"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    listed = re.findall(r"^make ([a-z-]+) +\S", asked, flags=re.M)
    wanted = re.search(r"^\.PHONY: (help .*)", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    assert listed == wanted


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
