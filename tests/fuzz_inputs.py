"""What the fuzzer feeds to loaders: valid files of each format, and changes that fit the format.

The content of a file is bytes. An input is a dictionary of files by path, where text is the target of a symbolic link,
or a value that ``torch.save`` writes.
"""

import io
import json
import pickletools
import random
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from yacs.config import CfgNode

from spatial_mamba.classification.models import checkpoint_reader, unpickler
from spatial_mamba.classification.models.image_files import IMAGE_ENDINGS
from spatial_mamba.classification.models.safetensors_files import write_safetensors
from spatial_mamba.classification.settings import SETTINGS

try:
    from mmengine.logging import HistoryBuffer
except ImportError:  # OpenMMLab is optional
    HistoryBuffer = None

Files = dict[str, Any]
Change = Callable[[Any, random.Random], Any]

# --- Changes of bytes, of sequences of parts, and of nested values

NUMBERS = (0, 1, 2, 3, 8, 127, 128, 255, 256, 1000, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def any_number(rng: random.Random) -> bytes:
    form = rng.choice(("B", "<H", ">H", "<I", ">I", "<Q"))
    return struct.pack(form, rng.choice(NUMBERS) % 256 ** struct.calcsize(form))


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, remove, insert, repeat, overwrite or cut bytes in a few places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        length, kind = rng.choice((1, 1, 2, 4, 16, 64)), rng.randrange(11)
        if kind < 4 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind < 5:
            del data[place : place + length]
        elif kind < 6:
            data[place:place] = rng.randbytes(length)
        elif kind < 7:
            data[place:place] = data[other : other + length]
        elif kind < 10:
            number = any_number(rng)
            data[place : place + len(number)] = number
        else:
            del data[place:]
    return bytes(data)


def change_parts(parts: Sequence[bytes], rng: random.Random, words: Sequence[bytes] = ()) -> list[bytes]:
    """Replace, insert, remove, repeat, swap or damage parts of a file."""
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        place, other = rng.randrange(len(parts) + 1), rng.randrange(len(parts) + 1)
        kind = rng.randrange(8)
        if kind < 3 and words:
            parts[place : place + kind % 2] = rng.choices(words, k=rng.choice((1, 1, 3)))
        elif kind < 4:
            del parts[place : place + rng.choice((1, 1, 2, 5))]
        elif kind < 5:
            parts[place:place] = parts[other : other + rng.choice((1, 1, 5, 50))] * rng.choice((1, 1, 1, 20))
        elif max(place, other) < len(parts):
            if kind < 6:
                parts[place], parts[other] = parts[other], parts[place]
            else:
                parts[place] = change_bytes(parts[place], rng)
    return parts


def change_value(value: Any, rng: random.Random) -> Any:
    """A copy of nested containers in which one value is replaced, removed or renamed."""
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], change_value(value[place], rng), *value[place + 1 :]]
    if not isinstance(value, dict) or not value or rng.random() < 0.1:
        return rng.choice(ODD_VALUES)
    changed, key, kind = value.copy(), rng.choice(list(value)), rng.random()
    entry = changed.pop(key)
    if kind > 0.15:
        changed[key] = change_value(entry, rng)
    elif kind > 0.05:
        changed[rng.choice(("0", 0, 999, "weight", "module.", f"{key}.", None))] = entry
    return changed


