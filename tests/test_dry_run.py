"""What a run will take is said before it, and is what it takes."""

import re
from types import SimpleNamespace

import pytest

from gemma_refactored import dry_run, main

from .test_main import model_folder, run  # noqa: F401  (fixtures)


@pytest.mark.parametrize("options", [[], ["--activation-dtype", "float16", "--compress-activations"]])
@pytest.mark.parametrize("group", [True, False])
def test_the_estimate_is_what_the_run_then_writes(run, capsys, options, group):  # noqa: F811
    assert run(*options, "--dry-run", group=group) == 0
    assert not list((run.folder / "acts").glob("*"))
    prompts, steps, files, megabytes = map(
        float, re.findall(r"([\d.]+) (?:prompts|steps|files|MB)", capsys.readouterr().out)
    )
    assert run(*options, group=group) == 0
    written = [f for f in (run.folder / "acts").rglob("*") if f.is_file() and f.name != "manifest.json"]
    assert (prompts, steps) == (3, 12)
    assert files == len(written)
    assert megabytes == pytest.approx(sum(f.stat().st_size for f in written) / 1e6, rel=0.05, abs=0.051)


@pytest.mark.parametrize("batch_size", ["1", "2", "100"])
def test_the_files_of_a_flat_collection_are_those_of_its_batches(run, capsys, batch_size):  # noqa: F811
    options = ["--batch-size", batch_size]
    assert run(*options, "--dry-run", group=False) == 0
    (files,) = re.findall(r"([\d.]+) files", capsys.readouterr().out)
    assert run(*options, group=False) == 0
    assert int(files) == sum(1 for f in (run.folder / "acts").rglob("batch_*/*") if f.is_file())


def test_a_run_that_does_not_fit_the_disk_is_refused(run, capsys, monkeypatch):  # noqa: F811
    assert run() == 0
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert run() == 0  # all there already: nothing to write
    assert run("--overwrite") == 2
    error = capsys.readouterr().err
    assert "has room for" in error and "--activation-dtype float16" in error


@pytest.mark.parametrize("large, is_announced", [(100, True), (1e9, False)])
def test_what_is_large_is_announced_before_it_is_written(run, caplog, monkeypatch, large, is_announced):  # noqa: F811
    monkeypatch.setattr(main, "answer", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(dry_run, "LARGE", large)
    with caplog.at_level("INFO", "gemma_refactored.dry_run"), pytest.raises(pytest.fail.Exception):
        run()
    assert ("This run may write 0.0 GB: " in caplog.text) == is_announced
