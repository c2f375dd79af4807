"""Architectures: tells which models the installed vLLM serves with adapters, and which transformers trains.

It parses the tables in their source files instead of importing them: importing either takes seconds and hundreds of
megabytes, which the serving process does not need otherwise.
"""

import ast
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

LOOKUP_SECONDS = 180
TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
NEIGHBOURS = "vllm.model_executor.models."
ASK_VLLM = "import sys; from vllm.config import ModelConfig; ModelConfig(model=sys.argv[1])"


def can_serve(architecture: str, model: str) -> bool:
    """Tell whether the installed vLLM can serve a model's architecture. True if no vLLM is installed.

    vLLM may serve an architecture through transformers that its table lacks: then a child process asks vLLM, which takes
    some seconds.
    """
    table = read_vllm_table()
    if not table or architecture in table:
        return True
    command = [sys.executable, "-c", ASK_VLLM, model]
    try:
        return subprocess.run(command, capture_output=True, timeout=LOOKUP_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return True  # if it cannot, vLLM says so when it starts


def can_serve_adapters(architecture: str) -> bool:
    """Tell whether vLLM serves LoRA adapters on an architecture. True if its table lacks the architecture."""
    entry = read_vllm_table().get(architecture)
    return entry is None or _supports_adapters(*entry, frozenset())


def can_train(model_type: str) -> bool:
    """Tell whether transformers has a causal language model for a `model_type`."""
    table = _read_tables(
        _find_package("transformers") / "models" / "auto" / "modeling_auto.py", ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)
    )
    return not table or model_type in table


@cache
def read_vllm_table() -> dict[str, tuple[str, str]]:
    """Read vLLM's table of architectures: the module and the class for each. Empty if no vLLM is installed."""
    found = _read_tables(_find_package("vllm") / "model_executor" / "models" / "registry.py", TABLES)
    return {name: entry for name, entry in found.items() if isinstance(entry, tuple) and len(entry) == 2}


def _find_package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    return Path((found.submodule_search_locations or [""])[0]) if found else Path("nowhere")


def _read_tables(file: Path, names: tuple[str, ...]) -> dict:
    """Return the literal entries of the dicts and OrderedDicts that a module assigns to some names."""
    if not file.is_file():
        return {}
    found: dict = {}
    for node in ast.parse(file.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if not any(isinstance(target, ast.Name) and target.id in names for target in targets):
            continue
        for part in ast.walk(node):
            pairs: list[tuple[ast.expr | None, ast.expr]] = []
            if isinstance(part, ast.Dict):
                pairs = list(zip(part.keys, part.values, strict=True))
            elif isinstance(part, ast.Tuple) and len(part.elts) == 2 and isinstance(part.elts[0], ast.Constant):
                pairs = [(part.elts[0], part.elts[1])]
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value not in found:
                    try:
                        found[key.value] = ast.literal_eval(value)
                    except ValueError:
                        continue
    return found


def _supports_adapters(module: str, name: str, seen: frozenset[tuple[str, str]]) -> bool:
    """Tell whether one of vLLM's model classes supports adapters, itself or by a base class."""
    file = _find_package("vllm") / "model_executor" / "models" / f"{module}.py"
    if (module, name) in seen or not file.is_file():
        return not file.is_file()  # a package, or elsewhere: vLLM says so when it starts
    imported, classes = _read_classes(file)
    if name not in classes:
        return name not in imported or _supports_adapters(imported[name], name, seen | {(module, name)})
    for base in classes[name]:
        if base == "SupportsLoRA":
            return True
        if base in classes and _supports_adapters(module, base, seen | {(module, name)}):
            return True
        if base in imported and base not in classes and _supports_adapters(imported[base], base, seen | {(module, name)}):
            return True
    return False


@cache
def _read_classes(file: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the names that a module imports from its neighbours, each with its module, and its classes with their bases."""
    imported: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            is_neighbour = node.level == 1 or node.module.startswith(NEIGHBOURS)
            module = node.module.removeprefix(NEIGHBOURS)
            if is_neighbour and module not in ("interfaces", "utils"):
                imported |= {alias.asname or alias.name: module for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            classes[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return imported, classes
