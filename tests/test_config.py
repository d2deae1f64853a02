"""Configurations: what is refused and how it is said, the presets, JSON."""

import json
import math

import numpy as np
import pytest

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization

BOOK = Codebook((0.1, 0.2), (3, 2, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Codebook((0.2, 0.1), (3, 2, 1)), "thresholds: expected ascending values, got 0.1 after 0.2"),
        (lambda: Codebook((0.1, 0.1), (3, 2, 1)), "thresholds: expected ascending values, got 0.1 after 0.1"),
        (lambda: Codebook((0.1, math.inf), (3, 2, 1)), "thresholds: expected a finite number > 0, got inf"),
        (lambda: Codebook((math.nan,), (3, 2)), "thresholds: expected a finite number > 0, got nan"),
        (lambda: Codebook((0,), (3, 2)), "thresholds: expected a finite number > 0, got 0"),
        (lambda: Codebook((0.1,), (3, 0)), "rates: expected an integer >= 1, got 0"),
        (lambda: Codebook((0.1,), (3,)), "rates: expected 2 values (one a threshold, one for larger distances), got 1"),
        (lambda: Codebook((0.1,), (3, 2.0)), "rates: expected an integer >= 1, got 2.0"),
        (lambda: Codebook((True,), (3, 2)), "thresholds: expected a finite number > 0, got True"),
        (lambda: Codebook(0.1, (3, 2)), "thresholds: expected a list, got 0.1"),
        (lambda: Codebook.parse("0.1:3,x"), "codebook: expected threshold:rate pairs and a last rate, as in "),
        (lambda: Codebook.parse("0.2:3,0.1:2,1"), "thresholds: expected ascending values, got 0.1 after 0.2"),
        (lambda: Codebook((10**400,), (3, 2)), "thresholds: expected a finite number > 0, got 1000"),
        (lambda: BOOK.scaled(0), "factor: expected a finite number > 0, got 0"),
        (lambda: MotionRegularization((5, 4)), "window: expected 1 <= first <= last, got (5, 4)"),
        (lambda: MotionRegularization((0, 4)), "window: expected 1 <= first <= last, got (0, 4)"),
        (lambda: MotionRegularization((1, 4.0)), "window: expected an integer >= 0, got 4.0"),
        (lambda: MotionRegularization((1,)), "window: expected two steps (first, last), got (1,)"),
        (lambda: MotionRegularization((1, 4), ()), "frame_strides: expected distinct strides, at least one, got ()"),
        (lambda: MotionRegularization((1, 4), (0,)), "frame_strides: expected an integer >= 1, got 0"),
        (lambda: MotionRegularization((1, 4), scale=0), "scale: expected a finite number > 0, got 0"),
        (lambda: MotionRegularization((1, 4), divisor=-1), "divisor: expected a finite number > 0, got -1"),
        (lambda: AdaCacheConfig({0.1: 2}), "codebook: expected a Codebook, got {0.1: 2}"),
        (lambda: AdaCacheConfig(BOOK, True), "motion: expected a MotionRegularization or None, got True"),
        (lambda: AdaCacheConfig(BOOK, num_steps=2), "num_steps: expected an integer >= 3, got 2"),
        (lambda: AdaCacheConfig(BOOK, probe_block=0.5), "probe_block: expected an integer or None, got 0.5"),
        (lambda: AdaCacheConfig.official("embedded"), "preset: expected one of open-sora-100, open-sora-30-fast, "),
        (lambda: AdaCacheConfig.preset("fast"), "preset: expected one of "),
        (lambda: AdaCacheConfig.official(["open-sora-100"]), "preset: expected one of open-sora-100, "),
        (lambda: AdaCacheConfig.from_json(None), "AdaCacheConfig: not valid JSON: "),
        (lambda: AdaCacheConfig.from_json("{"), "AdaCacheConfig: not valid JSON: "),
        (lambda: AdaCacheConfig.from_json("[]"), "AdaCacheConfig: expected an object with named fields, got []"),
        (lambda: AdaCacheConfig.from_json("{}"), "codebook: expected a Codebook, got None"),
        (lambda: Codebook.from_dict({"rate": 1}), "Codebook: unknown field 'rate'; expected some of thresholds, rates"),
    ],
)
def test_refused_in_one_line_that_names_it(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_rate_is_that_of_the_first_threshold_above():
    assert [BOOK.rate(d) for d in (0, 0.0999, 0.1, 0.1999, 0.2, 9)] == [3, 3, 2, 2, 1, 1]
    assert [AdaCacheConfig.official("open-sora-100").codebook.rate(d) for d in (math.nan, math.inf)] == [1, 1]


def test_numbers_of_numpy_become_plain_ones():
    book = Codebook([np.float32(0.5)], [np.int64(2), 1])
    assert book == Codebook((0.5,), (2, 1)) and json.loads(book.to_json()) == {"thresholds": [0.5], "rates": [2, 1]}


def test_codebooks_as_text():
    assert Codebook.parse("0.1:3, 0.2:2, 1") == BOOK == Codebook.parse(str(BOOK))
    assert Codebook.parse("4") == Codebook((), (4,))
    third = Codebook((1 / 3,), (3, 1))
    assert Codebook.parse(str(third)) == third
    assert BOOK.scaled(0.5) == Codebook((0.05, 0.1), (3, 2, 1))


@pytest.mark.parametrize("name", ["open-sora-100", "open-sora-30-fast", "open-sora-30-slow", "embedded"])
@pytest.mark.parametrize("moreg", [False, True])
def test_presets_go_to_json_and_back(name, moreg):
    config = AdaCacheConfig.preset(name, moreg=moreg)
    assert AdaCacheConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(AdaCacheConfig.from_dict(json.loads(config.to_json())))
    assert (config.motion is not None) == moreg


def test_official_presets_are_the_published_ones():
    """Against the traces, which carry the released configuration, in test_schedule; the names here."""
    fast = AdaCacheConfig.official("open-sora-30-fast", moreg=True)
    assert str(fast.codebook) == "0.08:6,0.16:5,0.24:4,0.32:3,0.4:2,1"
    assert str(AdaCacheConfig.official("open-sora-30-slow").codebook) == "0.08:3,0.16:2,1"
    assert str(AdaCacheConfig.official("open-sora-100").codebook) == "0.03:12,0.05:10,0.07:8,0.09:6,0.11:4,3"
    assert fast.motion == MotionRegularization((4, 26), (1,), 0.385, 8, 1, 10)
    assert AdaCacheConfig.official("open-sora-100", moreg=True).motion.window == (10, 90)
