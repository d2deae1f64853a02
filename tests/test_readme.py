"""The README's numbers are those of the committed rows."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_written_from_the_rows():
    readme = (ROOT / "README.md").read_text()
    for name, table in load("update_readme").tables().items():
        assert f"<!-- {name}:begin -->\n{table}<!-- {name}:end -->" in readme


def test_links_lead_somewhere():
    for part in (ROOT / "README.md").read_text().split("](")[1:]:
        target = part.split(")")[0]
        if target.startswith("#"):  # a heading's
            headings = [line.lstrip("# ").lower() for line in (ROOT / "README.md").read_text().splitlines()]
            assert target[1:] in [heading.replace(" ", "-") for heading in headings], target
        else:
            assert target.startswith("https://") or (ROOT / target).exists(), target


def test_schedules_of_the_difficulty_search_have_their_length():
    embedded = load("embedded")
    for count in (6, 8, 13, 22):
        for warmup in (2, 4):
            for power in (1.0, 1.7):
                steps = embedded.dense_early(count, warmup, power)
                assert len(set(steps)) == count and steps == sorted(steps)
                assert steps[:warmup] == list(range(1, warmup + 1)) and steps[-1] == embedded.STEPS
