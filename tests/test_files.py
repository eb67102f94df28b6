"""Files are whole or not there, and what prevents them is said in one sentence."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from gemma_refactored.errors import UserError
from gemma_refactored.files import (
    is_anything,
    is_file,
    is_folder,
    locked,
    read_json,
    write_atomically,
    write_json,
    write_safetensors,
)

from .conftest import ROOT, no_file_larger_than


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


@pytest.mark.parametrize("size", [0, 100, 16_000, 70_000])
@pytest.mark.parametrize("write", [
    lambda path: write_json(path, list(range(50_000))),
    lambda path: write_safetensors(path, {"a": mx.zeros((3, 10_000)), "b": mx.ones(10)}),
    lambda path: write_safetensors(path, {"a": mx.zeros(20_000)}, {"facts": "x" * 10_000}),
])  # fmt: skip
def test_a_disk_that_fills_up_meanwhile_leaves_what_was_there(tmp_path, write, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with no_file_larger_than(size), pytest.raises(UserError, match="x.safetensors could not be written: .*continues"):
        write(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        write_atomically(tmp_path / "file" / "x", b"")
    with pytest.raises(UserError, match="could not be written"), locked(tmp_path / "file" / "folder"):
        pass


def test_what_is_at_a_path(tmp_path):
    (tmp_path / "file").write_text("x")
    looks = [(is_file(path, "x"), is_folder(path, "x"), is_anything(path, "x")) for path in
             (tmp_path / "file", tmp_path, tmp_path / "none", tmp_path / "file" / "below", "")]  # fmt: skip
    assert looks == [(True, False, True), (False, True, True), *[(False, False, False)] * 3]


@pytest.mark.parametrize("kind", ["too long", "NUL", "circle"])
def test_a_path_that_cannot_be_looked_at_is_refused_in_one_sentence(tmp_path, kind):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    path = {"too long": tmp_path / ("x" * 256), "NUL": tmp_path / "a\0b", "circle": tmp_path / "circle"}[kind]
    uses = [lambda: is_folder(path, "model folder"), lambda: is_file(path, "file"), lambda: read_json(path, "manifest"),
            lambda: locked(path / "in").__enter__()]  # fmt: skip
    if kind != "circle":  # a file takes the place of the link
        uses += [lambda: write_json(path, {}), lambda: write_safetensors(path, {})]
    for use in uses:
        with pytest.raises(UserError) as error:
            use()
        assert re.search("could not be written|cannot be (accessed|read)", str(error.value))
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


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
