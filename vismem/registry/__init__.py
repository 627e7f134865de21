"""MLflow: runs, registered versions, the release gate and the champion. Only this package imports mlflow."""

LIVE_RUN = "VISMEM_LIVE_RUN"  # environment variable: id of the MLflow run with which `register` goes on
