"""The judge of the data: bad rows apart, a report, a stop where a rule of severity error is broken."""

from kfp import dsl


@dsl.component(base_image="vismem-train", install_kfp_package=False)
def validate(
    parameters: dict,
    prepare: dsl.Input[dsl.Dataset],
    validate: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Judge the shards by the rules; set bad rows apart with the reason; fail where a rule of severity error is broken.

    Args:
        validate: Clean shards, quarantine and verdicts; metadata: data_sha256, shards_sha256, rows.
        report: The data report, readable offline.
        metrics: Rows in all, clean, and in quarantine.
    """
    from vismem.kubeflow.task import run_task

    run_task(parameters, validate, metrics=metrics, report=report, prepare=prepare)
