"""Files are whole or not there, and what prevents them is said in one sentence."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_refactored.errors import UserError
from gemma_refactored.files import locked, read_json, write_atomically, write_json

from .conftest import ROOT


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"x": "ü"})
    assert read_json(path, "file") == {"x": "ü"} and [f.name for f in path.parent.iterdir()] == ["c.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_full_or_read_only_disk_leaves_what_was_there(tmp_path, monkeypatch, step, code):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*((Path, "write_bytes", full) if step == "write_bytes" else (os, "replace", full)))
    with pytest.raises(UserError, match=f"x.npz could not be written: {os.strerror(code)}.*continues"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        write_atomically(tmp_path / "file" / "x", b"")
    with pytest.raises(UserError, match="could not be written"), locked(tmp_path / "file" / "folder"):
        pass


@pytest.mark.parametrize("content", ['{"g": 1, "g": 2}', '[{"a": {"g": [], "x": 0, "g": {}}}]'])
def test_a_name_that_occurs_twice_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="the name 'g' occurs twice"):
        read_json(tmp_path / "x.json", "prompts file")


def test_a_lock_keeps_other_processes_out_and_dies_with_its_own(tmp_path):
    program = f"""
import sys, time
from pathlib import Path
from gemma_refactored.files import locked
with locked(Path({str(tmp_path)!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="Another run"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())  # no lock file is left
