"Makes the server's fixtures known, and the root of the project."

from pathlib import Path

import pytest
from serve_server import make_gateway  # noqa: F401


@pytest.fixture(scope="session")
def root():
    "The root of the project."
    return Path(__file__).parents[2]
