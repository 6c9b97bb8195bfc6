"Makes the helpers beside the tests importable, and the server's fixtures known."

from serve_server import make_gateway  # noqa: F401
