"""Ray Data: actors with engines of their own; what was written is not computed again; a bad row fails alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.data.checkpoint import CheckpointConfig

from jaxserve.integrations.ray import LLMPredictor

settings = json.loads(sys.argv[1])
folder = Path(settings["folder"])
LONG = "too long " * 2000


class Noting(LLMPredictor):
    """Leaves a file for each row that it computes, named after its actor."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        actor = ray.get_runtime_context().get_actor_id()
        for row in batch["id"]:
            Path(folder, f"computed-{row}-{actor}").touch()
        return super().__call__(batch)


def run(num_rows: int, actors: int) -> None:
    rows = [{"id": i, "prompt": LONG if i == 5 else settings["prompt"]} for i in range(num_rows)]
    Path(folder, "in").mkdir(exist_ok=True)
    for row in rows:
        Path(folder, "in", f"{row['id']}.json").write_text(json.dumps(row) + "\n")
    params = {"temperature": 0, "max_tokens": settings["max_tokens"]}
    ray.data.read_json(str(folder / "in")).map_batches(
        Noting,
        fn_constructor_kwargs={"model": settings["model"], "sampling_params": params, **settings["engine"]},
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=actors),
    ).write_json(str(folder / "out"))


def written() -> list[dict[str, Any]]:
    lines = [line for file in Path(folder, "out").rglob("*.json") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: row["id"])


ray.init(num_cpus=3, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
context = ray.data.DataContext.get_current()
context.wait_for_min_actors_s = 200  # or the first actor to be there does all
context.checkpoint_config = CheckpointConfig(
    id_column="id", checkpoint_path=str(folder / "checkpoint"), delete_checkpoint_on_success=False
)
run(num_rows=8, actors=2)
assert [row["id"] for row in written()] == list(range(8))
actors = {file.name.split("-", 2)[2] for file in folder.glob("computed-*")}
assert len(actors) == 2, actors
for row in written():
    if row["id"] == 5:
        assert "exceeds max_model_len" in row["error"] or "leaves no room" in row["error"], row
    else:
        assert (row["generated_text"], row["error"]) == (settings["expected"], ""), row

for file in folder.glob("computed-*"):
    file.unlink()
run(num_rows=10, actors=1)
assert [row["id"] for row in written()] == list(range(10))
computed = sorted(int(file.name.split("-")[1]) for file in folder.glob("computed-*"))
assert computed == [8, 9], computed
ray.shutdown()
