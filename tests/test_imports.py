"""Imports run one way, and the science and the DVC stages need no pipeline framework. Read from the syntax trees."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

from conftest import ROOT

PATHS = sorted([*ROOT.glob("fer/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}
COMMANDS = {name for name in MODULES if name.startswith("pipelines.commands.")}
# framework -> the modules that import it, at whatever place
OWNERS = {
    "prefect": {"pipelines.flow", "pipelines.flow_page"},
    "mlflow": {"pipelines.registry", "pipelines.tracking"},
    "ray": {"pipelines.launch", "pipelines.sweeps.search"},
    "optuna": {"pipelines.sweeps.search"},
    "ruamel": {"pipelines.params"},
    "kagglehub": {"pipelines.stages.fetch"},
    "jinja2": {"pipelines.check_page", "pipelines.page"},
    **{key: {"pipelines.cli", *COMMANDS} for key in ("rich", "typer")},
    **{key: {"pipelines.serving"} for key in ("fastapi", "prometheus_client", "starlette", "uvicorn")},
    **{key: set() for key in ("yaml", "dvc", "torchvision", "timm")},
}
FRAMEWORKS = {*OWNERS, "matplotlib"}
# inside a function: for those who download, and for those with several processes
LAZY = {"pipelines.stages.fetch": {"kagglehub"}, "pipelines.stages.upscale": {"pipelines.launch"}}
# a module imports from lower layers, or from its own folder
LAYERS = [
    {"fer", "fer.errors"},
    {"fer.files", "fer.made_by", "fer.metrics", "fer.settings", "fer.statistics"},
    {"fer.device", "fer.signals", "fer.weights", "fer.input", "fer.losses", "fer.optimizer", "fer.schedule",
     "fer.resources", "fer.stored"},
    {"fer.run_folder"},
    {"fer.checkpoint", "fer.super_resolution"},
    {"fer.data"},
    {"fer.models", "fer.pictures"},
    {"fer.run"},
    {"fer.formats", "fer.step"},
    {"fer.batches"},
    {"fer.evaluate", "fer.predict"},
    {"fer.across", "fer.ensemble", "fer.explain", "fer.faces"},
    {"fer.card", "fer.teacher"},
    {"fer.export"},
    {"fer.train"},
]  # fmt: skip
# the same for the modules of pipelines beside its stages, imports inside functions included
FLOORS = [
    {
        *(
            "answering",
            "check_page",
            "comparison",
            "params",
            "predicting",
            "processes",
            "recorded",
            "store",
            "sweeps.files",
            "ui",
        )
    },
    {"data_sets", "experiments", "explaining", "flow_page", "promotion", "serving"},
    {"folds", "work"},
    {"launch", "sweeps.settings", "sweeps.space"},
    {"sweeps.folder"},
    {"sweeps.search", "report"},
    {"page", "registry"},
    {"tracking"},
    {"guard"},
    {"flow"},
    {"commands.terminal"},
    {"commands.champion", "commands.data", "commands.results"},
    {"commands.training", "commands.using"},
    {"commands.sweeping"},
    {"cli"},
]
BESIDE = {"pipelines.sweeps.settings": {"pipelines.sweeps.space"}}  # on the same floor


@cache
def imports(module: str, everywhere: bool = True) -> set[str]:
    """Absolute names of what a module imports; those at module level alone, or in functions too."""
    tree = ast.parse(MODULES[module].read_text())
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def tops(module: str, everywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(module, everywhere)}


def layer(module: str) -> int:
    for place, members in enumerate(LAYERS):
        if module in members or any(module.startswith(f"{name}.") for name in members - {"fer"}):
            return place
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def unit(module: str) -> str:
    return ".".join(module.split(".")[:2])


SCIENCE = [name for name in MODULES if name.split(".")[0] == "fer" or name.startswith("pipelines.stages")]
FER = [name for name in MODULES if name.split(".")[0] == "fer"]


def test_science_and_stages_import_no_framework() -> None:
    """Nor do the stages import anything of the pipeline but the readers of settings."""
    for module in SCIENCE:
        assert tops(module, everywhere=False) & FRAMEWORKS == set(), module
        assert tops(module) & FRAMEWORKS <= LAZY.get(module, set()), module
        ours = {name for name in imports(module) if name.startswith("pipelines.") and "stages" not in name}
        assert ours <= {"pipelines.params", "pipelines.data_sets", *LAZY.get(module, set())}, module


def test_each_framework_has_one_file() -> None:
    for framework, owners in OWNERS.items():
        assert {module for module in MODULES if framework in tops(module)} <= owners, framework
    for part, owner in (("ray.train", "pipelines.launch"), ("ray.tune", "pipelines.sweeps.search")):
        assert {module for module in MODULES if any(name.startswith(part) for name in imports(module))} == {owner}


def test_fer_imports_run_one_way() -> None:
    for module in FER:
        for name in imports(module):
            assert name.split(".")[0] != "pipelines", f"{module} imports {name}"
            if name in MODULES and unit(name) != unit(module):
                assert layer(name) < layer(module), f"{module} imports {name}"


PIPELINES = [
    name for name in MODULES
    if name.startswith("pipelines.") and not name.startswith("pipelines.stages")
    and name not in ("pipelines.commands", "pipelines.sweeps")
]  # fmt: skip


def test_pipelines_imports_run_one_way() -> None:
    floor = {f"pipelines.{module}": place for place, members in enumerate(FLOORS) for module in members}
    assert set(floor) == set(PIPELINES)
    for module in PIPELINES:
        for name in imports(module) - BESIDE.get(module, set()):
            if name in PIPELINES and name != module:
                assert floor[name] < floor[module], f"{module} imports {name}"


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FRAMEWORKS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib
for module in MODULES:
    importlib.import_module(module)
"""


def test_science_and_stages_run_without_the_frameworks(tmp_path: Path) -> None:
    """Import is also without work: no folder is made, nothing is printed."""
    modules = [name for name in SCIENCE if not name.endswith("__main__")]
    blocked = sorted(FRAMEWORKS - {"ruamel"})  # of params.yaml, a core dependency
    code = f"FRAMEWORKS, MODULES = {blocked!r}, {modules!r}\n{BLOCKED}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
