"""The files are np.savez's own, whole, and their writer's errors reach the caller."""

import io
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma_refactored.errors import UserError
from gemma_refactored.npz_writer import NpzWriter, npz

from .conftest import tries

names = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=40)
arrays = hnp.arrays(st.sampled_from([np.float32, np.float16]), hnp.array_shapes(min_dims=0, max_dims=3, max_side=70))


@tries(200)
@given(st.dictionaries(names.filter(lambda name: name != "file"), arrays, min_size=1, max_size=4))
def test_npz_writes_what_savez_writes_to_the_byte(content):
    expected = io.BytesIO()
    np.savez(expected, **content)
    assert npz(content) == expected.getvalue()


def test_writer_writes_whole_files_with_the_asked_dtype(tmp_path):
    rows = np.arange(300, dtype=np.float32).reshape(50, 1, 6)
    for dtype in ("float32", "float16"):
        with NpzWriter(dtype, compress=dtype == "float16") as writer:
            writer.put({"a": rows}, {tmp_path / dtype / str(i) / "x.npz": slice(i, i + 1) for i in range(50)})
        files = sorted((tmp_path / dtype).rglob("*"))
        assert sum(f.is_file() for f in files) == 50  # and no temporary ones
        with np.load(tmp_path / dtype / "7" / "x.npz", allow_pickle=False) as file:
            assert file["a"].dtype == dtype and np.array_equal(file["a"], rows[7:8])
    assert not any(thread.name == "npz-writer" for thread in threading.enumerate())


@pytest.mark.parametrize("value, message", [(1e5, "float16 can hold"), (np.nan, "NaN"), (np.inf, "NaN or infinite")])
def test_writer_refuses_values_it_cannot_keep(tmp_path, value, message):
    with pytest.raises(UserError, match=message), NpzWriter("float16") as writer:
        writer.put({"site": np.full((1, 1, 3), value, np.float32)}, {tmp_path / "x.npz": slice(None)})
    assert not list(tmp_path.iterdir())


def test_writer_errors_reach_the_caller_and_nobody_hangs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"), NpzWriter(queue_size=2) as writer:
        for i in range(100):
            writer.put({"a": np.zeros((1, 3), np.float32)}, {tmp_path / "file" / f"{i}.npz": slice(None)})
