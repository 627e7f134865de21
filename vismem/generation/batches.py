"""Answers to batches that are as large as the GPU's memory allows."""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vismem.data.sample import Sample
from vismem.errors import UserError, first_line
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy
from vismem.generation.types import Rollout
from vismem.models.vismem import VisMemModel

logger = logging.getLogger(__name__)


@dataclass
class FittingBatches:
    """Answers questions together, `size` at most: it is halved where they do not fit on the GPU, for good."""

    size: int = sys.maxsize

    def generate(
        self, model: VisMemModel, samples: Sequence[Sample], policy: InvocationPolicy, **settings: Any
    ) -> tuple[list[Rollout], float]:
        """What `engine.generate` returns, and the seconds that it took, without those of batches that did not fit.

        UserError for a question that does not fit alone, and of a base that processes hold together, who would not
        halve the same batches.
        """
        rollouts, seconds = list[Rollout](), 0.0
        while batch := samples[len(rollouts) : len(rollouts) + self.size]:
            started = time.perf_counter()
            try:
                rollouts += generate(model, batch, policy, **settings)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1 or model.backbone.processes > 1:
                    named = ", ".join(sample.id for sample in batch[:3])
                    raise UserError(f"the GPU's memory is too small to answer {named}: {first_line(error)}") from None
            else:
                seconds += time.perf_counter() - started
                continue
            torch.cuda.empty_cache()  # here, where the error no longer holds the batch's tensors
            self.size = (len(batch) + 1) // 2
            logger.warning("%d questions together do not fit on the GPU: from now on %d at most", len(batch), self.size)
        return rollouts, seconds
