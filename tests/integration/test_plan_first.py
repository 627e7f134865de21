"""A process that plans first of all computes afterwards as any other does."""

import subprocess
import sys

PROGRAM = """
import torch
from vismem.plan.shapes import beside_dispatch
with beside_dispatch(), torch.device("meta"):
    torch.empty(0)
with torch.device("meta"):
    assert torch.tensor([0.5]).is_meta, "bases that are loaded would have buffers that nobody fills"
"""


def test_torch_does_not_note_what_a_plan_replaces() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
