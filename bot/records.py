"""Record: the base of the typed records that are stored as JSON."""

from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer

Time = Annotated[datetime, PlainSerializer(datetime.isoformat)]  # in a Record


class Record(BaseModel):
    """A typed record that is stored as JSON.

    Keys that were not set are left out of the JSON. Unknown keys are kept, because another version of kibitz wrote them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the record that `as_json` gave. Raises pydantic's ValidationError, a ValueError, if it does not fit."""
        return cls.model_validate(values)

    def as_json(self) -> dict[str, Any]:
        """Return the values that were set, without defaults."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def __or__(self, other: "Record") -> Self:
        """Return this record updated with the values of `other`."""
        return self.from_json(self.as_json() | other.as_json())
