"""MLflow: runs, registered versions, the release gate and the champion. Only this package imports mlflow."""
