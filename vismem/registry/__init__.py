"""MLflow: runs, registered versions, the release gate and the champion. Only this package imports mlflow.

And `vismem.pyfunc`, which MLflow imports.
"""

LIVE_RUN = "VISMEM_LIVE_RUN"  # environment variable: id of the MLflow run with which `register` goes on
BUNDLE = "bundle"  # the folder of a logged model that holds the bundle, beside MLflow's own files
GIVEN_RUN = "MLFLOW_RUN_ID"  # MLflow's own variable: a run that somebody opened for us, as Kubeflow does for its tasks
