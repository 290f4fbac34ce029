"""Checkpoint files from anywhere: read exactly, or refused before they take memory or change anything."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spatial_mamba.classification.models import stand_ins
from spatial_mamba.classification.models.weights import WeightsError, read_checkpoint

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"


def assert_equal(read: Any, saved: Any) -> None:
    assert type(read) is type(saved) or isinstance(saved, torch.nn.Parameter)
    if isinstance(saved, dict):
        assert list(read) == list(saved)
        for key in saved:
            assert_equal(read[key], saved[key])
    elif isinstance(saved, torch.Tensor):
        assert read.dtype == saved.dtype and read.shape == saved.shape and read.stride() == saved.stride()
        assert torch.equal(read.reshape(-1).view(torch.uint8), saved.detach().reshape(-1).view(torch.uint8))
    else:
        assert read == saved


def everything() -> dict[str, Any]:
    """Tensors of all dtypes and layouts that are read, and plain values."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    integers, floats = (8, 16, 32, 64), ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
    kinds = ("uint8", "bool", *(f"int{bits}" for bits in integers), *floats)
    state = OrderedDict((name, torch.tensor([0, 1, 1]).to(getattr(torch, name))) for name in kinds)
    state |= dict(whole=base, part=base[:, 1:, ::2], transposed=base.mT, zero=torch.zeros(3, 0), one=torch.tensor(2.5))
    state |= dict(
        parameter=torch.nn.Parameter(torch.ones(2, 2)),
        last=torch.ones(1, 4, 2, 2).to(memory_format=torch.channels_last),
    )
    return {
        "model": state,
        "epoch": 3,
        "names": ("a", ["b"]),
        "large": 2**70,
        "nothing": None,
        "flag": True,
        "raw": b"\0\xff",
    }


@pytest.mark.parametrize("protocol", (2, 4))
@pytest.mark.parametrize("is_zip", (True, False))
def test_values_are_read_exactly(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    content = everything()
    if is_zip:
        content["model"] |= dict(wide=torch.ones(3, dtype=torch.uint16), narrow=torch.ones(3).to(torch.float8_e4m3fn))
    path = tmp_path / "model.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    read = read_checkpoint(path)
    assert_equal(read, content)
    shared = read["model"]["whole"].untyped_storage().data_ptr()
    assert read["model"]["part"].untyped_storage().data_ptr() == shared, "tensors share memory as before"


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm2d(3).state_dict()
    torch.save({"model": state}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth")["model"]._metadata == state._metadata


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1).expand(3, 10**9), "a tensor is expanded"),
        (torch.ones(5).as_strided((3, 3), (1, 1)), "a tensor is expanded"),
        (torch.ones(2, 2).to_sparse(), "not dense"),
        (torch.ones(2, device="meta"), "not dense"),
        (quantised(), "not dense"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "not dense"),
        (torch.ones(2, dtype=torch.complex64).conj(), "unknown properties"),
    ],
    ids=["expanded", "overlapping", "sparse", "meta", "quantised", "nested", "conjugate"],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path: Path, tensor: torch.Tensor, reason: str) -> None:
    torch.save({"model": {"weight": tensor}}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=rf"model\.pth: not a PyTorch checkpoint, or a damaged one \(.*{reason}"):
        read_checkpoint(tmp_path / "model.pth")


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {"weight": torch.randn(300)}, "epoch": 3, "classes": list("abc")}, path)
    content, expected = path.read_bytes(), read_checkpoint(path)
    refused = 0
    for place in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except WeightsError:
            refused += 1
        else:  # in what has no meaning, such as padding
            assert_equal(read, expected)
    assert refused > 100


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def sized(archive: bytes, name: bytes, size: int) -> bytes:
    """The archive, in whose list of members one has another size."""
    place = archive.rindex(name) - 46
    assert archive[place : place + 4] == b"PK\1\2"
    return archive[: place + 20] + struct.pack("<II", size, size) + archive[place + 28 :]


