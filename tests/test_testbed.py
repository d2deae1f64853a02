"""The embedded model: its videos, its training script and what the package carries."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adacache_triton import AdaCacheConfig, apply_adacache
from adacache_triton.testbed import scenes, train, videos
from adacache_triton.testbed.pipeline import WEIGHTS, EmbeddedPipeline, EmbeddedWanPipeline


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_videos_are_reproducible_and_ordered_from_still_to_lively():
    change = []
    for label in range(len(videos.CLASSES)):
        drawn = videos.draw(label, 64, generator())
        assert drawn.shape == (64, 3, videos.NUM_FRAMES, videos.SIZE, videos.SIZE)
        assert torch.equal(drawn, videos.draw(label, 64, generator()))
        assert 0 <= drawn.min() and drawn.max() <= 1
        change.append((drawn[:, :, 1:] - drawn[:, :, :-1]).abs().mean().item())
    still, drift, *moving, texture = change
    assert still == 0 and 2 * drift < min(moving) and 2 * max(moving) < texture
    batch, labels = videos.batch(512, generator())
    assert labels.shape == (512, 1) and labels[:, 0].bincount().min() > 50
    assert abs(batch.mean()) < 0.3 and 0.7 < batch.std() < 1.3
    torch.testing.assert_close(videos.to_pixels(videos.to_model(drawn)), drawn)


def test_scenes_are_reproducible_and_show_what_their_captions_say():
    batch, words = scenes.batch(512, generator())
    again, _ = scenes.batch(512, generator())
    assert torch.equal(batch, again) and batch.shape == (512, 3, videos.NUM_FRAMES, videos.SIZE, videos.SIZE)
    assert words.unique().tolist() == list(range(len(scenes.WORDS)))
    assert 0.4 < batch.std() < 1.5
    change = []
    for i in range(len(scenes.CLASSES)):
        drawn = scenes.draw(torch.tensor([scenes.parse(f"{scenes.CLASSES[i]} red navy")] * 32), generator())
        assert 0 <= drawn.min() and drawn.max() <= 1
        change.append((drawn[:, :, 1:] - drawn[:, :, :-1]).abs().mean().item())
        red, green, blue = drawn.amax((0, 2, 3, 4))
        assert (red > 0.8 and green < 0.5) if i else red < 0.3
    empty, disc, glide, bounce, swarm, waves = change
    assert empty == disc == 0 < 2 * glide < bounce < swarm < waves
    for prompt in ("swarm red", "swarm navy red", "jump red navy"):
        with pytest.raises(ValueError, match="prompt: expected .*, got"):
            scenes.parse(prompt)


def test_orthogonalise():
    for shape in ((3, 16, 64), (2, 64, 16)):
        singular = torch.linalg.svdvals(train.orthogonalise(torch.randn(shape)))
        assert singular.min() > 0.3 and singular.max() < 1.4


@pytest.mark.parametrize("name", ("latte", "wan"))
def test_training_learns_resumes_and_exports(tmp_path, monkeypatch, name):
    for config in ("LATTE", "WAN"):
        monkeypatch.setattr(train, config, getattr(train, config) | {"num_layers": 1})

    def run(out, every):
        arguments = f"train {name} --out {out} --steps 6 --batch 2 --workers 1 --every {every}"
        monkeypatch.setattr("sys.argv", arguments.split())
        train.main()

    run(tmp_path / "whole", 6)
    whole = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in whole] == [6]

    real, seen = train.loss_of, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 2)
    run(tmp_path / "parts", 2)
    parts = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in parts] == [2, 4, 6] and parts[-1]["loss"] == whole[-1]["loss"]
    for file in ("transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("name", ("latte", "wan"))
def test_what_the_package_carries(name):
    weights = load_file(WEIGHTS / name / "transformer/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert all(torch.isfinite(t).all() for t in weights.values())
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*")) < 8 << 20
    config = json.loads((WEIGHTS / name / "transformer/config.json").read_text())
    expected = json.loads(json.dumps(getattr(train, name.upper())))
    assert {k: config[k] for k in expected} == expected


def test_the_second_model_reads_its_captions():
    """The velocity error of held-out scenes is smaller with their own caption than with another word in any place."""
    model = EmbeddedWanPipeline.load().transformer
    own = torch.tensor([scenes.parse("bounce yellow plum")] * 8)
    x0 = videos.to_model(scenes.draw(own, generator(10**9)))
    noise = torch.randn(x0.shape, generator=generator(1))

    def error(prompt: str, t: float) -> float:
        captions = train.one_hot(torch.tensor([scenes.parse(prompt)] * 8), model.config.text_dim)
        with torch.no_grad():
            velocity = model(x0 + t * (noise - x0), torch.full((8,), 1000 * t), captions).sample
        return (velocity - (noise - x0)).square().mean().item()

    for t, other in ((0.95, "waves yellow plum"), (0.95, "bounce blue plum"), (0.95, "bounce yellow forest")):
        assert error("bounce yellow plum", t) < error(other, t)


@pytest.fixture(scope="module")
def pipe():
    return EmbeddedPipeline.load()


def test_the_model_knows_its_classes(pipe):
    """The velocity error of held-out videos is smaller with their own class than with any other."""
    errors = np.zeros((len(videos.CLASSES),) * 2)
    with torch.no_grad():
        for label in range(len(videos.CLASSES)):
            x0 = videos.to_model(videos.draw(label, 4, generator(10**9)))
            noise = torch.randn(x0.shape, generator=generator(1))
            x_t = x0 + 0.95 * (noise - x0)
            for guess in range(len(videos.CLASSES)):
                captions = train.one_hot(torch.full((4, 1), guess), pipe.transformer.config.caption_channels)
                velocity = pipe.transformer(x_t, torch.full((4,), 950.0), captions).sample
                errors[label, guess] = (velocity - (noise - x0)).square().mean()
    assert (errors.argmin(1) == np.arange(len(videos.CLASSES))).all(), errors.round(3)


def test_lively_classes_move_more(pipe):
    frames = pipe(list(videos.CLASSES), num_inference_steps=12, generator=generator()).frames
    change = np.abs(np.diff(frames, axis=1)).mean((1, 2, 3, 4))
    assert change[0] < 0.01 < change[1] < change[2:].min() and change.argmax() == 5


def test_a_cached_batch_of_one_prompt(pipe):
    plain = pipe("spin", num_inference_steps=10, generator=generator()).frames
    handle = apply_adacache(pipe, AdaCacheConfig.preset("embedded", moreg=True))
    cached = pipe("spin", num_inference_steps=10, generator=generator()).frames
    handle.remove()
    assert plain.shape == (1, videos.NUM_FRAMES, videos.SIZE, videos.SIZE, 3)
    assert 3 <= len(handle.report().computed_steps) <= 10
    assert np.abs(cached - plain).mean() < 0.2
    assert (pipe("spin", num_inference_steps=10, generator=generator()).frames == plain).all()


def test_an_unknown_class_is_named(pipe):
    with pytest.raises(ValueError, match="prompt: the embedded model knows still, drift, .*, got 'jump'"):
        pipe("jump")
