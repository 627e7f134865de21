"""What every group of parameters is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of parameters; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
