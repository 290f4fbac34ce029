"""Checkpoint files from anywhere: read exactly, or refused before they take memory or change anything."""

import io
import json
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from spatial_mamba.classification.models import stand_ins
from spatial_mamba.classification.models.safetensors_files import write_safetensors
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
        "empty": b"",
        "numbers": {1: 2.5, -3: 1j, None: {"a", 2}, ("a", "b"): float("inf")},
        "type": torch.bfloat16,
        "text": "\ud800\u00e9" * 300,
    }


@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
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


def test_containers_and_types_become_plain(tmp_path: Path) -> None:
    values = dict(counts=defaultdict(int, a=1), names=defaultdict(str), counter=Counter("aab"), array=bytearray(b"ab"))
    values |= dict(size=torch.Size([2, 3]), device=torch.device("cuda", 1))
    path = tmp_path / "model.pth"
    torch.save({**values, "tied": [torch.ones(2)] * 2}, path)
    read = read_checkpoint(path)
    tied = read.pop("tied")
    assert read == {**values, "size": (2, 3), "device": "cuda:1"} and tied[0] is tied[1]
    assert all(type(value) in (OrderedDict, dict, bytes, tuple, str) for value in read.values())


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm2d(3).state_dict()
    torch.save({"model": state}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth")["model"]._metadata == state._metadata
    state._metadata[""]["assign_to_params_buffers"] = True  # PyTorch would replace parameters
    torch.save({"model": state}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth")["model"]._metadata == {"": {"version": 2}}


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
        (1 << 5000, "an integer of more than 1024 bits"),
        (["a" * 10**6] * 10**4, "repeats them too often"),
        (list(range(1_000_001)), "more than 1,000,000 values"),
    ],
    ids=["doubled", "endless", "large", "text", "long"],
)
def test_values_are_bounded(tmp_path: Path, value: Any, reason: str) -> None:
    torch.save({"model": {}, "value": value}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(tmp_path / "model.pth")


def opcodes(*values: Any) -> bytes:
    """The opcodes that push values; bytes are opcodes already."""
    return b"".join(
        value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)[2:-1].replace(b"q\0", b"")
        for value in values
    )


def doubled_tuple(levels: int, memo: bytes) -> bytes:
    """The opcodes of a tuple with 2**levels entries."""
    return b")" + (b"q" + memo + b"h" + memo + b"\x86") * levels


LONG = b"(" + opcodes(*range(1000)) + b"tq\1"  # a tuple in the memo
TEXT = opcodes(b"X\xa0\x86\1\0" + b"a" * 100_000, b"q\1")  # a string in the memo
BOOLEAN = opcodes(b"cnumpy\ndtype\n", "b1", b"\x85R")
STORAGE = opcodes(b"(", "storage", b"ctorch\nFloatStorage\n", "0", "cpu", b"K\1tQ")

