"""Fixtures shared by all tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from vismem.models.processors import make_video_optional

torch.set_num_threads(1)
make_video_optional()  # some tests build processors of their own


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("validate"))


@pytest.fixture(scope="module")
def scores_differ() -> Iterator[None]:
    """A random model is never right: score answers by their letters instead, so that groups have spread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vismem.training.rewards.score", lambda sample, text: float(sum(map(ord, text)) % 2))
        yield
