"""The order in which tests run, and how they share a machine.

`tools/test.sh` runs them in as many processes as there are cores, a file at a time (`--dist loadfile`), so that what a file
makes once is made once. Files with long tests go first, so that none of them is what everybody waits for at the end. Tests
marked `alone` hold a clock to what they see; they run afterwards, one by one.
"""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared():
    "What is found in the folder of real data or beside it, by its parts; a test that asks for what is not there is skipped."
    data = Path(os.environ.get("LLMKIT_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))

    def find(*parts):
        found = [path for path in (data.joinpath(*parts), data.parent.joinpath(*parts)) if path.exists()]
        if not found:
            pytest.skip(f"needs {'/'.join(parts)}: set LLMKIT_SHARED_DATA to the folder of real data")
        return found[0]

    return find


def pytest_addoption(parser):
    parser.addoption("--alone", choices=("with", "without", "only"), default="with", help="tests marked alone")


def pytest_collection_modifyitems(config, items):
    "Files with slow tests first, otherwise as they come; and the tests marked `alone` as the option says."
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    kept = {"with": (False, True), "without": (False,), "only": (True,)}[config.getoption("--alone")]
    alone = lambda item: item.get_closest_marker("alone") is not None
    config.hook.pytest_deselected(items=[item for item in items if alone(item) not in kept])
    items[:] = [item for item in items if alone(item) in kept]
