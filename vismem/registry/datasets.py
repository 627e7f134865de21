"""What a run's data was, as MLflow shows it: one dataset input for each revision that DVC keeps."""

from collections.abc import Sequence

from mlflow.entities import Dataset, DatasetInput, InputTag, Run

from vismem.data.revisions import DataRevision
from vismem.registry.tracking import Store


def log_revisions(store: Store, run_id: str, revisions: Sequence[DataRevision]) -> None:
    """Name the revisions as the run's inputs: the path is the dataset's name, the md5 its digest."""
    context = [InputTag("mlflow.data.context", "training")]
    data = [Dataset(kept.path, kept.md5, source_type="dvc", source=kept.model_dump_json()) for kept in revisions]
    store.client.log_inputs(run_id, datasets=[DatasetInput(each, context) for each in data])


def run_revisions(run: Run) -> tuple[DataRevision, ...]:
    """The revisions that `log_revisions` named as the run's inputs."""
    inputs = (given.dataset for given in run.inputs.dataset_inputs)
    return tuple(DataRevision.model_validate_json(data.source) for data in inputs if data.source_type == "dvc")
