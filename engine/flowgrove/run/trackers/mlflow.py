"""MLflow."""

import json
import os
import time
from typing import Any

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status, flat, rows

_SERVERS = ("http:", "https:", "databricks", "uc:")
_MOST_PARAMS = 100  # in one request
_STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, else in MLflow's own place, which is the working folder."""

    def open(self, opening: Opening) -> Opened:
        if opening.mode == "offline" and os.environ.get("MLFLOW_TRACKING_URI", "").startswith(_SERVERS):
            del os.environ["MLFLOW_TRACKING_URI"]
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if opening.id is not None:
            self._run = opening.id
            self._client.update_run(self._run, status="RUNNING")
            return Opened(self._run)
        tags = {"mlflow.runName": opening.name, **dict.fromkeys(opening.tags, "true")}
        if opening.group is not None:
            tags["group"] = opening.group
        self._run = self._client.create_run(self._experiment(opening), tags=tags).info.run_id
        return Opened(self._run, describe=lambda: self._describe(opening.recipe))

    def _describe(self, recipe: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, _parameter(value)) for key, value in flat(recipe).items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _MOST_PARAMS])
        self._client.log_dict(self._run, recipe, "recipe.yaml")

    def _experiment(self, opening: Opening) -> str:
        name = opening.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "flowgrove"
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(key, value, now, iteration) for key, value in values.items()])

    def pictures(self, completed: int, pictures: Pictures) -> None:
        captions: dict[str, Any] = {}
        for row, (picture, caption) in enumerate(rows(pictures)):
            captions[f"samples/{row}"] = caption
            self._client.log_image(self._run, picture, key=f"samples/{row}", step=completed)
        self._client.log_dict(self._run, captions, f"samples/after_{completed:06d}.json")

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._run, status=_STATES[status])


def _parameter(value: Any) -> str:
    """A value of the recipe as MLflow keeps it: a text of at most 6000 characters."""
    return (value if isinstance(value, str) else json.dumps(value))[:6000]
