"""Which questions are drawn together: those that share a picture, or a group that their source names, also over others.

The only place that decides it: splits are made by it (`vismem init`), and intervals and tests rest on it.
"""

from collections.abc import Callable, Iterable, Sequence

from vismem.data.fingerprint import ImageFacts, image_cache, sample_pictures
from vismem.data.sample import Sample


def cluster_ids(samples: Iterable[Sample]) -> list[str]:
    """Each sample's cluster: the smallest of its questions' pictures, by hash, and groups. One with neither: its id."""
    examine = image_cache()
    return joined([tied(sample, examine) or [sample.id] for sample in samples])


def tied(sample: Sample, examine: Callable[[bytes], ImageFacts]) -> list[str]:
    """What ties a sample to others: its pictures, by hash, and its group's name."""
    return [*(digest.hex() for digest in sample_pictures(sample, examine)), *named(sample.source, sample.cluster)]


def claim(owners: dict[str, str], split: str, keys: Sequence[str]) -> str | None:
    """Give `split` what ties a sample to others, in `owners`; or, where another split has some of it, that split."""
    others = [owner for key in keys if (owner := owners.get(key, split)) != split]
    if not others:
        owners.update(dict.fromkeys(keys, split))
    return others[0] if others else None


def joined(keys: Sequence[Sequence[str]]) -> list[str]:
    """Each item's cluster, as its smallest key, from every item's `keys`, one at least."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = key = parent[above]
        return key

    for own in keys:
        roots = sorted(map(root, own))
        parent.update(dict.fromkeys(roots, roots[0]))
    return [root(own[0]) for own in keys]


def named(source: str, cluster: str) -> list[str]:
    """The name of a sample's group, where it has one: the same in all files of a kind, such as a patient's number."""
    return [f"{source.partition(':')[0]}: {cluster}"] if cluster else []
