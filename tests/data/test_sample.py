"""Sample members: keys, npy headers that never unpickle, json."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from pydantic import ValidationError

from ardist.data.sample import (
    NUMPY_DTYPES,
    SampleInfo,
    check_npy,
    decode_npy,
    encode_npy,
    key_from_int,
    key_to_int,
    npy_size,
    parse_npy_header,
    sample_key,
)
from ardist.errors import DataError, InvalidValueError


def saved(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("shape", [(16, 32, 4), (7,), (1, 64, 64, 3), (100_000, 2)])
def test_our_bytes_are_those_of_numpy(shape: tuple[int, ...], dtype: str) -> None:
    array = (np.arange(np.prod(shape)) % 251).reshape(shape).astype(NUMPY_DTYPES[dtype])
    data = encode_npy(array, dtype)
    assert data == saved(array)
    assert len(data) == npy_size(shape, dtype)
    assert np.array_equal(decode_npy(data, shape, dtype), array)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


GOOD = saved(np.zeros((2, 3), np.float16))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(np.array([Bomb()], object), allow_pickle=True), "refused"),
        (saved(np.zeros((2, 3), ">f2")), "'>f2' is refused"),
        (saved(np.zeros((2, 3), np.float32)), "'<f4' is refused"),
        (saved(np.asfortranarray(np.zeros((2, 3), np.float16))), "Fortran"),
        (saved(np.zeros(3, [("a", "<f2")])), "refused"),
        (b"", "not an npy"),
        (b"<html>", "not an npy"),
        (pickle.dumps([1]), "not an npy"),
        (b"\x93NUMPY\x09\x00" + GOOD[8:], "version 9.0"),
        (GOOD[:8] + b"\xff\xff" + GOOD[10:], "long, which cannot be"),
        (GOOD.replace(b"'descr'", b"'dexcr'"), "exactly descr"),
        (GOOD.replace(b"(2, 3)", b"(2, -3"), "literal dictionary"),
        (GOOD.replace(b"False", b"exit("), "literal dictionary"),
    ],
)
def test_strange_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        parse_npy_header(data)


def test_wrong_shape_dtype_or_length_is_refused() -> None:
    assert check_npy(GOOD, len(GOOD), (2, 3), "float16") == len(GOOD) - 12
    with pytest.raises(DataError, match=r"<f2 \[2, 3\]"):
        check_npy(GOOD, len(GOOD), (3, 2), "float16")
    with pytest.raises(DataError, match=r"<u2 \[2, 3\]"):
        check_npy(GOOD, len(GOOD), (2, 3), "bfloat16")
    with pytest.raises(DataError, match="bytes long"):
        decode_npy(GOOD[:-1], (2, 3), "float16")
    with pytest.raises(InvalidValueError, match="float16 is stored as"):
        encode_npy(np.zeros((2, 3), np.float32), "float16")


def test_version_two_headers_are_read() -> None:
    body = GOOD[10:]
    data = b"\x93NUMPY\x02\x00" + (len(body) - 12).to_bytes(4, "little") + body
    assert parse_npy_header(data) == ((2, 3), np.dtype("<f2"), len(data) - 12)


def test_keys() -> None:
    key = sample_key("clips/ä \udcff.mp4", (0, 16), {"size": 64})
    assert key == sample_key("clips/ä \udcff.mp4", (0, 16), {"size": 64})
    assert len({key, sample_key("b", (0, 16), {"size": 64}), sample_key("b", (1, 16), {"size": 64})}) == 3
    assert sample_key("a", (0, 16), {"size": 64}) == "5de8e8ab1bfcbc43"
    assert key_from_int(key_to_int(key)) == key
    assert key_from_int(-1) == "f" * 16
    for wrong in ("F" * 16, "a" * 15, "", "../../etc/passwd"):
        with pytest.raises(InvalidValueError, match="hexadecimal"):
            key_to_int(wrong)


def test_info_is_canonical_and_checked() -> None:
    info = SampleInfo(source="a.mp4", start=3, fps=8.0, frames=16, class_id=None, caption="ein Vöglein", camera="x")
    assert SampleInfo.model_validate_json(info.dump()) == info
    assert info.dump() == SampleInfo.model_validate_json(info.dump()).dump()
    for wrong in ({"frames": 0}, {"class_id": -1}, {"caption": "x" * 10_000}, {"fps": float("nan")}, {"start": -1}):
        with pytest.raises(ValidationError):
            SampleInfo(**{"source": "a", "frames": 1, **wrong})
