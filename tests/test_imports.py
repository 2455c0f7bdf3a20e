"""Who may import whom, read from the sources."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "colossal_bcd"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    "names",
    "sharding",
    "optim",
    "low_rank",
    "block",
    "engine",
    "checkpoint",
    "memory",
    "fsdp",
    "booster",
    "compat",
    "cli",
    "__main__",
)
"""Parts of the package; each may import itself and those before it."""

LIBRARIES = {
    "checkpoint": {"torch", "safetensors", "tqdm"},
    "booster": {"torch", "colossalai", "transformers", "peft", "bitsandbytes", "safetensors", "tqdm"},
    "cli": {"torch", "click", "rich", "transformers", "matplotlib", "peft"},
    "compat": {"torch", "transformers", "numpy"},
}
"""Libraries beside Python's own that a part may import; torch for the others."""


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Full dotted names of what a file imports anywhere in it, and `torch.distributed` where it reaches for it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def by_path(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_imports_of_the_package_follow_the_dependency_rule(path):
    part = part_of(path)
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("colossal_bcd.")}
    if part == "__init__":
        return  # names the homes of what it exports, and imports one when it is asked for
    below = LAYERS[: LAYERS.index(part)] if part in LAYERS else ("sharding",)  # testing
    ranks = {"testing"} if part == "cli" else set()  # doctor and verify start some
    assert parts <= {*below, *ranks, part}


def module_of(path):
    return ".".join(("colossal_bcd", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_modules_import_each_other_in_no_circle():
    """Nor for types alone, and nor inside of functions."""
    modules = {module_of(path): path for path in FILES}
    graph = {
        # The __init__ of a folder is its map: it imports what it exports, and nobody in the folder imports it.
        name: {known for full in imported(path) for known in (full, full.rpartition(".")[0]) if known in modules}
        - {name}
        for name, path in modules.items()
        if path.name != "__init__.py"
    }
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_imports_of_libraries_are_torch_outside_booster(path):
    libraries = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names - {"colossal_bcd"}
    # 8-bit states are stored by bitsandbytes' kernels, which are imported when such a state is made.
    kernels = {"bitsandbytes"} if by_path(path) == "optim/state/quantized.py" else set()
    assert libraries <= LIBRARIES.get(part_of(path), {"torch"}) | kernels


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_imports_of_torch_distributed_stay_where_communication_is(path):
    reaches = any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in imported(path))
    files = {"sharding/dtensor.py", "sharding/mesh.py", "sharding/rounds.py", "testing.py"}
    allowed = by_path(path) in files or part_of(path) in {"engine", "checkpoint", "booster", "fsdp", "cli"}
    assert allowed or not reaches


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.distributed as dist", {"torch.distributed"}),
        ("from torch import distributed", {"torch.distributed"}),
        ("from torch.distributed import all_reduce", {"torch.distributed.all_reduce"}),
        ("import torch\nx = torch.distributed.all_reduce", {"torch", "torch.distributed"}),
        ("def f():\n    import colossalai", {"colossalai"}),
    ],
    ids=["import", "from torch", "from distributed", "attribute", "in a function"],
)
def test_imported_sees_every_form(tmp_path, source, names):
    """Guards the walk itself."""
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imported(path) == names


def run_python(code):
    """Standard output of a clean interpreter; anything on standard error fails."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


WATCHED = """
import logging, os, random, sys, threading
import torch
def world():
    return (dict(os.environ), list(sys.path), threading.active_count(), logging.root.level, list(logging.root.handlers),
            random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.distributed.is_initialized())
before = world()
"""


def test_import_loads_torch_alone_and_takes_no_action():
    names = ["colossal_bcd", "colossal_bcd.sharding", "colossal_bcd.optim", "colossal_bcd.testing"]
    imports = "\n".join(f"import {name}\nassert world() == before, {name!r}" for name in names)
    code = (
        f"{WATCHED}\n{imports}\n"
        "libraries = ('colossalai', 'transformers', 'peft', 'bitsandbytes', 'click', 'rich', 'torch.distributed.run', "
        "'torch.distributed.launch', 'torch.distributed.elastic.agent')\n"
        "print([library for library in libraries if library in sys.modules])"
    )
    assert run_python(code) == "[]\n"


ASKED_FOR = """
import sys, torch, colossal_bcd
from colossal_bcd import CAME, Adafactor, AdamW, GaLoreLion, Lamb, Lion, compat
def loaded():
    return sorted({"colossalai", "transformers", "bitsandbytes"} & set(sys.modules))
def step(cls, **options):
    param = torch.nn.Parameter(torch.ones(3, 3))
    param.grad = torch.ones_like(param)
    cls([param], **options).step()
for cls in (AdamW, Lamb, CAME, Lion):
    step(cls, lr=1e-3)
step(Adafactor)
print(GaLoreLion.__name__, colossal_bcd.estimate(AdamW(torch.nn.Linear(4, 4).parameters())).state, loaded())
step(CAME, lr=1e-3, moment_bits=8)
print(loaded())
"""


def test_no_library_is_loaded_before_it_is_asked_for():
    """Neither by optimizers, their steps and their estimate nor by the names of originals."""
    pytest.importorskip("bitsandbytes")
    asked = f"{ASKED_FOR}\ncompat.BAdamCallback\nprint('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.splitlines() == ["GaLoreLion 160 []", "['bitsandbytes']", "True"]


def test_import_of_the_package_defers_its_parts():
    loaded = "print([name for name in sys.modules if name.startswith(('colossal_bcd.', 'torch'))])"
    assert run_python(f"import sys, colossal_bcd\n{loaded}") == "[]\n"


def test_package_exports_resolve():
    code = "import colossal_bcd\nfor name in colossal_bcd.__all__: assert getattr(colossal_bcd, name).__name__ == name"
    run_python(code)


def test_package_lists_its_exports_and_refuses_others():
    import colossal_bcd

    assert set(colossal_bcd.__all__) <= set(dir(colossal_bcd))
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = colossal_bcd.Adam
