"""``-k <slug>`` selects the tests of a vector set; sets that the chosen folder lacks are named, not replayed."""

import sys
from pathlib import Path

from moetrain.testing.golden import golden_folder

sys.path.insert(0, str(Path(__file__).parent))


def slug(path):
    return path.stem.removeprefix("test_").replace("_", "-")


def missing():
    tests = sorted(Path(__file__).parent.glob("test_*.py"))
    return [test for test in tests if not (golden_folder() / f"{slug(test)}.json").exists()]


def pytest_ignore_collect(collection_path):
    return True if collection_path in missing() else None


def pytest_terminal_summary(terminalreporter):
    for test in missing():
        terminalreporter.write_line(f"golden vectors {slug(test)} are not in {golden_folder()}: not replayed")


def pytest_itemcollected(item):
    if item.path.parent == Path(__file__).parent:
        item.extra_keyword_matches.add(slug(item.path))