# Pickles that try to change what they name, to run code, or to take much time or memory: (opcodes, words of the error).
ATTACKS = {
    "function": (b"c_codecs\nencode\n}X\x08\0\0\0__call__Nsb.", "changes a value that has no state"),
    "class": (b"cnumpy\ndtype\n(NXcXX\x01\0\0\0aNtb.", "damaged"),
    "slots": (b"cnumpy\ndtype\n(N}X\x0c\0\0\0__setstate__NstX\x01\0\0\0ab.", "damaged"),
    "method": (b"ccollections\nOrderedDict\n)R}X\x06\0\0\0appendcbuiltins\nset\nsb]a.", "adds to a value of type"),
    "tensor": (b"ctorch._utils\n_rebuild_tensor\n(NK\0))tR.", "unknown properties"),
    "called type": (b"cbuiltins\nlist\n)R.", "refused"),
    "called value": (b"])R.", "calls a value that is not a function"),
    "codec": (b"c_codecs\nencode\n(X\1\0\0\0aX\3\0\0\0hextR.", "refused"),
    "other codec": (opcodes(b"c__builtin__\nbytearray\n", "a", "punycode", b"\x86R."), "refused"),
    "module": (b"ctorch\n_inductor\n.", "refused"),
    "extension": (b"\x82\1.", "opcode"),
    "text reference": (b"Pname\n.", "opcode"),
    "empty stack": (b"\x86.", "incomplete"),
    "zeros": (opcodes(b"c__builtin__\nbytearray\n", 2**40, b"\x85R."), "refused"),
    "colliding numbers": (b"}(" + opcodes(*(i * (2**61 - 1) for i in range(20_000))) + b"u.", "an unusual key"),
    "colliding pairs": (b"\x8f(" + opcodes((-1, -2)) + b"\x90.", "an unusual key"),
    "long key": (b"}" + TEXT + b"Ns.", "an unusual key"),
    "nested key": (b"}" + doubled_tuple(40, b"\0") + b"Ns.", "an unusual key"),
    "nested code": (b"cnumpy\ndtype\n" + doubled_tuple(40, b"\0") + b"\x85R.", "refused"),
    "nested device": (b"ctorch\ndevice\n" + doubled_tuple(40, b"\0") + b"\x85R.", "a device has no name"),
    "repeated path": (TEXT + b"cpathlib\nPosixPath\n(" + b"h\1" * 10_000 + b"tR.", "copies values too often"),
    "nested path": (b"cpathlib\nPosixPath\n(cpathlib\nPosixPath\n)RtR.", "not text"),
    "copies": (LONG + b"(" + b"cbuiltins\nset\nh\1\x85R" * 5000 + b"l.", "copies values too often"),
    "arguments": (LONG + b"(" + b"ctorch._utils\n_rebuild_parameter\nh\1R" * 5000 + b"l.", "copies values too often"),
    "dimensions": (opcodes(b"ctorch._utils\n_rebuild_tensor\n(", STORAGE, 0, (1,) * 65, (1,) * 65, b"tR."), "shape"),
    "quantised": (
        opcodes(b"ctorch._utils\n_rebuild_tensor_v3\n(", STORAGE, 0, (1,), (1,), False, None, b"ctorch\nqint8\ntR."),
        "a tensor of the type qint8",
    ),
    "boolean": (opcodes(b"cnumpy.core.multiarray\nscalar\n", BOOLEAN, b"C\1\2\x86R."), "other than 0 and 1"),
}


def forge(path: Path, content: bytes) -> None:
    """Write a file of ``torch.save`` with another pickle."""
    torch.save({"model": {}}, path)
    rewritten(path, lambda member, old: b"\x80\2" + content if member.endswith("data.pkl") else old)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_can_only_make_values(tmp_path: Path, name: str) -> None:
    attack, words = ATTACKS[name]
    before = [dict(vars(kind)) for kind in (*vars(stand_ins).values(), torch) if hasattr(kind, "__dict__")]
    forge(tmp_path / "model.pth", attack)
    with pytest.raises(WeightsError, match=words):
        read_checkpoint(tmp_path / "model.pth")
    assert before == [dict(vars(kind)) for kind in (*vars(stand_ins).values(), torch) if hasattr(kind, "__dict__")]


def test_a_state_is_not_kept_by_other_values(tmp_path: Path) -> None:
    attributes = opcodes({"__setstate__": 1, "keys": 2, "_metadata": OrderedDict()})
    forge(tmp_path / "model.pth", b"}" + opcodes("a") + b"ccollections\nOrderedDict\n)R" + attributes + b"bs.")
    assert vars(read_checkpoint(tmp_path / "model.pth")["a"]) == {"_metadata": OrderedDict()}
    forge(
        tmp_path / "model.pth",
        b"}" + opcodes("a") + b"ccollections\nOrderedDict\n)R" + opcodes({"_metadata": 1}) + b"bs.",
    )
    with pytest.raises(WeightsError, match="the versions of its modules are wrong"):
        read_checkpoint(tmp_path / "model.pth")


