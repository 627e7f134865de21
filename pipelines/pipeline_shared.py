"""The pipeline for clusters with a shared volume, see pipeline.py.

`kfp dsl compile --py pipelines/pipeline_shared.py --output pipelines/vismem-shared.yaml` compiles it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pipelines/ lies there

from pipelines.pipeline import make_pipeline

pipeline = make_pipeline(shared_volume=True)
