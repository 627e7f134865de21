"""The model itself: rules of Kubeflow that its published sources state."""

import kfp_driver as driver


def test_a_key_is_hashed_as_kubeflow_s_own_test_of_it_says() -> None:
    """The case of cacheutils/cache_test.go, TestGenerateFingerPrint."""
    fields = "properties:\n  framework:\n    type: string\n  framework_version:\n    type: string\n"
    kinds = {
        "model": {"instanceSchema": f"title: kfp.Model\ntype: object\n{fields}"},
        "metrics": {"schemaTitle": "kfp.Metrics"},
    }
    key = {
        "inputArtifactNames": {"dataset_one": {"artifactNames": ["1"]}, "dataset_two": {"artifactNames": ["2"]}},
        "inputParameterValues": {"message": "Some string value", "num_steps": 5},
        "outputArtifactsSpec": {
            name: {"name": name, "type": kind, "metadata": {"name": name}} for name, kind in kinds.items()
        },
        "outputParametersSpec": {"output_parameter_one": "STRING", "output_parameter_two": "INT"},
        "containerSpec": {"cmdArgs": ["sh", "ec", "test"], "image": "python:3.11"},
    }
    assert driver.hash_key(key) == "b498530c9016917298999ec0b01f364a180f8a3862bea0fa672a383ca3f22e4e"
