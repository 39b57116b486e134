"""What is on its way to MLflow: kept in order through every death, sent once, settled later. Against a fake server."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipelines import sender as sending
from pipelines.leftovers import settle
from pipelines.sender import Sender
from pipelines.spool import Spool, lock
from pipelines.writer import Writer
from tests.support import ROOT

URI = "http://127.0.0.1:5000"
RUN = "r1"


class FakeServer:
    """One run as MLflow would hold it: equal points are kept once, a folder's file under its name."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int, int]] = []
        self.tags: dict[str, str] = {}
        self.params: dict[str, str] = {}
        self.files: list[str] = []
        self.statuses: list[str] = []
        self.calls: list[str] = []
        self.down = False
        self.fail_before: Callable[[str], Exception | None] = lambda call: None
        self.fail_after: Callable[[str], Exception | None] = lambda call: None  # the call arrives, its answer does not

    def _called(self, name: str) -> None:
        if self.down:
            raise ConnectionError("connection refused")
        if (error := self.fail_before(name)) is not None:
            raise error
        self.calls.append(name)

    def _answered(self, name: str) -> None:
        if (error := self.fail_after(name)) is not None:
            raise error

    def get_run(self, run_id: str) -> Any:
        self._called("get_run")
        latest: dict[str, tuple[int, float]] = {}
        for key, value, _, step in self.points:
            latest[key] = max(latest.get(key, (-1, 0.0)), (step, value))
        data = SimpleNamespace(metrics={k: v for k, (_, v) in latest.items()}, tags=self.tags, params=self.params)
        return SimpleNamespace(data=data, info=SimpleNamespace(experiment_id="1"), outputs=None)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self._called("log_batch")
        assert len(metrics) <= 1000  # MLflow refuses more
        for m in metrics:
            point = (m.key, m.value, m.timestamp, m.step)
            if point not in self.points:
                self.points.append(point)
        self.params |= {p.key: p.value for p in params}
        self._answered("log_batch")

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._called("set_tag")
        self.tags[key] = value

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self._called("log_artifact")
        self.files.append(f"{folder}/{Path(path).name}")
        self._answered("log_artifact")

    def log_artifacts(self, run_id: str, path: str, folder: str | None) -> None:
        self._called("log_artifacts")
        self.files += [f"{folder}/{p.name}" for p in sorted(Path(path).iterdir())]

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        self._called("list_artifacts")
        return [SimpleNamespace(path=f) for f in self.files if f.startswith(path)]

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._called("set_terminated")
        self.statuses.append(status)

    def update_run(self, run_id: str, status: str) -> None:
        self._called("update_run")
        self.statuses.append(status)

    def steps(self, key: str = "train/loss") -> list[int]:
        return [step for k, _, _, step in self.points if k == key]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    monkeypatch.setattr(sending, "LONGEST_PAUSE", 0.01)  # the thread tries again at once
    made = Spool(tmp_path / "spool" / RUN)
    made.create(run_id=RUN, name="vae", uri=URI, if_killed="FAILED")
    return made


@pytest.fixture
def follow(spool: Spool, server: FakeServer) -> Iterator[Callable[[], Sender]]:
    started: list[Sender] = []

    def start() -> Sender:
        started.append(Sender(spool, server, RUN).start())
        return started[-1]

    yield start
    for each in started:
        each.close(0)


def rows(*steps: int, **values: float) -> dict[str, Any]:
    return {"rows": [json.dumps({"step": s, "train/loss": 1.0 / s, **values}) for s in steps]}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def send(sender: Sender) -> None:
    assert sender.close(10)


def test_everything_arrives_in_the_order_in_which_it_was_written(
    spool: Spool, server: FakeServer, follow: Callable[[], Sender]
) -> None:
    write = Writer(str(spool.folder))
    spool.append("status", status="RUNNING")
    for step in range(1, 200):
        write(rows(step))
    spool.append("status", status="FINISHED")
    send(follow())
    assert server.steps() == list(range(1, 200))
    assert server.statuses == ["RUNNING", "FINISHED"]
    assert server.calls[-1] == "set_terminated"
    assert spool.waiting() == 0


