"""A running tritonserver for the tests that only ask it."""

import os
from collections.abc import Iterator

import pytest
from stand_in import make_repository

from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE
from vismem.serving.server import TritonServer, triton_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if not DEFAULT_PYTHON.exists() and VARIABLE not in os.environ:
        pytest.fail(f"{DEFAULT_PYTHON} is missing: run `make serving`")
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMEM_WORKERS", "2")  # so that two answers keep it busy
        with triton_server(make_repository(folder), log=folder / "server.log") as running:
            yield running
