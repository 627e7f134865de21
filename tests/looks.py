"""What a short memory starts from, computed slot by slot."""

import torch
from torch import Tensor

from vismem.models.memory import ALIKE, OWN, ShortFormer


def looked(former: ShortFormer, queries: Tensor, said: Tensor, features: Tensor, patches: Tensor) -> Tensor:
    """(g * N_s, n) what the slots see of one row's patches (g * T, n).

    queries (K, d); said (n, d), the states of the current segment; features (T, d).
    """
    mean = torch.stack([state / (state.square().mean() + 1e-6).sqrt() for state in said]).mean(0)
    segment = mean / (mean.square().mean() + 1e-6).sqrt()
    tokens, found, free = patches.reshape(len(features), -1), [], list(range(len(features)))
    for slot in range(former.length):
        query = queries[slot * len(queries) // former.length]
        wanted = former.wanted.weight @ torch.cat([segment, query])
        free = free or list(range(len(features)))
        scores = []
        for place in free:
            scale = (features[place].square().mean() + 1e-6).sqrt()
            scores.append(wanted @ features[place] / scale / len(wanted) ** 0.5)
        best = max(range(len(free)), key=lambda at: round(float(scores[at]) / ALIKE))
        scores[best] = scores[best] + OWN
        found.append(torch.stack(scores).softmax(0) @ tokens[free])
        del free[best]
    return torch.stack(found).reshape(former.length * former.merge, -1)
