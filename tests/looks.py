"""What a short memory starts from, computed slot by slot."""

import torch
from torch import Tensor

from vismem.models.memory import OWN, ShortFormer


def looked(former: ShortFormer, queries: Tensor, said: Tensor, features: Tensor, patches: Tensor) -> Tensor:
    """(g * N_s, n) what the slots see of one row's patches (g * T, n).

    queries (K, d); said (n, d), the states of the current segment; features (T, d).
    """
    mean = torch.stack([state / (state.square().mean() + 1e-6).sqrt() for state in said]).mean(0)
    segment = mean / (mean.square().mean() + 1e-6).sqrt()
    tokens, found = patches.reshape(len(features), -1), []
    for slot in range(former.length):
        query = queries[slot * len(queries) // former.length]
        wanted = former.wanted.weight @ torch.cat([segment, query])
        scores = []
        for place, feature in enumerate(features):
            own = place == (2 * slot + 1) * len(features) // (2 * former.length)
            scale = (feature.square().mean() + 1e-6).sqrt()
            scores.append(OWN * own + wanted @ feature / scale / len(wanted) ** 0.5)
        found.append(torch.stack(scores).softmax(0) @ tokens)
    return torch.stack(found).reshape(former.length * former.merge, -1)