def change_content(content: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = change_value(content, rng)
    return content


def either(*changes: tuple[int, Change]) -> Change:
    """One of several changes, chosen by their weights."""
    counts, kinds = zip(*changes, strict=True)
    return lambda content, rng: rng.choices(kinds, counts)[0](content, rng)


def change_file(ending: str, change: Change) -> Change:
    """Change one of the files with an ending."""

    def changed(files: Files, rng: random.Random) -> Files:
        path = rng.choice([path for path in files if path.endswith(ending)])
        return {**files, path: change(files[path], rng)}

    return changed


# --- Checkpoints

ODD_VALUES = [
    None, True, -1, 0, 3, 2**70, 0.5, float("nan"), float("inf"), "text", "", "\ud800", b"raw", [], {}, (), [[]], ["a"],
    {"a": {}}, {0: None}, np.float64("nan"), np.int64(2), np.arange(3.0), torch.float32, datetime.now(timezone.utc),
    torch.ones(()), torch.ones(0), torch.ones(1), torch.ones(3, 3), torch.ones(4, 4).mT, torch.ones(1, 1, 1, 1),
    torch.tensor([1, 2]), torch.tensor([True]), torch.tensor(float("nan")), torch.ones(2, dtype=torch.complex64),
    torch.ones(1).to(torch.float8_e4m3fn),
]  # fmt: skip


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def pack_content(content: Any) -> Files:
    return {"x.pth": saved(content)}


def checkpoints() -> list[Files]:
    """Files of ``torch.save`` with every type that is read, in all formats."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    small = {"model": model.state_dict(), "epoch": 3}
    large = small | dict(
        config=CfgNode({"A": {"B": [1, 2.5, "x"]}}), args=Namespace(a=1, p=Path("a/b")), raw=b"\0\xff", complex=1j,
        lists=defaultdict(list, a=[1]), space=SimpleNamespace(a=1), number=np.float32(2), array=np.ones((2, 3)),
        counts=Counter("aab"), names={"a", "b"}, size=torch.Size([1, 2]), device=torch.device("cuda:1"), large=2**100,
        flags=torch.tensor([True, False]), parameter=torch.nn.Parameter(torch.ones(2)), pairs=("a", ("b", None)),
        part=torch.arange(24.0).reshape(2, 3, 4)[:, 1:], when=datetime.now(timezone.utc),
    )  # fmt: skip
    if HistoryBuffer:
        large["history"] = HistoryBuffer([1.0, 2.0], [1, 1])
    wide = large | dict(wide=torch.ones(3, dtype=torch.uint16), narrow=torch.ones(3).to(torch.float8_e4m3fn))
    files = [saved(content, pickle_protocol=protocol) for content in (small, wide) for protocol in (2, 4)]
    files += [saved(content, _use_new_zipfile_serialization=False) for content in (small, large)]
    return [{"x.pth": content} for content in files]


def mmengine_checkpoints() -> list[Any]:
    runtime = {"best": np.float32(0.5), "sizes": np.arange(3), "flag": np.bool_(True)}
    hub = {"log_scalars": {"loss": HistoryBuffer([0.5, 0.25], [1, 1])}, "runtime_info": runtime}
    state = OrderedDict(torch.nn.BatchNorm2d(2).state_dict())
    return [{"meta": {"epoch": 1, "iter": 4, "seed": 7, "config": "x = 1"}, "state_dict": state, "message_hub": hub}]


def opcodes(pickle: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(pickle)]
    return [pickle[start:end] for start, end in zip(places, [*places[1:], len(pickle)], strict=True)]


def known_opcodes() -> list[bytes]:
    """All opcodes, with the names, texts and numbers that the reader knows, and some that it must refuse."""
    names = [*checkpoint_reader._Tensors().known, "os.mkdir", "builtins.eval", "torch.FloatStorage", "torch.qint8"]
    texts = (b"a", b"0", b"cpu", b"storage", b"f8", b"b1", b"<", b"latin1", b"_metadata", b"__class__", b"__setstate__")
    codes = [b"c%s\n%s\n" % tuple(part.encode() for part in name.rsplit(".", 1)) for name in names]
    codes += [b"X" + struct.pack("<I", len(text)) + text for text in texts]
    codes += [code + bytes([number]) for number in range(12) for code in (b"K", b"h", b"q")]
    codes += [*unpickler._OPCODES, *unpickler._OPCODES, b".", b"0", b"1", b"2", b"I1\n", b"\x82\1", b"P0\n", b"o", b"l"]
    codes += [b"\x8a\x08" + b"\x7f" * 8, b"J\xff\xff\xff\xff", b"ccollections\nOrderedDict\n)R}b"]
    return [*codes, b"cnumpy\ndtype\nX\2\0\0\0f8\x85R", b"cbuiltins\nset\n]\x85R"]


OPCODES = known_opcodes()


def change_pickle_in_zip(content: bytes, rng: random.Random) -> bytes:
    """Change opcodes of the pickle; the checksums are right."""
    members = unzipped(content)
    name = next(name for name in members if name.endswith(".pkl"))
    return zipped({**members, name: b"".join(change_parts(opcodes(members[name]), rng, OPCODES))})


def change_checkpoint(content: bytes, rng: random.Random) -> bytes:
    if not content.startswith(b"PK"):
        return change_bytes(content, rng)
    members = (1, change_members(change_bytes))
    return either((6, change_pickle_in_zip), members, (2, change_zip_headers), (1, change_bytes))(content, rng)


def safetensors_files() -> list[Files]:
    tensors = {"a": torch.ones(3), "b": torch.tensor([True]), "c": torch.ones(2, 2, dtype=torch.float16)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_safetensors(tensors, path, {"classes": ["a"], "config": {"A": 1}})
        return [{"x.safetensors": content} for content in (path.read_bytes(), safetensors.torch.save(tensors))]


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header; its length is mostly right."""
    start = 8 + int.from_bytes(content[:8], "little")
    words = (b'"BOOL"', b'"F64"', b'"F8_E8M0"', b'"U16"', *(b"%d" % number for number in NUMBERS))
    header = change_text(*words)(content[8:start], rng)
    size = len(header) if rng.random() < 0.95 else rng.choice(NUMBERS)
    return struct.pack("<Q", size) + header + content[start:]


# --- Archives


def zipped(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def change_zip_headers(content: bytes, rng: random.Random) -> bytes:
    """Change a number in a header, and sometimes the order of headers."""
    parts = re.split(rb"(?=PK[\x01-\x06][\x02-\x07])", content)
    place, field, number = rng.randrange(len(parts)), rng.randrange(4, 47), any_number(rng)
    parts[place] = parts[place][:field] + number + parts[place][field + len(number) :]
    return b"".join(change_parts(parts, rng) if rng.random() < 0.3 else parts)


def change_members(change: Change) -> Change:
    """Change a member of a zip archive, or its name; the checksums are right."""

    def changed(content: bytes, rng: random.Random) -> bytes:
        members = unzipped(content)
        name = rng.choice(list(members))
        data = members.pop(name)
        if rng.random() < 0.7:
            return zipped({**members, name: change(data, rng)})
        names = (f"{name}/", f"../{name}", f"/{name}", name.upper(), f"{name}\n", f"a/{name}", f".{name}")
        return zipped({**members, rng.choice(names): data})

    return changed


def tarred(members: Mapping[str, bytes]) -> bytes:
    """A tar archive of files and a symbolic link."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b/4.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../a/1.png"
        archive.addfile(link)
    return content.getvalue()[: archive.offset]


def change_tar(content: bytes, rng: random.Random) -> bytes:
    """Change fields of headers, and sometimes the order of blocks; the checksums of headers are right."""
    blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
    headers = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for number in rng.choices(headers, k=rng.choice((1, 1, 2))):
        # Fields: name, mode, size, type, target of a link, magic, start of the name.
        block, field = bytearray(blocks[number]), rng.choice((0, 100, 124, 124, 124, 156, 156, 157, 257, 345))
        words = (b"0" * 11, b"7" * 11, b"-1", b"\x80" + rng.randbytes(11), b"\xff" * 12, b"..", b"/", b"a.tar")
        word = bytes([rng.choice(b"0123567LKxgS\0")]) if field == 156 else rng.choice(words)
        block[field : field + len(word)] = word
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
        blocks[number] = bytes(block)
    return b"".join(change_parts(blocks, rng) if rng.random() < 0.3 else blocks)


# --- Images and data sets


def pictures() -> dict[str, bytes]:
    """A small image of every format and of several kinds of pixels, by file name."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    colour, grey, exif = Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0]), Image.Exif()
    exif[274] = 6  # the orientation
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    several = dict(save_all=True, append_images=[colour])
    kinds = {
        "a.png": (colour, dict(exif=exif)), "b.png": (deep, {}), "c.png": (colour.quantize(8), dict(transparency=1)),
        "d.png": (colour, several), "a.jpg": (colour, dict(exif=exif)), "b.jpg": (grey, dict(progressive=True)),
        "c.jpg": (colour.convert("CMYK"), {}), "a.tif": (colour, dict(compression="tiff_lzw")), "b.tif": (deep, {}),
        "c.tif": (grey, dict(compression="tiff_adobe_deflate")), "d.tif": (colour, dict(compression="jpeg")),
        "a.webp": (colour, dict(exif=exif)), "b.webp": (colour, several), "a.bmp": (colour.quantize(8), {}),
        "b.bmp": (colour, {}), "a.ppm": (colour, {}), "a.pgm": (deep, {}),
    }  # fmt: skip
    files = {}
    for name, (image, options) in kinds.items():
        content = io.BytesIO()
        image.save(content, Image.registered_extensions()[Path(name).suffix], **options)
        files[name] = content.getvalue()
    return files


def change_picture(content: bytes, rng: random.Random) -> bytes:
    """Change chunks of a PNG, with right checksums, segments of a JPEG, or words of 4 bytes."""
    if content.startswith(b"\x89PNG"):
        chunks, place = [], 8
        while place < len(content):
            end = place + 8 + int.from_bytes(content[place : place + 4], "big")
            chunks.append(content[place + 4 : end])
            place = end + 4
        odd = (b"tRNS\0\1", b"acTL\0\0\0\2\0\0\0\0", b"eXIfII*\0", b"zTXta\0\0", b"IEND")
        packed = [
            struct.pack(">I", max(len(chunk) - 4, 0)) + chunk + struct.pack(">I", zlib.crc32(chunk))
            for chunk in change_parts(chunks, rng, odd)
        ]
        return content[:8] + b"".join(packed)
    if content.startswith(b"\xff\xd8"):
        return b"".join(change_parts(re.split(rb"(?=\xff[\xc0-\xfe])", content), rng))
    parts = [content[start : start + 4] for start in range(0, len(content), 4)]
    return b"".join(change_parts(parts, rng, [any_number(rng)]))


def change_image(files: Files, rng: random.Random) -> Files:
    """Change the content, under any ending."""
    ((name, content),) = files.items()
    name = name if rng.random() < 0.5 else "x" + rng.choice(IMAGE_ENDINGS)
    return {name: either((2, change_picture), (3, change_bytes))(content, rng)}


def classes() -> dict[str, bytes]:
    """Three images in two class folders."""
    images = pictures()
    return {"a/1.png": images["a.png"], "a/2.jpg": images["a.jpg"], "b/c/3.webp": images["a.webp"]}


def folders() -> list[Files]:
    return [{f"train/{name}": content for name, content in classes().items()} | {"train/b/4.png": "../a/1.png"}]


def change_folder(files: Files, rng: random.Random) -> Files:
    """Rename, damage or remove a file, or replace it with a link."""
    path, kind = rng.choice(list(files)), rng.randrange(4)
    others = {name: content for name, content in files.items() if name != path}
    if kind == 0:
        names = ("\n.png", "\udcff.png", ".x.png", "x.PNG", "x.png.tar", "__MACOSX/x.png", "\x1b[31m/x.png", "f/x.txt")
        return {**others, f"{Path(path).parent}/{rng.choice(names)}": files[path]}
    if kind == 1:
        targets = (".", "..", "/", "/dev/zero", "/proc/self/mem", Path(path).name, "missing", "../a", "../../train")
        return {**others, path: rng.choice(targets)}
    if kind == 2:
        return others
    return {**others, path: change_bytes(files[path] if isinstance(files[path], bytes) else b"text", rng)}


def tars() -> list[Files]:
    """A tar, a tar of tars, and a folder of tars."""
    inner = {f"{name}.tar": tarred({f"{name}/1.png": pictures()["a.png"]}) for name in "ab"}
    return [
        {"train.tar": tarred(classes())},
        {"train.tar": tarred(inner)},
        {f"train/{name}": content for name, content in inner.items()},
    ]


def maps() -> list[Files]:
    return [{"train.zip": zipped(classes()), "train_map.txt": b"a/1.png\t0\na/2.jpg\t0\nb/c/3.webp\t1\n"}]


# --- Texts: configs, records, lists of images, headers of safetensors files

TOKEN = re.compile(rb"[\w.+]+|\s+|.", re.DOTALL)
ODD_TEXTS = [
    b"-1", b"0", b"1e999", b"-.inf", b".nan", b"NaN", b"null", b"~", b"true", b"yes", b"9" * 30, b"9" * 5000, b"0x_",
    b"1:2", b"\xff", b"\0", b"\xed\xb2\x80", b'"\\ud800"', b"'", b'"', b"&a", b"*a", b"&a [*a]", b"!!bool", b"!!binary",
    b"!!set", b"!!timestamp", b"<<:", b"? ", b"- ", b"[", b"]", b"{", b"}", b"[" * 3000, b"{a: " * 3000, b"|", b">",
    b"#", b"%YAML 9.9", b"---", b"\n", b"\t", b"\r", b"\xe2\x80\xa8", b",", b": ", b"..", b"/dev/zero",
    b"!!python/object/apply:os.mkdir [harm]",
]  # fmt: skip
KEYS = [word.encode() for setting in SETTINGS for word in (setting.key, *setting.key.split("."))]


def change_text(*words: bytes) -> Change:
    return lambda content, rng: b"".join(change_parts(TOKEN.findall(content), rng, [*ODD_TEXTS, *words]))


def configs() -> list[Files]:
    texts = (
        b"BASE: []\nMODEL: {TYPE: spatial_mamba, NAME: tiny, DROP_PATH_RATE: 0.2, DDP: torch}\n"
        b"TRAIN: {EPOCHS: 300, MESA: 1.0}\n",
        b"MODEL:\n  SPATIALMAMBA: {EMBED_DIM: 64, DEPTHS: [2, 4], D_STATE: 1, MLP_RATIO: 4.0, DT_INIT: 'random'}\n"
        b"TAG: 2026-11-26\nTRAIN:\n  OPTIMIZER: &a {BETAS: [0.9, 0.99]}\nAUG: {CUTMIX_MINMAX: null, MESA: -1}\n",
    )
    return [{"x.yaml": text} for text in texts]


def records() -> list[Files]:
    lines = ({"epoch": epoch, "train_loss": 0.5, "val_acc1": None if epoch else 1, "lr": 1e-3} for epoch in range(3))
    return [{"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}]
