"""docs/models.md is what its command writes, and what it says is kept is what a cached model keeps."""

import diffusers
import model_table
import pytest
import torch
from model_table import FACTS, Size
from tiny_models import MODELS

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache
from adacache_triton.models import described, registered

pytestmark = pytest.mark.filterwarnings("ignore")
pinned = pytest.mark.skipif(diffusers.__version__ != model_table.PINNED, reason="written with another diffusers")


def test_every_registered_class_has_a_row_and_no_other():
    assert set(FACTS) == set(registered())
    rows = [line.split(" | ")[1] for line in model_table.PATH.read_text().splitlines() if line.startswith("| ")][1:]
    assert rows == [f"`{name}`" for name in FACTS]


@pinned
def test_it_is_what_the_command_writes():
    assert model_table.PATH.read_text() == model_table.document()


@pinned
def test_a_class_without_facts_or_tests_is_noticed(monkeypatch):
    monkeypatch.setattr("adacache_triton.models._STACKS", {"New": described("STDiT3")})
    with pytest.raises(KeyError, match="New"):
        model_table.document()
    monkeypatch.setitem(FACTS, "New", model_table.Facts("New", "", "", None))
    with pytest.raises(ValueError, match="New: expected tiny models or an interface double, got neither"):
        model_table.document()


def test_frames_are_read_from_the_descriptions():
    assert model_table._frames(described("WanTransformer3DModel")) == "axis 2"
    assert model_table._frames(described("CogVideoXTransformer3DModel")) == "axis 1"
    assert model_table._frames(described("LTXVideoTransformer3DModel")) == "`num_frames`"
    assert model_table._frames(described("Cosmos3OmniTransformer")) == "`vision_token_shapes`"


@pytest.mark.parametrize(
    ("name", "size"),
    {
        "latte": Size("", 3, 4, 4, 24, samples=2),
        "wan": Size("", 3, 4, 4, 24),
        "wan ": Size("", 3, 4, 4, 24, calls=2),
        "consisid": Size("", 3, 4, 4, 16, samples=2, beside=6),
        "helios": Size("", 3, 4, 4, 24, beside=21),
        "framepack": Size("", 3, 4, 4, 20, samples=2),
        "ltx2": Size("", 3, 4, 4, 16, samples=2, audio=(5, 8)),
    }.items(),
)
@torch.no_grad()
def test_kept_bytes_are_those_of_a_cached_model(name, size):
    tiny = MODELS[name.strip()]
    if not tiny.available:
        pytest.skip("another diffusers")
    model = tiny.model()
    config = AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=7)
    handle = apply_adacache(model, config, calls_per_step=size.calls)
    branches = [tiny.inputs(seed) for seed in range(size.calls)]
    with handle.run():
        for _ in range(2):
            for call in branches:
                model(**call)
        assert handle.report().computed_steps == [1, 2]
        assert handle.report().kept_bytes == 2 * size.kept_bytes, "in float32"
