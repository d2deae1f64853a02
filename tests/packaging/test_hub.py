"""The folder kernels/ as the Hub would carry it: loaded by `get_local_kernel`, its layers by `kernelize`."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import adacache_triton.kernels as packaged

pytest.importorskip("kernels.layer", reason="Hugging Face's kernels is not installed")  # not this folder
import kernels as hub  # noqa: E402

FOLDER = Path(__file__).parents[2] / "kernels"
NAME = "adacache-kernels"
MODULE = NAME.replace("-", "_")
SOURCES = FOLDER / "torch-ext" / MODULE
BACKEND = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
UNIQUE = f"_{MODULE}_{BACKEND}_0123abc"
# What the builder writes in place of `_ops.py`: the same two names, in a namespace of this build alone.
OPS = f"""
import torch

ops = getattr(torch.ops, {UNIQUE!r})

def add_op_namespace_prefix(op_name: str) -> str:
    return {UNIQUE + "::"!r} + op_name
"""
METADATA = {"id": UNIQUE, "name": NAME, "version": 0, "license": "Apache-2.0", "python-depends": []}
METADATA["backend"] = {"type": BACKEND}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    """The Hub's repository, with one build variant."""
    repository = tmp_path_factory.mktemp("hub")
    variant = repository / "build" / f"torch-{BACKEND}"
    shutil.copytree(SOURCES, variant, ignore=shutil.ignore_patterns("__pycache__", "_ops.py"))
    (variant / "_ops.py").write_text(OPS)
    (variant / "metadata.json").write_text(json.dumps(METADATA))
    return repository


@pytest.fixture(scope="module")
def loaded(artefact):
    return hub.get_local_kernel(artefact)


def test_the_description_is_one_that_the_builder_takes():
    build = pytest.importorskip("kernels._rust").Build.open(FOLDER)  # refuses fields and editions that it does not know
    assert {str(backend).lower() for backend in build.general.backends} == {"cuda", "rocm", "cpu"}
    text = (FOLDER / "build.toml").read_text()
    assert f'name = "{NAME}"' in text and "\n[torch-noarch]\n" in text
    assert (SOURCES / "__init__.py").exists(), "torch-ext/ holds the module of that name"


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.name)
def test_imports_are_relative_or_of_the_standard_library_torch_and_triton(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [] if node.level else [node.module]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "triton"}, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.name)
def test_operators_are_registered_in_the_namespace_of_the_build(path):
    registering = {"custom_op", "triton_op", "register_kernel", "register_fake", "define", "impl", "Library"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and "torch.library" in ast.unparse(node.func):
            assert node.func.attr in registering
            first = node.args[0]
            assert isinstance(first, ast.Call) and first.func.id == "add_op_namespace_prefix", f"line {node.lineno}"


def test_it_loads_beside_the_package(loaded):
    assert loaded is not packaged and loaded.__name__ == UNIQUE
    assert set(loaded.__all__) == set(packaged.__all__) and all(hasattr(loaded, name) for name in loaded.__all__)
    for namespace in (UNIQUE, MODULE):
        assert getattr(torch.ops, namespace).reuse is not None
    new, old = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    ours = packaged.residual_stats(new, old, frame_strides=(1,))
    assert torch.equal(loaded.residual_stats(new, old, frame_strides=(1,)), ours)

    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    reused = torch.compile(loaded.reuse, backend=backend, fullgraph=True)(new, old)
    assert torch.equal(reused, new + old) and seen == [f"{UNIQUE}.reuse.default"]


def layers(module) -> dict[str, type]:
    members = vars(module.layers).items()
    return {name: kind for name, kind in members if isinstance(kind, type) and issubclass(kind, nn.Module)}


def test_layers_have_no_state_and_nothing_but_a_forward(loaded):
    assert set(layers(loaded)) == set(layers(packaged)) == {"GatedResidual", "MeasuredGatedResidual", "Reuse"}
    for kind in layers(loaded).values():
        own = {name for name in vars(kind) if not name.startswith("__")}
        assert own == {"forward", "can_torch_compile", "has_backward"} and kind.__init__ is nn.Module.__init__


@hub.use_kernel_forward_from_hub("GatedResidual")
class GatedResidual(nn.Module):
    """A model's own, in plain PyTorch."""

    def forward(self, hidden, branch, gate, kept):
        residual = branch if gate is None else gate * branch
        kept.copy_(residual)
        return hidden + residual


@hub.use_kernel_forward_from_hub("MeasuredGatedResidual")
class MeasuredGatedResidual(nn.Module):
    def forward(self, hidden, branch, gate, kept):
        residual = branch if gate is None else gate * branch
        sums = torch.stack([(kept - residual).abs().flatten(1).sum(1), kept.abs().flatten(1).sum(1)], dim=1)
        kept.copy_(residual)
        return hidden + residual, sums


@hub.use_kernel_forward_from_hub("Reuse")
class Reuse(nn.Module):
    def forward(self, hidden, kept):
        return hidden + kept


OWN = (GatedResidual, MeasuredGatedResidual, Reuse)


class Block(nn.Module):
    """An MLP of a block with its epilogue; on a reused step, what stands for it."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.epilogue, self.measured, self.reuse = GatedResidual(), MeasuredGatedResidual(), Reuse()

    def forward(self, hidden, gate, kept):
        once = self.epilogue(hidden, self.mlp(hidden), gate, kept)
        twice, sums = self.measured(once, self.mlp(once), gate, kept)
        return self.reuse(twice, kept), sums


@pytest.fixture
def mapping(artefact):
    repositories = {kind.__name__: hub.LocalLayerRepository(artefact, layer_name=kind.__name__) for kind in OWN}
    return {name: {"cpu": repository} for name, repository in repositories.items()}


@pytest.mark.parametrize("form", ["3d", "4d", "no gate"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_kernelize(mapping, loaded, form, compiled):
    block = Block().eval()
    shape, gates = {"3d": ((2, 6, 8), (2, 1, 8)), "4d": ((2, 3, 4, 8), (2, 3, 1, 8)), "no gate": ((2, 6, 8), None)}[
        form
    ]
    hidden, gate, kept = torch.randn(shape), gates and torch.randn(gates), torch.randn(shape)
    expected_kept = kept.clone()
    expected, sums = block(hidden, gate, expected_kept)
    mode = hub.Mode.INFERENCE | hub.Mode.TORCH_COMPILE if compiled else hub.Mode.INFERENCE
    with hub.use_kernel_mapping(mapping, inherit_mapping=False):
        hub.kernelize(block, mode=mode, device="cpu", use_fallback=False)
    for own in (block.epilogue, block.measured, block.reuse):
        assert own.forward.__func__ is getattr(loaded.layers, type(own).__name__).forward
    run = torch.compile(block, backend="eager", fullgraph=True) if compiled else block
    got, got_sums = run(hidden, gate, kept)
    assert torch.equal(got, expected) and torch.equal(kept, expected_kept)
    torch.testing.assert_close(got_sums, sums)


def test_kernelize_for_training_keeps_the_models_own(mapping):
    block = Block()
    with hub.use_kernel_mapping(mapping, inherit_mapping=False):
        hub.kernelize(block, mode=hub.Mode.TRAINING, device="cpu")
    assert block.reuse.forward.__func__ is Reuse.forward