def test_a_dead_server_holds_up_nobody_and_gets_everything_when_it_is_back(
    spool: Spool, server: FakeServer, follow: Callable[[], Sender], caplog: pytest.LogCaptureFixture
) -> None:
    sender, write = follow(), Writer(str(spool.folder))
    write(rows(1))
    assert sender.settled(10)
    server.down = True
    for step in range(2, 50):
        write(rows(step))  # returns: nothing waits for the server
    write({"images": {49: png()}})
    while not sender.failing:
        time.sleep(0.01)
    assert not sender.settled(0)
    assert "connection refused" in sender.failing
    assert server.steps() == [1]
    server.down = False
    send(sender)
    assert server.steps() == list(range(1, 50))
    assert len([f for f in server.files if f.endswith(".png")]) == 1
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len([m for m in said if "MLflow fails" in m]) == 1  # once an outage, not once an attempt
    assert any("answers again" in m for m in said)


def test_what_was_sent_but_not_acknowledged_is_not_there_twice(
    spool: Spool, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after sending, before noting it: the same bytes of the journal are sent again by the next."""
    Writer(str(spool.folder))({**rows(1, 2), "images": {2: png()}})
    spool.append("points", metrics={"frechet": 3.0}, step=0, new=True)
    before = spool.sent
    send(Sender(spool, server, RUN).start())
    points, pictures = list(server.points), len(server.files)
    (spool.folder / "sent").write_text(str(before))
    monkeypatch.setattr(Spool, "acknowledge", lambda *_: None)
    send(Sender(spool, server, RUN).start())
    assert server.points == points
    assert len(server.files) == pictures


def test_an_answer_that_gets_lost_adds_no_second_point(spool: Spool, server: FakeServer) -> None:
    """A timeout after the server stored the batch: MLflow keeps equal points once, so equal they must be."""
    lost = iter([TimeoutError("timed out"), TimeoutError("timed out")])
    server.fail_after = lambda call: next(lost, None)
    Writer(str(spool.folder))({**rows(1, 2), "images": {2: png()}})
    time.sleep(0.01)  # a clock read when sending would tell the attempts apart
    send(Sender(spool, server, RUN).start())
    assert server.steps() == [1, 2]
    assert len({f for f in server.files if f.endswith(".png")}) == 1


def test_a_history_reported_again_is_dropped_up_to_what_the_run_has(
    spool: Spool, server: FakeServer, follow: Callable[[], Sender]
) -> None:
    """After a restart a job reports from its first row, with new times; a later process asks the server."""
    write = Writer(str(spool.folder))
    write({**rows(10, 20, 30), "images": {20: png()}})
    write({**rows(10, 20, 30, 40), "images": {20: png(), 40: png()}})
    send(follow())
    Writer(str(spool.folder), "seed1/")(rows(10))  # another seed counts for itself
    Writer(str(spool.folder))({**rows(20, 30, 40, 50), "images": {40: png()}})
    send(Sender(spool, server, RUN).start())
    assert server.steps() == [10, 20, 30, 40, 50]
    assert server.steps("seed1/train/loss") == [10]
    pictures = [f.split("+")[2] for f in server.files if f.endswith(".png")]
    assert pictures == ["20", "40"]


def test_a_row_counts_when_all_of_it_is_there(spool: Spool, server: FakeServer, tmp_path: Path) -> None:
    """A process dies between two batches: the round says what the run has, so it comes behind its row's rest."""
    wide = {f"m{i}": float(i) for i in range(400)}
    write = Writer(str(spool.folder))
    write(rows(1, 2, 3, 4, 5, **wide))
    second = iter([None, ConnectionError("gone")])
    server.fail_before = lambda call: next(second, ConnectionError("gone")) if call == "log_batch" else None
    assert not Sender(spool, server, RUN).start().close(0.2)
    assert server.steps("round") == [1, 2]
    server.fail_before = lambda call: None
    spool.journal.write_bytes(b"")  # whatever became of the spool, the job reports its history again
    (spool.folder / "sent").unlink(missing_ok=True)
    write(rows(1, 2, 3, 4, 5, **wide))
    send(Sender(spool, server, RUN).start())
    assert set(server.steps("m399")) == set(server.steps("round")) == {1, 2, 3, 4, 5}
    assert server.steps("round") == [1, 2, 3, 4, 5]


def test_not_finite_values_are_left_out_and_named_together(spool: Spool, server: FakeServer) -> None:
    write = Writer(str(spool.folder))
    write(rows(1, bad=float("nan")))
    write(rows(2, worse=float("-inf")))
    send(Sender(spool, server, RUN).start())
    assert server.tags["dgm.not_finite"] == "bad, worse"
    assert not server.steps("bad")


def test_what_runs_in_rays_controller_is_light() -> None:
    imports = "import sys, pipelines.controller, pipelines.writer"
    code = f"{imports}; print(sorted({{'torch', 'mlflow', 'PIL', 'tenacity'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_stage_of_its_own_process_imports_neither_ray_nor_matplotlib() -> None:
    """Each is half a second to a second and a half of every stage's start, and `workers: 0` has no use for Ray."""
    code = "import sys, pipelines.train, pipelines.evaluate; print(sorted({'ray', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_only_one_sends(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    first = lock(folder)
    assert first is not None
    assert lock(folder) is None
    first.close()
    second = lock(folder)
    assert second is not None


def test_a_lock_on_a_folder_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Whoever waits while the holder settles and removes the folder gets a new one, not the ghost of the old."""
    folder = tmp_path / "r"
    held = lock(folder)
    assert held is not None
    Spool(folder).remove()
    fresh = lock(folder)
    assert fresh is not None
    assert lock(folder) is None
    held.close()
    assert lock(folder) is None


def test_a_folder_removed_under_a_lock_being_taken_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, removed = tmp_path / "r", fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        if not removed:
            removed.append(shutil.rmtree(folder))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = lock(folder)
    assert held is not None
    assert lock(folder) is None  # it is the one that everybody sees


def _hold(folder: Path, ready: Any) -> None:
    held = lock(folder)
    ready.set()
    time.sleep(60)
    del held


def test_a_killed_process_frees_its_lock_and_its_run_is_settled(spool: Spool, server: FakeServer) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(spool.folder, ready))
    process.start()
    assert ready.wait(30)
    Writer(str(spool.folder))(rows(1))
    assert "at work" in settle(spool.folder, URI, server, 5)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert settle(spool.folder, URI, server, 5) == ""
    assert server.steps() == [1]
    assert server.statuses == ["FAILED"]  # it died without saying how it ended
    assert not spool.folder.exists()


def test_a_run_that_ended_while_the_server_was_away_keeps_its_status(spool: Spool, server: FakeServer) -> None:
    Writer(str(spool.folder))(rows(1))
    spool.append("status", status="FINISHED")
    server.down = True
    assert "2 writes wait: " in settle(spool.folder, URI, server, 0)
    server.down = False
    assert settle(spool.folder, URI, server, 5) == ""
    assert server.statuses == ["FINISHED"]


def test_what_belongs_to_another_store_is_left_alone(spool: Spool, server: FakeServer) -> None:
    assert URI in settle(spool.folder, "http://elsewhere:5000", server, 0)
    assert not server.calls
    assert spool.folder.exists()


@pytest.mark.parametrize("torn", [b"0bad", b'\n12345678 {"kind": "sta', b"\n" + b"\0" * 40])
def test_a_line_torn_by_a_kill_costs_only_itself(spool: Spool, server: FakeServer, torn: bytes) -> None:
    write = Writer(str(spool.folder))
    write(rows(1))
    with open(spool.journal, "ab") as file:
        file.write(torn)
    send(Sender(spool, server, RUN).start())  # a tail without its newline may still be being written: left for later
    write(rows(2))
    spool.append("status", status="FINISHED")
    send(Sender(spool, server, RUN).start())
    assert server.steps() == [1, 2]
    assert server.statuses == ["FINISHED"]


def test_a_changed_line_is_left_out_and_said(
    spool: Spool, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    write = Writer(str(spool.folder))
    for step in (1, 2, 3):
        write(rows(step))
    whole = spool.journal.read_bytes()
    at = whole.index(b'\\"step\\": 2') + 10
    spool.journal.write_bytes(whole[:at] + b"7" + whole[at + 1 :])
    send(Sender(spool, server, RUN).start())
    assert server.steps() == [1, 3]
    assert any("damaged line" in r.message for r in caplog.records)


def _append(folder: Path, process: int, n: int) -> None:
    spool = Spool(folder)
    for i in range(n):
        spool.append("tags", tags={"of": process, "at": i, "filler": "x" * 5000})


def test_processes_that_append_at_once_do_not_mix_their_lines(spool: Spool) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(spool.folder, p, 200)) for p in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    entries = list(spool.read(0))
    assert [e.kind for e in entries] == ["tags"] * 800
    for p in range(4):
        assert [e.content["tags"]["at"] for e in entries if e.content["tags"]["of"] == p] == list(range(200))


class Refusal(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


def test_what_the_server_will_never_take_is_set_aside_and_the_rest_goes_on(spool: Spool, server: FakeServer) -> None:
    write = Writer(str(spool.folder))
    write(rows(1))
    spool.append("tags", tags={"a": "refuse me"})
    spool.append("something newer", of=1)
    write({**rows(2), "images": {2: png()[:30]}})
    spool.append("status", status="FINISHED")
    plain = server.set_tag

    def set_tag(run_id: str, key: str, value: str) -> None:
        if value == "refuse me":
            raise Refusal("tag value is not allowed")
        plain(run_id, key, value)

    server.set_tag = set_tag  # pyright: ignore[reportAttributeAccessIssue]
    left = settle(spool.folder, URI, server, 5)
    assert left.startswith("MLflow refused 3 writes")
    assert server.steps() == [1, 2]
    assert server.statuses == ["FINISHED"]
    assert [r["kind"] for r in spool.refused] == ["tags", "something newer", "history"]


def test_an_outage_is_never_taken_for_a_refusal(spool: Spool, server: FakeServer) -> None:
    """Nine failures, of which no three in a row say that the request is wrong."""
    errors = iter([Refusal("x"), Refusal("x"), ConnectionError("y")] * 3)

    def fail(call: str) -> Exception | None:
        return next(errors, None) if call == "log_batch" else None

    server.fail_after = fail
    Writer(str(spool.folder))(rows(1))
    send(Sender(spool, server, RUN).start())
    assert not spool.refused
    assert next(errors, None) is None


def test_a_full_disk_keeps_reports_until_there_is_room(
    spool: Spool, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pickle.loads(pickle.dumps(Writer(str(spool.folder))))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: real(fd, line[: len(line) // 2]))
    write(rows(1))
    write(rows(2))
    monkeypatch.setattr(os, "write", real)
    write(rows(3))
    send(Sender(spool, server, RUN).start())
    assert server.steps() == [1, 2, 3]


def test_files_leave_the_spool_when_the_server_has_them(spool: Spool, server: FakeServer) -> None:
    folder = spool.blob()
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    spool.append("artifacts", blob=folder.name, path="evaluation")
    Writer(str(spool.folder))({"images": {1: png()}})
    assert len(list(spool.blobs.iterdir())) == 2
    send(Sender(spool, server, RUN).start())
    assert "evaluation/a.png" in server.files
    assert not list(spool.blobs.iterdir())
