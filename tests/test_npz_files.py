"""The files are np.savez's own, whole, and read as np.load reads them; errors reach the caller."""

import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma_refactored.errors import UserError
from gemma_refactored.npz_files import NpzReader, NpzWriter, npz

names = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=40)
arrays = hnp.arrays(st.sampled_from([np.float32, np.float16]), hnp.array_shapes(min_dims=0, max_dims=3, max_side=70))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names.filter(lambda name: name not in ("file", "allow_pickle")), arrays, min_size=1, max_size=4))
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


def changed(content):
    """Other numbers of the same kind."""
    return {name: array + array.dtype.type(1) for name, array in content.items()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and np.array_equal(actual[name], array, equal_nan=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("reader") / "x.npz"


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(names, arrays, min_size=1, max_size=4), st.data())
def test_what_was_written_is_read_and_only_the_first_file_by_numpy(path, content, data):
    reader = NpzReader()
    path.write_bytes(npz(content))
    assert_same(reader.read(path), content)
    path.write_bytes(npz(changed(content)))
    some = data.draw(st.lists(st.sampled_from(list(content)), unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(np, "load")
        assert_same(reader.read(path), changed(content))
        assert_same(reader.read(path, some), {name: changed(content)[name] for name in some})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_one_size_may_differ_in_everything_else(path, save, order):
    reader = NpzReader()
    for name, dtype in (("a", "<f4"), ("b", "<f4"), ("a", ">f4"), ("a", "<i4")):
        array = np.asarray(np.arange(1, 7).reshape(2, 3), dtype, order)
        save(path, **{name: array, "c": array + 1})
        for _ in range(2):
            assert_same(reader.read(path), {name: array, "c": array + 1})
            assert_same(reader.read(path, ["c"]), {"c": array + 1})
    with pytest.raises(UserError, match="x.npz has no array 'd'; its arrays are a, c"):
        reader.read(path, ["d"])


@pytest.mark.parametrize("sizes, most", [(range(4, 24), 1), ([4] * 20, 7)])
def test_of_sizes_that_do_not_come_again_nothing_else_is_decoded(path, monkeypatch, sizes, most):
    """Attention weights, say, are of another size in every file; otherwise one file is read as a whole."""
    decoded, read_array, reader = [], np.lib.format.read_array, NpzReader()
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: decoded.append(1) or read_array(*a, **k))
    for size in sizes:
        content = {name: np.full(size, number, np.float32) for number, name in enumerate("abcdef")}
        path.write_bytes(npz(content))
        assert_same(reader.read(path, ["b"]), {"b": content["b"]})
    assert len(decoded) == (len(sizes) if most == 1 else most)


def test_arrays_nobody_asked_for_are_not_looked_at(path):
    content = {name: np.full((1, 1, 8), number, np.float32) for name, number in (("a", 1.5), ("b", 2.5))}
    reader = NpzReader()
    path.write_bytes(npz(content))
    reader.read(path)
    path.write_bytes(npz(content).replace(content["a"].tobytes(), content["b"].tobytes()))  # with a's checksum
    assert_same(reader.read(path, ["b"]), {"b": content["b"]})
    for wanted in (None, ["a"], ["b", "a"]):
        with pytest.raises(UserError, match="x.npz is damaged"):
            reader.read(path, wanted)


@pytest.mark.parametrize("has_read_one", [False, True])
def test_any_changed_byte_is_refused_or_without_effect(path, has_read_one):
    content = {name: np.arange(3, dtype=np.float32) + number for number, name in enumerate("ab")}
    whole, refused = bytes(npz(content)), 0
    reader = NpzReader()
    path.write_bytes(whole)
    reader.read(path)
    for position in range(len(whole)):
        for change in (1 << position % 8, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= change
            path.write_bytes(damaged)
            try:
                assert_same((reader if has_read_one else NpzReader()).read(path, list(content)), content)
            except UserError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > len(whole)


@pytest.mark.parametrize("data", [b"", b"PK", npz({"a": np.zeros(3)})[:-1]])
def test_what_is_no_whole_npz_file_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError, match="x.npz is damaged"):
        NpzReader().read(path)


def test_an_array_by_itself_or_a_missing_file_is_refused(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="x.npz is damaged .it holds one array"):
        NpzReader().read(path)
    path.unlink()
    with pytest.raises(UserError, match="x.npz is damaged .*No such file"):
        NpzReader().read(path)
