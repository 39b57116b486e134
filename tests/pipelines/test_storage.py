"""Storage, the nodes' caches and the jobs' mirrors, on a path and on an S3 endpoint, and under faults."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.mirror import Mirror, bring
from pipelines.place import NodeCache, Place
from pipelines.storage import Storage, StorageError, check_uri


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An S3 endpoint in this process."""
    from moto.server import ThreadedMotoServer

    saved = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    import boto3

    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="bucket")
    yield f"127.0.0.1:{port}"
    server.stop()
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(params=["path", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "path":
        return Storage(str(tmp_path / "shared"), patience=1)
    host = request.getfixturevalue("endpoint")
    return Storage(f"s3://bucket/{tmp_path.name}?endpoint_override={host}&scheme=http&region=us-east-1", patience=1)


def a_folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_files_come_back_as_they_went(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    assert storage.keys("") == {}  # and the check leaves nothing
    storage.write("a/b", b"1")
    storage.write("a/b", b"22")
    assert storage.read("a/b") == b"22"
    assert storage.read("a/c") is None
    assert storage.exists("a/b")
    assert not storage.exists("a")
    big = tmp_path / "big"
    big.write_bytes(os.urandom(20 * 2**20))  # several chunks, several parts of an upload
    storage.put(big, "c/big")
    storage.get("c/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    assert storage.keys("") == {"a/b": 2, "c/big": 20 * 2**20}
    storage.delete("a")
    storage.delete("nothing/here")
    assert storage.keys("") == {"c/big": 20 * 2**20}
    with pytest.raises(FileNotFoundError):
        storage.get("a/b", tmp_path / "gone")
    with pytest.raises(ValueError, match="no key"):
        storage.write("../outside", b"")


KILLED_IN_MID_UPLOAD = """
import os, sys
from pathlib import Path
from pipelines import storage

class Half:
    def __init__(self, stream): self.stream = stream
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def write(self, data):
        self.stream.write(bytes(data)[: len(data) // 2])
        os._exit(9)

given = storage.Storage(sys.argv[1])
if given.uri.startswith("s3://"):
    real, root = given.filesystem
    class Store:
        def open_output_stream(self, path): return Half(real.open_output_stream(path))
    given.__dict__["_root"] = Store(), root
else:
    storage.shutil.copyfileobj = lambda source, sink, size: Half(sink).write(source.read())
given._put(Path(sys.argv[2]), "last.pt")
"""


def test_a_process_killed_in_mid_upload_leaves_the_old_file(storage: Storage, tmp_path: Path) -> None:
    storage.write("last.pt", b"whole")
    big = tmp_path / "big"
    big.write_bytes(os.urandom(12 * 2**20))
    done = subprocess.run([sys.executable, "-c", KILLED_IN_MID_UPLOAD, storage.uri, str(big)], check=False)
    assert done.returncode == 9
    assert storage.read("last.pt") == b"whole"
    assert set(storage.keys("")) == {"last.pt"}


def test_a_published_folder_is_named_by_what_it_holds(storage: Storage, tmp_path: Path) -> None:
    one = a_folder(tmp_path / "one", **{"spec.json": "{}", "sub/x": "1"})
    key = storage.publish(one)
    assert storage.publish(a_folder(tmp_path / "two", **{"spec.json": "{}", "sub/x": "1"})) == key
    assert storage.publish(a_folder(tmp_path / "three", **{"spec.json": "{}", "sub/x": "2"})) != key
    place = Place(storage, tmp_path / "cache")
    assert place.send(one) == key
    mirror = place.mirror("state/job")  # a job's folder is beside the cached ones, and none of them
    assert mirror is not None
    mirror.folder.mkdir(parents=True)
    with place.opened(key) as folder:
        assert contents(folder) == {"spec.json": "{}", "sub/x": "1"}
        assert folder.is_relative_to(tmp_path / "cache")  # never the driver's own


def test_a_damaged_copy_in_the_storage_is_refused(storage: Storage, tmp_path: Path) -> None:
    key = storage.publish(a_folder(tmp_path / "one", x="1"))
    storage.write(f"{key}/files/x", b"2")
    with pytest.raises(StorageError, match="is damaged"), NodeCache(tmp_path / "cache", 1 << 30).opened(storage, key):
        pass
    assert not [d for d in (tmp_path / "cache").iterdir() if d.is_dir()]
    storage.write(f"{key}/manifest.json", b"{}")
    with pytest.raises(StorageError, match="is damaged"):
        storage.manifest(key)


def test_the_cache_evicts_what_was_used_longest_ago_and_never_what_is_in_use(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "shared"))
    keys = [storage.publish(a_folder(tmp_path / f"d{i}", x=str(i) * 1000)) for i in range(4)]
    cache = NodeCache(tmp_path / "cache", limit=2500)

    def held() -> set[int]:
        return {i for i, key in enumerate(keys) if (tmp_path / "cache" / key.replace("/", "-")).is_dir()}

    for i in (0, 1):
        with cache.opened(storage, keys[i]):
            time.sleep(0.02)
    with cache.opened(storage, keys[0]):  # used again: 1 is now the older
        time.sleep(0.02)
    with cache.opened(storage, keys[2]):
        assert held() == {0, 2}
    with cache.opened(storage, keys[0]), cache.opened(storage, keys[2]), cache.opened(storage, keys[3]):
        assert held() == {0, 2, 3}  # over the limit rather than under somebody's feet


def test_workers_of_one_node_share_one_download(tmp_path: Path, monkeypatch: Any) -> None:
    storage = Storage(str(tmp_path / "shared"))
    key = storage.publish(a_folder(tmp_path / "d", x="1"))
    fetched, fetch = [], NodeCache._fetch

    def slow(self: NodeCache, *given: Any) -> None:
        fetched.append(1)
        time.sleep(0.2)
        fetch(self, *given)

    monkeypatch.setattr(NodeCache, "_fetch", slow)
    seen: list[dict[str, str]] = []

    def worker() -> None:
        with NodeCache(tmp_path / "cache", 1 << 30).opened(storage, key) as folder:
            seen.append(contents(folder))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [{"x": "1"}] * 4
    assert len(fetched) == 1


def checkpoint(mirror: Mirror, step: int, best: bool = False) -> None:
    """As the trainer leaves them: replaced whole; the history is appended to."""
    with open(mirror.folder / "history.jsonl", "a") as file:
        file.write(f'{{"step": {step}}}\n')
    for name in (["best.pt"] if best else []) + ["last.pt"]:
        (mirror.folder / "aside").write_text(f"{name} {step}")
        os.replace(mirror.folder / "aside", mirror.folder / name)
        mirror.push(mirror.folder / name)


def test_a_job_goes_on_elsewhere_from_what_was_sent(storage: Storage, tmp_path: Path) -> None:
    first = Mirror(storage, "state/job", tmp_path / "node1")
    first.pull()
    for step in (1, 2, 3):
        checkpoint(first, step, best=step == 2)
    first.settle()
    second = Mirror(storage, "state/job", tmp_path / "node2")
    second.pull()
    assert (tmp_path / "node2/last.pt").read_text() == "last.pt 3"
    assert (tmp_path / "node2/best.pt").read_text() == "best.pt 2"
    assert len((tmp_path / "node2/history.jsonl").read_text().splitlines()) == 3

    checkpoint(first, 4)  # it was thought dead, and is not: it must not write over its successor's work
    with pytest.raises(StorageError, match="another attempt has taken over"):
        first.settle()
    checkpoint(second, 5)
    a_folder(tmp_path / "node2/result", **{"config.json": "{}", "weights": "w"})
    assert not bring(storage, "state/job", tmp_path / "driver")
    second.deliver(tmp_path / "node2/result")
    assert bring(storage, "state/job", tmp_path / "driver")
    assert contents(tmp_path / "driver/result") == {"config.json": "{}", "weights": "w"}
    assert storage.read("state/job/last.pt") == b"last.pt 5"


def test_a_store_that_is_away_delays_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    storage = Storage(str(tmp_path / "shared"), patience=30)
    away, put = threading.Event(), Storage._put
    away.set()

    def flaky(self: Storage, local: Path, key: str) -> None:
        if away.is_set() and key.startswith("state/"):
            raise OSError(111, "connection refused")
        put(self, local, key)

    mirror = Mirror(storage, "state/job", tmp_path / "node")
    away.clear()
    mirror.pull()
    away.set()
    monkeypatch.setattr(Storage, "_put", flaky)
    started = time.monotonic()
    for step in range(1, 6):
        checkpoint(mirror, step)
    assert time.monotonic() - started < 5  # of 30 that the store may take
    away.clear()
    mirror.settle()
    assert storage.read("state/job/last.pt") == b"last.pt 5"


def test_a_store_that_stays_away_stops_the_job_and_the_node_keeps_the_newest(tmp_path: Path, monkeypatch: Any) -> None:
    storage = Storage(str(tmp_path / "shared"), patience=0.3)
    mirror = Mirror(storage, "state/job", tmp_path / "node")
    mirror.pull()
    checkpoint(mirror, 1)
    mirror.settle()

    def gone(self: Storage, local: Path, key: str) -> None:
        raise OSError(111, "connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_put", gone)
        with pytest.raises(StorageError, match=r"the newest checkpoint is on this node in .*node"):
            for step in range(2, 50):
                checkpoint(mirror, step)
                time.sleep(0.05)
    newest = (tmp_path / "node/last.pt").read_text()
    assert newest != "last.pt 1"
    again = Mirror(storage, "state/job", tmp_path / "node")  # the same node, the store is back
    again.pull()
    assert (tmp_path / "node/last.pt").read_text() == newest
    assert storage.read("state/job/last.pt") == newest.encode()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "gs://bucket/x' is not accepted"),
        ("s3://", "needs a bucket"),
        ("s3://key:secret@bucket/x", "credentials do not belong"),
        ("s3://bucket/x?endpoint=localhost", "option 'endpoint' of s3:// is not known; known: endpoint_override"),
    ],
)
def test_what_is_no_storage_is_said(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_uri(uri)


def test_what_cannot_work_is_said_at_once(endpoint: str, tmp_path: Path) -> None:
    started = time.monotonic()
    for uri, message in (
        (f"s3://missing/x?endpoint_override={endpoint}&scheme=http&region=us-east-1", "first write failed"),
        ("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1", "first write failed"),
        (str(a_folder(tmp_path, file="") / "file" / "below"), "first write failed"),
    ):
        with pytest.raises(StorageError, match=message):
            Storage(uri).check(patience=1)
    assert time.monotonic() - started < 30


def test_old_folders_and_states_are_swept(storage: Storage, tmp_path: Path) -> None:
    key = storage.publish(a_folder(tmp_path / "one", x="1"))
    storage.write("state/train-x/seed0/last.pt", b"")
    storage.sweep(days=1)
    assert storage.exists(f"{key}/manifest.json")
    assert storage.exists("state/train-x/seed0/last.pt")
    storage.sweep(days=-1)
    assert storage.keys("") == {}
