"""The Triton model repository that `vismem deploy` writes: layout, configuration, and what it refuses."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from vismem.errors import UserError
from vismem.provenance import sha256_file, write_manifest
from vismem.runtime.limits import NEW_TOKENS
from vismem.serving.repository import (
    MANIFEST_VARIABLE,
    MODEL_SOURCE,
    UNARY_SOURCE,
    check_repository,
    copy_library,
    repository_problems,
    write_model_repository,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "weights.bin").write_bytes(b"weights")
    (folder / "README.md").write_text("# card")
    write_manifest(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_holds_configuration_model_runtime_and_bundle(bundle: Path, tmp_path: Path) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 3)
    assert folder == tmp_path / "repository" / "vismem"
    copy_library(tmp_path / "library")
    library = {f"3/{file}" for file in files(tmp_path / "library")}
    assert {"3/vismem/generation/loop.py", "3/vismem/runtime/limits.py", "3/vismem/__init__.py"} <= library
    packed = {f"3/bundle/{file}" for file in files(bundle)}
    assert files(folder) == {"config.pbtxt", "manifest.json", "3/model.py", "3/__pycache__"} | library | packed
    assert (folder / "3" / "model.py").read_bytes() == MODEL_SOURCE.read_bytes()
    assert (folder / "3" / "bundle" / "onnx" / "weights.bin").read_bytes() == b"weights"


def test_the_bundle_takes_no_second_place_on_the_same_disk(bundle: Path, tmp_path: Path) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    served = folder / "1" / "bundle" / "onnx" / "weights.bin"
    assert served.samefile(bundle / "onnx" / "weights.bin")
    assert not served.is_symlink()


def test_no_file_of_the_repository_names_the_place_where_it_was_written(bundle: Path, tmp_path: Path) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    place = str(tmp_path).encode()
    assert [path for path in folder.rglob("*") if path.is_file() and place in path.read_bytes()] == []


def test_the_configuration_is_a_decoupled_python_model_without_response_cache(bundle: Path, tmp_path: Path) -> None:
    import tritonclient.grpc.model_config_pb2 as schema
    from google.protobuf import text_format

    folder = write_model_repository(bundle, tmp_path / "repository", "vismem_challenger", 1)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend) == ("vismem_challenger", "python")
    assert config.model_transaction_policy.decoupled
    assert config.HasField("response_cache")
    assert not config.response_cache.enable
    inputs = {
        entry.name: (schema.DataType.Name(entry.data_type), list(entry.dims), entry.optional) for entry in config.input
    }
    assert inputs == {
        "IMAGE": ("TYPE_STRING", [-1], False),
        "PROMPT": ("TYPE_STRING", [1], True),  # or messages in its place
        "MESSAGES": ("TYPE_STRING", [1], True),
        "MAX_NEW_TOKENS": ("TYPE_INT32", [1], True),
        "TEMPERATURE": ("TYPE_FP32", [1], True),
        "SEED": ("TYPE_INT64", [1], True),
        "MEMORY": ("TYPE_STRING", [1], True),
        "STOP": ("TYPE_STRING", [-1], True),
        "STREAM": ("TYPE_BOOL", [1], True),
    }
    outputs = {entry.name: (schema.DataType.Name(entry.data_type), list(entry.dims)) for entry in config.output}
    assert outputs == dict.fromkeys(("TEXT", "EVENT", "USAGE"), ("TYPE_STRING", [-1]))


def test_a_second_version_stands_beside_the_first_and_a_repeated_one_replaces_itself(
    bundle: Path, tmp_path: Path
) -> None:
    for version in (1, 2, 2):
        folder = write_model_repository(bundle, tmp_path / "repository", "vismem", version)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "config.pbtxt", "manifest.json"]
    assert repository_problems(tmp_path / "repository") == []


def test_a_changed_weight_file_is_refused_by_name_before_anything_is_written(bundle: Path, tmp_path: Path) -> None:
    (bundle / "onnx" / "weights.bin").write_bytes(b"weighty")
    with pytest.raises(UserError, match=r"onnx/weights.bin has changed; run `vismem export`"):
        write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    assert not (tmp_path / "repository").exists()


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json is not there.*run `vismem export`"):
        write_model_repository(tmp_path, tmp_path / "repository", "vismem", 1)


@pytest.mark.parametrize("name", ["a/b", "", "..", "two words"])
def test_a_name_that_triton_would_not_take_is_refused(name: str, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"deploy.model_name '{name}'")):
        write_model_repository(bundle, tmp_path / "repository", name, 1)


def test_a_version_below_one_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model version 0"):
        write_model_repository(bundle, tmp_path / "repository", "vismem", 0)


def test_what_a_request_leaves_out_is_the_same_in_triton_s_files_as_elsewhere() -> None:
    assert f"the evaluation's `max_new_tokens`, else {NEW_TOKENS} |" in Path("deploy/triton/README.md").read_text()


def test_the_served_files_import_only_what_the_serving_environment_holds(tmp_path: Path) -> None:
    copy_library(tmp_path)
    modules = {file.removesuffix(".py").replace("/", ".") for file in files(tmp_path)}
    held = {
        "numpy",
        "onnxruntime",
        "tokenizers",
        "PIL",
        "prometheus_client",
        "triton_python_backend_utils",
        "vismem",
    }
    required = (MODEL_SOURCE.parent / "requirements.txt").read_text()
    assert "torch" not in re.findall(r"^[\w-]+", required, re.MULTILINE)
    for source in [MODEL_SOURCE, UNARY_SOURCE, *tmp_path.rglob("*.py")]:
        tree = ast.parse(source.read_text())
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # imports for type checkers alone
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                assert top in held or top in sys.stdlib_module_names, f"{source} imports {name}"
                assert top != "vismem" or name in modules, f"{source} imports {name}"


def test_the_manifest_of_the_bundle_still_holds_in_the_repository(bundle: Path, tmp_path: Path) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    listed = json.loads((folder / "1" / "bundle" / "manifest.json").read_text())["files"]
    assert set(listed) == files(folder / "1" / "bundle") - {"manifest.json"}


LOADED = (
    "config.pbtxt",
    "manifest.json",
    "1/model.py",
    "1/vismem/runtime/prompt.py",
    "1/bundle/onnx/weights.bin",
    "1/bundle/manifest.json",
)


@pytest.mark.parametrize("name", LOADED)
def test_a_changed_or_missing_file_of_a_repository_is_named(name: str, bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    file = write_model_repository(bundle, repository, "vismem", 1) / name
    check_repository(repository)
    content = file.read_bytes()
    file.unlink()  # a link to the bundle's own file would change that too
    with pytest.raises(UserError, match=rf"vismem: .*{name} is (missing|not there)"):
        check_repository(repository)
    file.write_bytes(content[:-5])
    with pytest.raises(UserError, match=rf"vismem: .*{name} (has changed|is damaged)"):
        check_repository(repository)


@pytest.mark.parametrize("name", ["1/numpy.py", "1/vismem/runtime/more.py", "1/bundle/onnx/more.onnx", "2/model.py"])
def test_an_unknown_file_or_linked_folder_in_a_repository_is_named(name: str, bundle: Path, tmp_path: Path) -> None:
    extra = write_model_repository(bundle, tmp_path / "repository", "vismem", 1) / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("x = 1")
    with pytest.raises(UserError, match=f"vismem: {name} is not in the manifest"):
        check_repository(tmp_path / "repository")
    extra.unlink()
    extra.symlink_to(bundle)
    with pytest.raises(UserError, match=f"vismem: {name} is not in the manifest"):
        check_repository(tmp_path / "repository")


def test_a_second_version_does_not_vouch_for_a_damaged_first(bundle: Path, tmp_path: Path) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    (folder / "1" / "model.py").write_text("x = 1")
    write_model_repository(bundle, tmp_path / "repository", "vismem", 2)
    assert repository_problems(tmp_path / "repository") == ["vismem: 1/model.py has changed"]


def test_a_pinned_manifest_is_the_only_one_that_is_served(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    monkeypatch.setenv(MANIFEST_VARIABLE, sha256_file(folder / "manifest.json"))
    check_repository(tmp_path / "repository")
    (folder / "1" / "model.py").write_text("x = 1")
    write_manifest(folder)  # whoever can change the files can change their list
    with pytest.raises(UserError, match=r"vismem: manifest\.json is not the one that VISMEM_MANIFEST_SHA256 names"):
        check_repository(tmp_path / "repository")


def test_a_models_manifest_vouches_for_its_unary_one(bundle: Path, tmp_path: Path) -> None:
    folder = write_model_repository(bundle, tmp_path / "repository", "vismem", 1)
    unary = tmp_path / "repository" / "vismem_unary"
    (unary / "1" / "model.py").write_text("x = 1")
    write_manifest(unary)
    with pytest.raises(
        UserError, match=rf"vismem_unary: manifest\.json is not the one that {folder}/manifest\.json names"
    ):
        check_repository(tmp_path / "repository")
    write_model_repository(bundle, tmp_path / "repository", "vismem", 2)
    check_repository(tmp_path / "repository")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"vismem_unary: manifest\.json is not the one"):
        check_repository(tmp_path / "repository")


def test_the_unary_model_holds_of_the_library_who_may_ask(bundle: Path, tmp_path: Path) -> None:
    write_model_repository(bundle, tmp_path, "vismem", 1)
    library = {f"1/vismem/{file}" for file in ("__init__.py", "runtime/__init__.py", "runtime/access.py")}
    own = {"config.pbtxt", "manifest.json", "1/model.py", "1/__pycache__"}
    assert files(tmp_path / "vismem_unary") == own | library
    (tmp_path / "vismem_unary/1/vismem/runtime/access.py").write_text("x = 1")
    assert repository_problems(tmp_path) == ["vismem_unary: 1/vismem/runtime/access.py has changed"]


def test_the_unary_model_has_the_inputs_of_the_other_but_no_stream(bundle: Path, tmp_path: Path) -> None:
    import tritonclient.grpc.model_config_pb2 as schema
    from google.protobuf import text_format

    write_model_repository(bundle, tmp_path, "vismem", 1)
    streamed, unary = (
        text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), schema.ModelConfig())
        for name in ("vismem", "vismem_unary")
    )
    assert (unary.name, unary.model_transaction_policy.decoupled) == ("vismem_unary", False)
    assert [tensor for tensor in streamed.input if tensor.name != "STREAM"] == list(unary.input)
    assert [tensor for tensor in streamed.output if tensor.name != "EVENT"] == list(unary.output)
