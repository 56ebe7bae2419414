"""What a report warns of."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What is seen in the curve of `metric`, what it means, and what to do. A note is nothing bad by itself."""

    name: str
    kind: Literal["warning", "note"]
    metric: str
    title: str
    text: str
    action: str
