"""The floors of the house: imports lead downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import warmerge

PACKAGE = Path(warmerge.__file__).parent
# Each floor may import itself and what lies below it. Prefixes: `warmerge.weights` is the whole folder.
FLOORS = {
    "warmerge.errors": 0,
    "warmerge.locks": 0,
    "warmerge.version": 0,
    "warmerge.weights": 1,
    "warmerge.rewards": 2,
    "warmerge.training": 3,
    "warmerge.report": 4,
    "warmerge.pipeline": 5,
    "warmerge.demo": 6,
    "warmerge.cli": 7,
    "warmerge.__main__": 8,
    "warmerge": 8,
}
# report/ turns rows into figures: it knows none of the floors, and only commands use it.
BELOW_REPORT = 0
# Tools of several commands, no commands themselves.
_TOOLS = (
    "prepare", "ranking", "proxies", "scoring", "judging", "sampling", "reinforce", "found", "engine", "publication",
)  # fmt: skip
SHARED_BY_COMMANDS = {f"warmerge.pipeline.{tool}" for tool in _TOOLS}
# Libraries that one place alone may import.
ONLY_IN = {
    "matplotlib": ("warmerge.report",),
    "huggingface_hub": ("warmerge.weights.remote",),
    "fsspec": ("warmerge.weights.remote.stores",),
    "transformers": ("warmerge.rewards", "warmerge.training", "warmerge.pipeline", "warmerge.demo"),
    "accelerate": ("warmerge.training", "warmerge.pipeline"),
    "peft": ("warmerge.training",),
    "trl": ("warmerge.training", "warmerge.pipeline"),
    "ray": ("warmerge.pipeline.engine",),
    "typer": ("warmerge.cli",),
    "rich": ("warmerge.cli",),
}


def under(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def floor(module: str) -> int:
    """The floor of a module, by its longest known prefix; a module outside of all floors is a mistake."""
    if module == "warmerge":
        return FLOORS[module]
    known = [place for place in FLOORS if place != "warmerge" and under(module, place)]
    assert known, f"{module} stands on no floor: give it one in this test"
    return FLOORS[max(known, key=len)]


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that a module's source imports, wherever in it, also for types only, also by import_module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{origin}.{alias.name}"
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def violations(root: Path) -> list[str]:
    """Every import under the package folder `root` that leads upwards, sideways, or to a library kept elsewhere."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = ["warmerge", *path.relative_to(root).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = []
    for module, path in modules.items():
        for name in sorted(set(imports(path.read_text(), module, path.name == "__init__.py"))):
            if not under(name, "warmerge"):
                allowed = ONLY_IN.get(name.split(".")[0])
                if allowed is not None and not any(under(module, place) for place in allowed):
                    found.append(f"{module} imports {name}")
                continue
            # `from warmerge.weights import compat` names a module, `from warmerge.errors import Finding` a class.
            target = name if name in modules else name.rpartition(".")[0]
            sideways = (
                under(module, "warmerge.pipeline")
                and under(target, "warmerge.pipeline")
                and target not in (module, "warmerge.pipeline")
                and not any(under(target, tool) for tool in SHARED_BY_COMMANDS)
            )
            in_report, of_report = (under(place, "warmerge.report") for place in (module, target))
            to_report = of_report and not in_report and floor(module) < FLOORS["warmerge.pipeline"]
            from_report = in_report and not of_report and floor(target) > BELOW_REPORT
            if floor(target) > floor(module) or sideways or to_report or from_report:
                found.append(f"{module} imports {target}")
    return found


def test_imports_lead_downwards() -> None:
    assert violations(PACKAGE) == []


def test_all_modules_were_looked_at() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 20
    assert "warmerge.weights.rules" in set(
        imports((PACKAGE / "weights" / "plan.py").read_text(), "warmerge.weights.plan", False)
    ) | {name.rpartition(".")[0] for name in imports((PACKAGE / "weights" / "plan.py").read_text(), "x.y", False)}


