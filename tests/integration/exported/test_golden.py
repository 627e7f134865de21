"""The golden questions of an exported bundle: its own answers, held against any other and against their absence."""

import json
import re
import shutil

import pytest

from vismem.serving.golden import QUESTIONS, check_golden


def test_golden_answers_are_the_runtimes_own_and_any_other_is_refused(bundle, runtime, tmp_path):
    bundle = shutil.copytree(bundle, tmp_path / "bundle")
    assert check_golden(runtime, bundle) == QUESTIONS
    file = bundle / "golden" / "golden.json"
    golden = json.loads(file.read_text())
    assert all(asked["tokens"] for asked in golden)
    golden[-1]["tokens"][-1] += 1
    file.write_text(json.dumps(golden))
    with pytest.raises(RuntimeError, match=f"the golden question '{re.escape(golden[-1]['question'])}' is answered by"):
        check_golden(runtime, bundle)
    file.unlink()
    with pytest.raises(RuntimeError, match="holds no golden questions"):
        check_golden(runtime, bundle)
