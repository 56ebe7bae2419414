"""What values of keys may be, and the rules of every section."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LARGEST = 2**31 - 1  # numbers beyond it are mistakes that would cost memory or time before anything else noticed
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
MOST_LEAVES = 4096  # of a prompt: groups that are published have up to 64, and a plan counts every edge
Steps = Annotated[int, Field(ge=2, le=1000)]  # the schedules that models are trained on have 1000
Share = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=32_768)]
Text = Annotated[str, Field(min_length=1)]


class Said(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        takes = bool in (annotation, *getattr(annotation, "__args__", ()))
        if not takes and any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise ValueError("true and false are neither numbers nor text here: write what is meant")
        return value


class Section(Said):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
