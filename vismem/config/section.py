"""What every group of parameters is."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A frozen group of parameters; an unknown key is an error, and so is a number that is infinite or none."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @classmethod
    def by_key(cls) -> dict[str, FieldInfo]:
        """The fields by the names that they have in `params.yaml`."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


def rare(default: Any, **constraints: Any) -> Any:
    """A parameter that is seldom changed: `params.yaml` holds it only where it differs from its default."""
    return Field(default, json_schema_extra={"rare": True}, **constraints)


def is_rare(field: FieldInfo) -> bool:
    """Whether a section declares this field with `rare`."""
    return field.json_schema_extra == {"rare": True}
