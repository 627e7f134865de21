"""What the Hugging Face hub's client raises is told in one line, also where it says nothing itself."""

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from vismem.errors import UserError
from vismem.hub import fetch, push


@pytest.mark.parametrize(
    ("error", "said"), [(HTTPError(""), "HTTPError"), (OSError("no route\nto it"), "no route"), (OSError(), "OSError")]
)
def test_a_hub_that_takes_nothing_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=rf"^the hub did not take 'some/one' \({said}\)"):
        push(lambda folder: None, "some/one", None, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    if isinstance(error, OSError):
        with pytest.raises(UserError, match=rf"no model 'some/one' from the hub \({said}\)"):
            fetch("some/one")


def test_a_name_that_the_hub_does_not_have_at_all_is_told_so() -> None:
    with pytest.raises(UserError, match=r"^no folder some/one--two, and no model .* from the hub \(.*--"):
        fetch("some/one--two")