PLANTED = [
    ("weights/rules.py", "from warmerge.rewards.config import effective_config", "warmerge.rewards.config"),
    ("weights/rules.py", "from warmerge.pipeline import average", "warmerge.pipeline.average"),
    ("weights/rules.py", "import warmerge.cli", "warmerge.cli"),
    ("weights/rules.py", "from warmerge import average", "warmerge"),
    ("weights/rules.py", "from warmerge.report import model_card", "warmerge.report"),
    ("weights/rules.py", "def f():\n    import transformers.models", "transformers.models"),
    ("weights/rules.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure", "matplotlib.figure.Figure"),
    ("weights/compat.py", "import huggingface_hub", "huggingface_hub"),
    ("weights/compat.py", "importlib.import_module('huggingface_hub.utils')", "huggingface_hub.utils"),
    ("weights/compat.py", "from ..rewards import config", "warmerge.rewards.config"),
    ("rewards/config.py", "from warmerge.pipeline.average import prepare", "warmerge.pipeline.average"),
    ("rewards/config.py", "from warmerge.report import model_card", "warmerge.report"),
    ("rewards/config.py", "from warmerge.training import probe", "warmerge.training.probe"),
    ("rewards/config.py", "import accelerate", "accelerate"),
    ("training/probe.py", "from warmerge.report import figures", "warmerge.report.figures"),
    ("pipeline/train.py", "import ray", "ray"),
    ("pipeline/average.py", "from warmerge.pipeline.inspect import inspect", "warmerge.pipeline.inspect"),
    ("pipeline/average.py", "from . import inspect", "warmerge.pipeline.inspect"),
    ("pipeline/inspect.py", "from warmerge.cli import app", "warmerge.cli"),
    ("pipeline/inspect.py", "from matplotlib import pyplot", "matplotlib.pyplot"),
    ("weights/rules.py", "from warmerge.report.card import model_card", "warmerge.report.card"),
    ("rewards/config.py", "from warmerge.report import figures", "warmerge.report.figures"),
    ("report/card/text.py", "from warmerge.weights.plan import MergePlan", "warmerge.weights.plan"),
    ("report/figures.py", "from warmerge.rewards.config import effective_config", "warmerge.rewards.config"),
    ("report/__init__.py", "from ..weights import plan", "warmerge.weights.plan"),
    ("errors.py", "from warmerge.weights import plan", "warmerge.weights.plan"),
    ("version.py", "import warmerge.weights.plan as plan", "warmerge.weights.plan"),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty modules of the same names."""
    root = tmp_path_factory.mktemp("house") / "warmerge"
    for path in PACKAGE.rglob("*.py"):
        copy = root / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    return root


@pytest.mark.parametrize(("file", "line", "target"), PLANTED)
def test_a_planted_violation_is_found(house: Path, file: str, line: str, target: str) -> None:
    module = "warmerge." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    (house / file).write_text(f"import json\n{line}\n")
    assert violations(house) == [f"{module} imports {target}"]
    (house / file).write_text("")
    assert violations(house) == []


ALLOWED = [
    ("weights/remote/reading.py", "import huggingface_hub"),
    ("weights/plan.py", "from warmerge.errors import Finding\nfrom warmerge.weights import rules"),
    ("rewards/config.py", "import transformers\nfrom warmerge.weights.plan import MergePlan"),
    ("pipeline/average.py", "from warmerge.report import model_card\nfrom warmerge.version import versions"),
    (
        "report/figures.py",
        "import matplotlib\nfrom warmerge.errors import UsageError\nfrom warmerge.report import canvas",
    ),
    ("report/card/text.py", "from .. import rows\nfrom warmerge.version import versions"),
    ("cli.py", "import typer\nfrom warmerge.pipeline import average\nfrom warmerge.errors import Finding"),
    ("__main__.py", "from warmerge.cli import main"),
]


@pytest.mark.parametrize(("file", "lines"), ALLOWED)
def test_what_is_allowed_is_not_found(house: Path, file: str, lines: str) -> None:
    (house / file).write_text(lines)
    assert violations(house) == []
    (house / file).write_text("")


def test_a_module_on_no_floor_is_noticed(house: Path) -> None:
    (house / "attic.py").write_text("from warmerge.errors import Finding")
    with pytest.raises(AssertionError, match=r"warmerge\.attic stands on no floor"):
        violations(house)
    (house / "attic.py").unlink()
