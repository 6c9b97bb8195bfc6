"What is written is whole, whoever else writes it at the same time."

import os
import stat
import threading

import pytest

from llmkit.core import files
from llmkit.core.artifact import ArtifactError, build, open_artifact
from llmkit.core.errors import KitError
from llmkit.core.files import (
    atomic_folder,
    held,
    locked,
    read_json,
    read_jsonl,
    read_object,
    read_text,
    write_json,
    write_jsonl,
)
from llmkit.core.params import load_params
from llmkit.core.settings import load_settings


def together(*jobs):
    "Run functions at once, and give what they raised."
    raised = []

    def run(job):
        try:
            job()
        except Exception as e:
            raised.append(e)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return raised


def test_threads_that_write_one_file_leave_it_whole(tmp_path):
    file = tmp_path / "status.json"
    write_json(file, {"by": 0, "rows": [0] * 2000})

    def write(by):
        for _ in range(150):
            write_json(file, {"by": by, "rows": [by] * 2000})

    def read():
        for _ in range(300):
            found = read_json(file)
            assert set(found["rows"]) == {found["by"]}

    assert together(lambda: write(1), lambda: write(2), read) == []
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_threads_that_make_one_folder_leave_one(tmp_path):
    def make(by):
        for _ in range(150):
            with atomic_folder(tmp_path / "kept") as folder:
                (folder / "by").write_text(str(by))

    assert together(lambda: make(1), lambda: make(2)) == []
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/by").read_text() in "12"


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "kept") as folder:
        (folder / "a").write_text("old")
    real = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(KitError, match="No space left on device. Free some space"):
        with atomic_folder(tmp_path / "kept") as folder:
            (folder / "a").write_text("new")
    assert (tmp_path / "kept/a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("e", [ConnectionError("the peer went"), FileNotFoundError(2, "No such file", "rows.csv")])
def test_an_error_of_the_rows_is_not_told_as_one_of_the_disk(tmp_path, e):
    def rows():
        yield {"i": 0}
        raise e

    with pytest.raises(type(e)) as got:
        write_jsonl(tmp_path / "out.jsonl", rows())
    assert got.value is e and not list(tmp_path.iterdir())


def test_a_file_behind_a_linked_folder_is_part_of_an_artifact(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/weights.bin").write_text("one")
    with build(tmp_path / "base", "base") as folder:
        (folder / "shards").symlink_to(tmp_path / "blobs")
    assert list(open_artifact(tmp_path / "base").files) == ["shards/weights.bin"]
    (tmp_path / "blobs/weights.bin").write_text("two")
    with pytest.raises(ArtifactError, match="shards/weights.bin differs"):
        open_artifact(tmp_path / "base")


@pytest.mark.parametrize("umask, folder, lock", [(0o002, 0o775, 0o664), (0o077, 0o700, 0o600)])
def test_who_may_write_and_read_is_the_umasks_to_say(tmp_path, umask, folder, lock):
    "A group works in one folder, or nobody else shall look into it."
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "made") as made, locked(tmp_path / "lock"):
            (made / "weights").touch(0o600)  # as safetensors does, for its own user alone
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("made", "lock")] == [folder, lock]
    assert stat.S_IMODE((tmp_path / "made/weights").stat().st_mode) == 0o600 | (folder & 0o444)


@pytest.mark.parametrize("read", [read_text, read_json, load_params, load_settings, held, lambda p: [*read_jsonl(p)]])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(KitError, match=f"{path}: cannot read: is a pipe or a device, and no file"):
            read(path)
    with pytest.raises(KitError, match="Is a directory"):
        read(tmp_path)


def test_json_that_is_no_utf_8_is_told_as_such(tmp_path):
    (tmp_path / "f").write_bytes(b'{"a": "\xf6"}')
    with pytest.raises(KitError, match="f: is not UTF-8: byte 0xf6 at 7. Save it as UTF-8"):
        read_json(tmp_path / "f")


READERS = {"read_text": read_text, "read_json": read_json, "read_jsonl": lambda p: list(read_jsonl(p))}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_cannot_be_read_is_told_with_the_file_and_what_to_do(tmp_path, read):
    (tmp_path / "file").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("none", "no such file. Correct the path, or make the file"),
        (".", "cannot read: Is a directory. Name a file in that folder"),
        ("file/x", "cannot read: Not a directory. Correct the path: it goes through a file"),
        ("n" * 300, "cannot read: File name too long. Check the path, and the disk that it is on"),
        ("a\0b", "cannot read: embedded null byte. Check the path, and the disk that it is on"),
        ("pipe", "cannot read: is a pipe or a device, and no file. Write what comes from there into a file, and name that"),
    ):  # fmt: skip
        with pytest.raises(KitError) as e:
            read(tmp_path / name)
        assert str(e.value) == f"{tmp_path / name}: {said}"


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"n": 3,', "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("[1]", r"must be an object with named values \(got \[1\]\)"),
    ],
)
def test_what_is_no_object_is_told_with_what_to_do(tmp_path, text, said):
    (tmp_path / "f").write_text(text + "\n")
    with pytest.raises(KitError, match=f"f: {said}.*restore the file: make it, fetch it or copy it again$"):
        read_object(tmp_path / "f")
    with pytest.raises(KitError, match=f"f: line 1: {said}.*Correct the line, or restore the file.*again$"):
        list(read_jsonl(tmp_path / "f"))
