"""MV-MATH as its authors release it (github.com/eternal8080/MV-MATH): `data/MV-MATH.json`, and all of `images/`.

Questions name their images where they stand, `<image_2>`; an answer may be an option's letter, a result, or several.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from vismem.data.benchmarks import BY_FILE
from vismem.data.readers.files import inside
from vismem.data.readers.lmudata import place_images
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.files import read_json

FOLDER = "MV-MATH"


def read(folder: Path) -> Iterator[Sample]:
    """Yield the questions in order. UserError, naming the place, for a file or image that cannot be read."""
    path = folder / "data" / f"{FOLDER}.json"
    for number, row in enumerate(read_json(path, f"clone its repository there, with all images in {folder}/images")):
        where = f"{path}, question {number + 1}"
        try:
            names = [inside(folder, folder / "images" / name, where) for name in row["input_image"]]
            images = tuple(name.read_bytes() for name in names)
            (question,), placed = place_images([re.sub(r"<image_(\d+)>", r"<image \1>", row["question"])], images)
            yield Sample(
                id=f"{FOLDER}-{row['problem_id']}",
                images=placed,
                question=question,
                answer=row["answer"].strip(),
                task=row["subject"],
                capability=BY_FILE[FOLDER].capability,
                source=FOLDER,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: not as MV-MATH has it ({type(error).__name__}: {error})") from None
        except OSError as error:
            raise UserError(
                f"{where}: {error.filename}: {error.strerror}; its images come apart, see its README"
            ) from None
