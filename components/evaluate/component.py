"""The evidence: every arm answers the same test questions."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def evaluate(
    parameters: dict,
    base: dsl.Input[dsl.Model],
    stage2: dsl.Input[dsl.Model],
    validate: dsl.Input[dsl.Dataset],
    evaluate: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    yes_no: dsl.Output[dsl.ClassificationMetrics],
):
    """Let every arm answer the test split; compare them with vanilla by paired statistics.

    Args:
        evaluate: Predictions, metrics.json, plots; metadata: stage2_sha256, questions.
        report: Scores with intervals, plots and examples, readable offline.
        metrics: Scores of each arm in percent, and the gain over vanilla in points with its interval.
        yes_no: Confusion matrix of VisMem's answers to the yes/no questions, where there are any.
    """
    from vismem.kubeflow.results import write_confusion
    from vismem.kubeflow.task import run_task

    run_task(parameters, evaluate, metrics=metrics, report=report, base=base, stage2=stage2, validate=validate)
    if confusion := write_confusion(evaluate.path, yes_no.path):
        yes_no.log_confusion_matrix(*confusion)
