"""Which questions are drawn together, and that it travels with them."""

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from handmade import SECONDS, hand_made
from PIL import Image

from vismem.data.clusters import cluster_ids, joined
from vismem.data.sample import Sample, Video
from vismem.evaluation.metrics import cluster_of, summarise
from vismem.evaluation.predictions import read_predictions, write_predictions
from vismem.evaluation.statistics import paired_difference


def png(shade: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, form, lossless=True)
    return file.getvalue()


def asked(*images: bytes, **more: object) -> Sample:
    return replace(Sample(str(random.random()), images, "?", "a", source="here"), **more)  # type: ignore[arg-type]


def groups(*samples: Sample) -> list[int]:
    """Each sample's cluster, numbered in order."""
    ids = cluster_ids(samples)
    return [list(dict.fromkeys(ids)).index(cluster) for cluster in ids]


def test_questions_about_the_same_pixels_are_one_cluster_whatever_the_file() -> None:
    assert groups(asked(png(1)), asked(png(2)), asked(png(1, "WEBP"))) == [0, 1, 0]


def test_questions_that_share_one_of_several_pictures_are_one_cluster_also_over_others() -> None:
    assert groups(asked(png(1), png(2)), asked(png(3)), asked(png(2), png(4)), asked(png(4))) == [0, 1, 0, 0]


def test_a_named_group_ties_questions_of_its_source_together() -> None:
    one, other = asked(png(1), cluster="a"), asked(png(2), cluster="a")
    assert groups(one, other) == [0, 0]
    assert groups(one, replace(other, source="there")) == [0, 1], "names of two sources have nothing in common"
    assert groups(one, other, asked(png(2))) == [0, 0, 0]


def test_a_video_is_known_by_all_its_frames() -> None:
    one, two = (Video((png(0), png(last)), 1.0) for last in (1, 2))
    assert groups(asked(videos=(one,)), asked(videos=(two,)), asked(videos=(one,))) == [0, 1, 0]


def test_a_question_without_a_picture_that_can_be_read_stands_alone() -> None:
    assert groups(asked(), asked(), asked(b"no image"), asked(b"no image")) == [0, 1, 2, 3]


def test_the_order_of_the_items_changes_no_cluster() -> None:
    rng = random.Random(0)
    keys = {item: [str(rng.randrange(60)) for _ in range(rng.randrange(1, 4))] for item in range(50)}
    found = dict(zip(keys, joined(list(keys.values())), strict=True))
    for _ in range(5):
        order = rng.sample(list(keys), len(keys))
        assert dict(zip(order, joined([keys[item] for item in order]), strict=True)) == found
    reached = {key for item, own in keys.items() for key in own if found[item] == found[0]}
    assert all((found[item] == found[0]) == bool(reached.intersection(own)) for item, own in keys.items())
    assert 1 < len(set(found.values())) < len(found)


def test_questions_about_one_image_count_together() -> None:
    images = ("a", "a", "b", "b", "c", "c", "d", "d")
    clustered = {
        arm: [replace(answer, cluster=image) for answer, image in zip(answers, images, strict=True)]
        for arm, answers in hand_made().items()
    }
    metrics = summarise(clustered, SECONDS, seed=7, resamples=500)
    assert metrics["clusters"] == {"overall": 4, "understanding": 2, "reasoning": 1, "generation": 1}
    overall = metrics["gain"]["overall"]
    assert overall["p"] == pytest.approx(10 / 16), (
        "sums 1, 1, -1, 1 of four images: ten of 16 flips are 2 or more from 0"
    )
    rights = (np.array([100 * answer.score for answer in hand_made()[arm]]) for arm in ("vismem", "vanilla"))
    expected = paired_difference(*rights, np.repeat(np.arange(4), 2), resamples=500, seed=7)
    assert overall["ci95"] == pytest.approx(list(expected.ci95))
    assert metrics["intervals"]["vismem"]["reasoning"] == [0.0, 100.0], "one image says nothing"
    apart = summarise(hand_made(), SECONDS, seed=7, resamples=500)
    assert apart["clusters"]["overall"] == 8
    assert apart["gain"]["overall"]["ci95"][0] > overall["ci95"][0]


def test_predictions_of_earlier_versions_name_no_cluster_and_count_one_by_one(tmp_path: Path) -> None:
    predictions = hand_made()["vismem"]
    named = [replace(answer, cluster="a") for answer in predictions]
    write_predictions(named, tmp_path / "vismem.parquet")
    assert read_predictions(tmp_path / "vismem.parquet") == named
    table = pq.read_table(tmp_path / "vismem.parquet").drop_columns("cluster")
    pq.write_table(table, tmp_path / "vismem.parquet")
    earlier = read_predictions(tmp_path / "vismem.parquet")
    assert earlier == predictions
    assert [cluster_of(answer) for answer in earlier] == [answer.id for answer in earlier]
    assert {cluster_of(answer) for answer in named} == {"a"}
