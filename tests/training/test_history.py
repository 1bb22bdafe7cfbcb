"""What is said in a run is kept with it; its history loses nothing."""

import json
import logging

from eurollm_jax.training import history
from eurollm_jax.training.history import logged, note


def test_the_history_grows_line_by_line(tmp_path):
    note(tmp_path, "start", step=0, hosts=["náš-stroj"])
    note(tmp_path, "end", how="complete")
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in lines] == ["start", "end"]
    assert lines[0]["hosts"] == ["náš-stroj"]
    assert all("time" in line for line in lines)


def test_logs_are_kept_with_the_run_and_rotate(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "LOG_BYTES", 1000)
    said = logging.getLogger("eurollm_jax.training")
    with logged(tmp_path):
        for number in range(200):
            said.warning("line %d of many", number)
    said.warning("after the run")
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["process-0.log", *(f"process-0.log.{n}" for n in range(1, 5))]
    assert "line 199 of many" in files[0].read_text()
    assert all(file.stat().st_size <= 1000 for file in files)
    assert not any("after the run" in file.read_text() for file in files)