def test_the_keys_of_an_old_file_are_not_compared_for_ever(tmp_path: Path) -> None:
    path, content = tmp_path / "model.pth", io.BytesIO()
    torch.save({}, path, _use_new_zipfile_serialization=False)
    content.write(path.read_bytes().removesuffix(pickle.dumps([], protocol=2)))
    content.write(b"\x80\2](" + doubled_tuple(40, b"\0") + doubled_tuple(40, b"\1") + b"e.")
    path.write_bytes(content.getvalue())
    with pytest.raises(WeightsError, match="its list of tensors is wrong"):
        read_checkpoint(path)


def test_members_of_an_archive_may_have_other_headers(tmp_path: Path) -> None:
    path, content = tmp_path / "model.pth", {"model": {"weight": torch.arange(8.0)}}
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("byteorder")}
    with path.open("wb") as file:
        file.write(b"PK\3\4 bytes before the archive")
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = b"comment" * 100
            for name, data in members.items():
                with archive.open(name, "w", force_zip64=True) as member:
                    member.write(data)
    assert_equal(read_checkpoint(path), content)
    flagged = re.sub(rb"(?s)(PK\x01\x02....).", lambda found: found[1] + b"\1", path.read_bytes())  # as encrypted
    path.write_bytes(flagged)
    with pytest.raises(WeightsError, match="not a PyTorch checkpoint, or a damaged one"):
        read_checkpoint(path)


def test_an_array_is_filled_once(tmp_path: Path) -> None:
    array = np.arange(4.0)
    forge(tmp_path / "model.pth", pickle.dumps({"model": {}, "a": array}, protocol=2)[2:])
    read = read_checkpoint(tmp_path / "model.pth")["a"]
    assert type(read) is np.ndarray and np.array_equal(read, array) and read.flags.owndata
    filled, state = stand_ins.Array(), (1, (1,), stand_ins.Dtype("f8"), False, bytes(8))
    filled.build(state)
    with pytest.raises(stand_ins.ForeignTypeError):
        filled.build(state)


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


# --- safetensors


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file: types, shapes and places of tensors, and metadata."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[start:])


TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "flag": torch.tensor([True, False]), "none": torch.zeros(0, 2)}


def test_a_checksum_finds_what_changed_in_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(TENSORS, path, {"classes": ["a"]})
    content = path.read_bytes()
    assert_equal(read_checkpoint(path), {"classes": ["a"], "model": dict(sorted(TENSORS.items()))})
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(WeightsError, match="its checksum is wrong"):
        read_checkpoint(path)
    path.write_bytes(content)
    rewrite_header(path, lambda header: header["weight"].update(dtype="I32"))
    with pytest.raises(WeightsError, match="its checksum is wrong"):
        read_checkpoint(path)


def test_safetensors_files_of_others_are_read_into_memory_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    read = read_checkpoint(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_equal(read, dict(sorted(TENSORS.items())))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["weight"].update(shape=[2, 2**62]),
        lambda header: header["flag"].update(data_offsets=header["weight"]["data_offsets"]),
        lambda header: header["weight"].update(shape=[6] + [1] * 64),
        lambda header: header["weight"].update(dtype="BOOL", shape=[24]),
        lambda header: header.update(other=header["weight"]),
        lambda header: header.update({f"layers.{'9' * 5000}.weight": header.pop("weight")}),
        lambda header: header.update(__metadata__={"spatial_mamba": "[" * 500 + "]" * 500}),
        lambda header: header.update(__metadata__={"spatial_mamba": "[1]"}),
    ],
    ids=["large", "overlapping", "dimensions", "boolean", "twice", "long name", "nested", "list"],
)
def test_headers_that_are_wrong_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    rewrite_header(path, change)
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a safetensors file, or a damaged one"):
        read_checkpoint(path)


@pytest.mark.parametrize("size", [2**63, 10**8, 16], ids=["impossible", "huge", "longer than the file"])
def test_a_safetensors_file_cannot_ask_for_memory(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(WeightsError, match="not a safetensors file, or a damaged one"):
        read_checkpoint(path)
