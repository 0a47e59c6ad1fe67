"""Lines, scalars and the bar of a run."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("tqdm")

from distset.files import DiskFull
from distset.run_log import RunLog


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_going_on_takes_back_what_came_after_the_checkpoint(tmp_path, capsys):
    records = [{"step": step, "epoch": step / 2, "val/loss": 1.0 / step, "val/auroc": float("nan")} for step in (1, 2, 3)]
    with RunLog(tmp_path, bar=False) as log:
        log.started(0, 4, [])
        for record in records:
            log.recorded(record)
        log.started(2, 4, records[:2])  # a worker died; its successor went on at step 2
        log.recorded({**records[2], "val/loss": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["val/loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert lines[0]["val/auroc"] is None
    assert scalars(tmp_path)["val/loss"] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert "a worker was lost; goes on at step 2 of 4" in capsys.readouterr().out
    assert "goes on at step 2 of 4" in (tmp_path / "train.log").read_text()


def test_a_disk_that_is_full_is_named(tmp_path):
    """/dev/full takes no byte, as a disk without room."""
    with RunLog(tmp_path, bar=False) as log:
        log.started(0, 4, [])
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(DiskFull, match=f"{tmp_path}: no space is left .* start the same command again"):
            log.recorded({"step": 1, "epoch": 0.5, "val/loss": 1.0})


def test_speed_has_a_file_of_its_own_which_is_taken_back_too(tmp_path):
    with RunLog(tmp_path, bar=False) as log:
        log.started(0, 4, [])
        for step in (1, 2, 3, 4):
            log.stepped(step, 8, 4000, 0.5)
            log.paced(step, 0.5, 0.1 * step)
            if step % 2 == 0:
                log.recorded({"step": step, "epoch": step / 2, "train/loss": 0.5})
        log.started(3, 4, [])
        log.recorded({"step": 3, "epoch": 1.5, "train/loss": 0.5})  # nothing was timed since
    (line,) = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert line == pytest.approx(
        {
            "step": 2,
            "speed/step_seconds": 0.5,
            "speed/input_wait_seconds": 0.15,
            "speed/sets_per_second": 16.0,
            "speed/elements_per_second": 8000.0,
        }
    )
    assert scalars(tmp_path)["speed/elements_per_second"] == [(2, 8000.0)]


def test_a_line_that_a_full_disk_cut_short_does_not_stop_the_next_start(tmp_path):
    (tmp_path / "speed.jsonl").write_text('{"step": 1, "speed/step_seconds": 0.5}\n{"step": 2, "spe')
    with RunLog(tmp_path, bar=False) as log:
        log.started(2, 4, [])
    assert (tmp_path / "speed.jsonl").read_text() == '{"step": 1, "speed/step_seconds": 0.5}\n'


def test_an_error_is_in_the_log_file(tmp_path, capsys):
    with pytest.raises(KeyError), RunLog(tmp_path, bar=False):
        raise KeyError("gone")
    assert "ended by KeyError('gone')" in (tmp_path / "train.log").read_text()
    assert "gone" not in capsys.readouterr().out


def test_a_folder_has_one_writer(tmp_path):
    with RunLog(tmp_path, bar=False), pytest.raises(ValueError, match="another process is training in"), RunLog(tmp_path):
        pass
    with RunLog(tmp_path, bar=False):
        pass


def test_the_bar_shows_rates_and_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = [100.0]
    monkeypatch.setattr("distset.run_log.time.monotonic", lambda: now[0])
    with RunLog(tmp_path) as log:
        log.started(0, 10, [])
        for step in range(1, 6):
            now[0] += 0.5
            log.stepped(step, 8, 4000, 0.25)
        log._bar.bar.refresh()
    err = capsys.readouterr().err
    assert "5/10 steps" in err
    assert "16.0 sets/s, 8,000 elements/s, loss 0.250" in err
    assert "left" in err
