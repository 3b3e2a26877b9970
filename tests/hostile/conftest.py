"""What every file of hostile input needs: a server of commands, and a folder to give them in."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Server
from places import furnish


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that ends with the tests; it takes seconds to load what commands import."""
    with Server() as served:
        yield served


@pytest.fixture(scope="session")
def furnished(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with a run in which the model `fitting` was exported; to be copied."""
    root = tmp_path_factory.mktemp("furnished")
    furnish(root)
    shutil.copytree(root / "fitting", root / "run" / "grown")
    ended = server.run(root, ("export", "--exporter", "torchscript", "--run", "run"))  # the faster one
    assert ended.status == 0, ended.err
    return root
