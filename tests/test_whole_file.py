"""Files that are whole whenever they exist."""

import os

import pytest

from npclip.whole_file import new_folder, replacing


@pytest.mark.parametrize("sync", [False, True])
def test_it_takes_the_place_when_it_is_whole(tmp_path, sync):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path, sync=sync) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before] * bool(before)


def test_the_longest_of_names_and_two_at_a_time(tmp_path):
    path = tmp_path / ("x" * 255)
    with replacing(path) as one, replacing(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "above" / "folder"
    with new_folder(path) as place:
        (place / "file").write_bytes(b"new")
        assert not path.exists()
    assert os.listdir(path.parent) == ["folder"] and os.listdir(path) == ["file"]
    for error in (KeyboardInterrupt, OSError):  # the second: there is one of that name
        with pytest.raises(error), new_folder(path) as place:
            (place / "other").write_bytes(b"new")
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
        assert os.listdir(path.parent) == ["folder"] and os.listdir(path) == ["file"]
