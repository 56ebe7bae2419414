"""Imports inside the engine run one way: the order stands in the docstring of engine/flowgrove/__init__.py."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from subprocesses import ROOT

ENGINE = ROOT / "engine"
LAYERS = [
    line.split()
    for line in ast.get_docstring(ast.parse((ENGINE / "flowgrove" / "__init__.py").read_text())).splitlines()
    if line.startswith("    ")
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports_of(source, modules):
    """The modules of the engine that a source imports, at its top or inside a function;
    of `from a import b` module a.b if there is one, else a.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in full}
    return names & modules


@pytest.fixture(scope="module")
def graph():
    """Module → the modules that it imports."""
    files = {
        ".".join(path.relative_to(ENGINE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ENGINE.rglob("*.py")
    }
    return {name: imports_of(path.read_text(), set(files)) for name, path in files.items()}


def room(module):
    """The room, or the module itself where it lies in none; of the package as a whole, its process module."""
    return "process" if module == "flowgrove" else module.split(".")[1]


def test_every_room_has_its_place_in_the_order(graph):
    assert {room(module) for module in graph} == set(LAYER)
    assert len(LAYER) == sum(map(len, LAYERS)), "a name stands in one line"


def test_imports_go_down(graph):
    """Along a line only from room to room, so that one of them can come first."""
    assert [(a, b) for a, found in graph.items() for b in found if LAYER[room(b)] < LAYER[room(a)]] == []


def test_no_imports_go_round_in_a_circle(graph):
    rooms = {}
    for module, found in graph.items():
        rooms.setdefault(room(module), set()).update({room(each) for each in found} - {room(module)})
    for each in (graph, rooms):
        TopologicalSorter(each).prepare()


def test_a_circle_and_a_lazy_import_are_found():
    modules = {"flowgrove", "flowgrove.a", "flowgrove.a.b"}
    assert imports_of("def f():\n    from flowgrove.a import b, c\n", modules) == {"flowgrove.a", "flowgrove.a.b"}
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_rooms_say_what_they_hold_and_import_nothing():
    for path in (ENGINE / "flowgrove").glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path
