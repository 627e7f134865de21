"""What the tasks of the Kubeflow pipeline share; components/ hand over their artifacts. Nothing here imports kfp."""