def test_sizes_without_content_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {"weight": torch.zeros(100)}}, path)
    content = path.read_bytes()

    rewritten(path, lambda name, old: old, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed, repeated or overlapping members"):
        read_checkpoint(path)
    path.write_bytes(sized(content, b"model/data/0", 10**9))
    with pytest.raises(WeightsError, match="compressed, repeated or overlapping members"):
        read_checkpoint(path)
    path.write_bytes(content)
    rewritten(path, lambda name, old: old.replace(b"K\x64", b"M\xff\xff") if name.endswith(".pkl") else old)
    with pytest.raises(WeightsError, match="the data of a tensor have another size"):
        read_checkpoint(path)
    legacy = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(100)}}, legacy, _use_new_zipfile_serialization=False)
    path.write_bytes(legacy.getvalue().replace(b"K\x64", b"M\xff\xff"))
    with pytest.raises(WeightsError, match="the data of a tensor have another size"):
        read_checkpoint(path)


def doubled(levels: int) -> list:
    """A list with 2**levels entries, which share all their memory."""
    entry: list = []
    for _ in range(levels):
        entry = [entry, entry]
    return entry


def endless() -> list:
    entry: list = []
    entry.append(entry)
    return entry


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (doubled(40), "more than 1,000,000 values"),
        (endless(), "100 levels"),
        (1 << 5000, "a value of the type int"),
        (list(range(1_000_001)), "more than 1,000,000 values"),
    ],
    ids=["doubled", "endless", "large", "long"],
)
def test_values_are_bounded(tmp_path: Path, value: Any, reason: str) -> None:
    torch.save({"model": {}, "value": value}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(tmp_path / "model.pth")


# Pickles that try to change what they name: (opcodes, words of the error).
ATTACKS = {
    "memo": (b"}r\xff\xff\xff\x7f.", "reserves memory"),
    "function": (b"c_codecs\nencode\n}X\x08\0\0\0__call__Nsb.", "changes a value that has no state"),
    "class": (b"cnumpy\ndtype\n(NXcXX\x01\0\0\0aNtb.", "damaged"),
    "slots": (b"cnumpy\ndtype\n(N}X\x0c\0\0\0__setstate__NstX\x01\0\0\0ab.", "damaged"),
    "tensor": (b"ctorch._utils\n_rebuild_tensor\n(NK\0))tR.", "unknown properties"),
    "called type": (b"cbuiltins\nlist\n)R.", "refused"),
    "codec": (b"c_codecs\nencode\n(X\1\0\0\0aX\3\0\0\0hextR.", "refused"),
    "extension": (b"\x82\1.", "opcode EXT1"),
    "text reference": (b"Pname\n.", "opcode PERSID"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_cannot_change_what_it_names(tmp_path: Path, name: str) -> None:
    attack, words = ATTACKS[name]
    before = dict(vars(stand_ins.Dtype)), dict(vars(stand_ins.Array))
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    rewritten(path, lambda member, old: b"\x80\2" + attack if member.endswith("data.pkl") else old)
    with pytest.raises(WeightsError, match=words):
        read_checkpoint(path)
    assert (dict(vars(stand_ins.Dtype)), dict(vars(stand_ins.Array))) == before


def test_an_array_is_filled_once(tmp_path: Path) -> None:
    array = np.arange(4.0)
    content = pickle.dumps({"model": {}, "a": array}, protocol=2)
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    rewritten(path, lambda member, old: content if member.endswith("data.pkl") else old)
    read = read_checkpoint(path)["a"]
    assert type(read) is np.ndarray and np.array_equal(read, array) and read.flags.owndata
    with pytest.raises(stand_ins.ForeignTypeError):
        filled = stand_ins.Array()
        for _ in range(2):
            filled.__setstate__((1, (1,), stand_ins.Dtype("f8"), False, bytes(8)))


def test_threads_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {"weight": torch.ones(4)}, "score": np.float64(1.5)}, path)
    before = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(read_checkpoint, [path] * 64))
    assert all(entry["score"] == 1.5 for entry in read)
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.pth")), ids=lambda path: path.stem)
def test_hostile_files_are_refused(path: Path) -> None:
    with pytest.raises(WeightsError, match=f"{path.name}: (not a PyTorch checkpoint, or a damaged one|refused)"):
        read_checkpoint(path)
