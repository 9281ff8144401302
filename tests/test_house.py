"""The house: which room may import which, and how large it may be.

The floors are those of CONTRIBUTING.md. Imports inside functions count as well: they are arrows all the same.
"""

import ast
import functools
import graphlib
import itertools

import pytest

from tests.conftest import ROOT

LIBRARY = ROOT / "minimind_jax"

# From the top down; a file of the library that is in none of these rooms is on the ground.
FLOORS = (
    ("cli", "commands", "__main__"),
    ("plan", "demo"),
    ("pipeline",),
    ("stages",),
    ("runs", "rl", "serve", "evaluate"),
    ("inference",),
    ("training", "convert"),
    ("data",),
    ("losses", "config"),
    ("model",),
)
GROUND = len(FLOORS)

# What a room must not reach, in however many steps; `ground files` are those that read folders and settings.
NEVER = {
    "model": {"minimind_jax.folders", "minimind_jax.paths", "minimind_jax.hub", "minimind_jax.texts"},
    "losses": {"minimind_jax.folders", "minimind_jax.paths", "minimind_jax.hub", "minimind_jax.texts"},
}
FOREIGN = {  # packages that a room must not import
    "config": {"jax", "flax", "optax", "orbax", "grain", "tokenizers", "torch"},
    "model": {"tokenizers", "orbax", "optax", "grain", "safetensors"},
    "losses": {"tokenizers", "orbax", "optax", "grain", "safetensors"},
}

MOST_LINES = 420  # of a file
LIBRARY_LINES = 38_483  # of all; what is added has to be won elsewhere, and more: the aim is 20,000


@functools.cache
def modules():
    """Module name -> (its file, the modules of ours that it imports, the packages of others)."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in LIBRARY.rglob("*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    return {name: (file, *_imports(file, files)) for name, file in files.items()}


def _imports(file, known):
    ours, others = set(), set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in submodules]
        for name in names:
            ours.add(name) if name in known else others.add(name.partition(".")[0])
    return ours, others


def room(module):
    return [*module.split("."), ""][1]


def floor(module):
    return next((n for n, rooms in enumerate(FLOORS) if room(module) in rooms), GROUND)


def below(module):
    """All modules of ours that a module reaches."""
    found, left = set(), [module]
    while left:
        new = modules()[left.pop()][1] - found
        found |= new
        left += new
    return found


def test_imports_point_downward():
    assert {"training", "data", "model"} <= {room(module) for module in modules()}
    up = [
        f"{module} imports {other}"
        for module, (_, ours, _) in modules().items()
        for other in sorted(ours)
        if other != "minimind_jax" and floor(other) < floor(module)
    ]
    assert not up, "\n".join(["these point up:", *up])


def test_no_circle_of_files():
    try:
        tuple(graphlib.TopologicalSorter({name: ours for name, (_, ours, _) in modules().items()}).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_circle_of_rooms():
    arrows = {}
    for module, (_, ours, _) in modules().items():
        if floor(module) != GROUND:
            arrows.setdefault(room(module), set()).update(room(o) for o in ours if floor(o) != GROUND)
    try:
        tuple(graphlib.TopologicalSorter({name: below - {name} for name, below in arrows.items()}).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", NEVER)
def test_a_pure_room_reaches_no_files(name):
    for module in (module for module in modules() if room(module) == name):
        assert not below(module) & NEVER[name], module


@pytest.mark.parametrize("name", FOREIGN)
def test_a_room_imports_no_package_that_is_not_its_business(name):
    for module in (module for module in modules() if room(module) == name):
        reached = {other for each in {module, *below(module)} for other in modules()[each][2]}
        assert not reached & FOREIGN[name], module


def test_training_and_below_name_no_stage():
    """A stage's name as a word of the code, such as `stage == "dpo"`, is knowledge that belongs to the stage."""
    from minimind_jax.stages import STAGES

    names, found = STAGES.keys() - {"tokenizer"}, []  # that is a file as well, which all know
    for module, (file, _, _) in modules().items():
        if floor(module) >= FLOORS.index(("inference",)) and room(module) != "config":
            words = (n.value for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Constant))
            found += [f"{module}: {word!r}" for word in words if isinstance(word, str) and word in names]
    assert not found, "\n".join(found)


def test_files_are_short():
    files = itertools.chain(LIBRARY.rglob("*.py"), (ROOT / "tests").rglob("*.py"), (ROOT / "scripts").rglob("*.py"))
    long = {f"{file.relative_to(ROOT)}: {count}" for file in files if (count := lines(file)) > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines: {sorted(long)}"


def test_the_library_stays_small():
    total = sum(lines(file) for file, _, _ in modules().values())
    assert total < LIBRARY_LINES, f"{total:,} lines"


def lines(file):
    return file.read_text("utf-8").count("\n")
