"""What a command keeps while it works: it comes back as it was, or it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from warmerge.pipeline.scoring.kept import read_kept, write_kept

ARRAYS = {"b": numpy.array([1.5, -0.0, 3.0, 1e-300]), "a": numpy.array([0.1, 2.0])}
SAID = {"facts": '{"a": {"seconds": 0.5}}', "fingerprint": "abc"}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "folder" / "kept.safetensors"
    write_kept(path, ARRAYS, SAID)
    return path


def same(path: Path) -> bool:
    """Whether a file still says what was written."""
    arrays, said = read_kept(path)
    bits = {key: (array.dtype, array.tobytes()) for key, array in arrays.items()}
    return said == SAID and bits == {key: (array.dtype, array.tobytes()) for key, array in ARRAYS.items()}


def test_what_was_written_comes_back_to_the_bit(kept: Path) -> None:
    assert same(kept)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_nothing_may_be_kept_yet(tmp_path: Path) -> None:
    write_kept(tmp_path / "kept", {}, {})
    assert read_kept(tmp_path / "kept") == ({}, {})


def test_it_is_replaced_as_a_whole(kept: Path) -> None:
    write_kept(kept, {"c": numpy.zeros(1)}, {})
    arrays, said = read_kept(kept)
    assert (list(arrays), said) == (["c"], {})


def test_a_flipped_bit_anywhere_is_noticed(kept: Path) -> None:
    """In the numbers, in what is said of them, in names and shapes: another number would be used as if it were ours."""
    data = kept.read_bytes()
    for i in range(len(data)):
        for bit in (0x01, 0x20):
            kept.write_bytes(data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
            try:
                unchanged = same(kept)
            except ValueError:
                continue
            assert unchanged, (i, data[i : i + 1], bit)


def test_a_truncated_file_is_noticed(kept: Path) -> None:
    data = kept.read_bytes()
    for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 8, len(data) - 1):
        kept.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"."):
            read_kept(kept)


@pytest.mark.parametrize("what", ["value", "names", "shape", "more", "fewer", "said", "digest"])
def test_other_contents_are_noticed(kept: Path, what: str) -> None:
    """Valid files: what an editor of safetensors would leave."""
    arrays, said = load_file(kept), dict(read_kept(kept)[1])
    digest = read_digest(kept)
    if what == "value":
        arrays["a"] = arrays["a"] + 1e-15
    elif what == "names":
        arrays["a"], arrays["b"] = arrays["b"], arrays["a"]
    elif what == "shape":
        arrays["b"] = arrays["b"].reshape(2, 2)
    elif what == "more":
        arrays["c"] = numpy.zeros(1)
    elif what == "fewer":
        del arrays["b"]
    elif what == "said":
        said["facts"] = said["facts"].replace("0.5", "0.7")
    save_file(arrays, kept, metadata=said if what == "digest" else said | {"digest": digest})
    with pytest.raises(ValueError, match=r"^its contents changed$"):
        read_kept(kept)


def test_the_check_of_other_contents_can_pass(kept: Path) -> None:
    save_file(load_file(kept), kept, metadata=SAID | {"digest": read_digest(kept)})
    assert same(kept)


def read_digest(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        digest: str = file.metadata()["digest"]
    return digest
