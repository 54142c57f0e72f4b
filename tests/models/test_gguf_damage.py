"""GGUF files that are damaged, newer than the gguf package, or divided into parts."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import ModelError
from jaxserve.models.loading.checkpoint import GGUFCheckpoint, open_checkpoint
from jaxserve.models.loading.gguf import GGUFSource
from jaxserve.models.loading.gguf_file import read_gguf
from tests.models.golden import Golden

WHOLE = Golden("qwen2").checkpoint
Typed = tuple[Value, Any]


def read_whole() -> tuple[dict[str, Typed], dict[str, np.ndarray]]:
    """Metadata and tensors of the reference file."""
    reader = gguf.GGUFReader(WHOLE)
    metadata = {k: (f.types[0], f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    metadata.pop("general.architecture")
    return metadata, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


METADATA, TENSORS = read_whole()


def write(path: Path, metadata: dict[str, Typed] | None = None, tensors: dict[str, np.ndarray] = TENSORS) -> Path:
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, (kind, value) in (METADATA if metadata is None else metadata).items():
        writer.add_array(key, value) if kind == Value.ARRAY else writer.add_key_value(key, value, kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(folder: Path, count: int = 3, **changes: int) -> list[Path]:
    """The reference file as llama-gguf-split divides it: all metadata in the first part, some tensors in each."""
    paths = []
    for number, members in enumerate(np.array_split(sorted(TENSORS), count)):
        values = {"no": number, "count": count, "tensors.count": len(TENSORS)} | changes
        kinds = {"no": Value.UINT16, "count": Value.UINT16, "tensors.count": Value.INT32}
        parts = {f"split.{key}": (kinds[key], value) for key, value in values.items()}
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        tensors = {name: TENSORS[name] for name in map(str, members)}
        paths.append(write(path, (METADATA if number == 0 else {}) | parts, tensors))
    return paths


def use(path: Path) -> None:
    """Everything that opening and loading does with a file."""
    checkpoint = open_checkpoint(str(path))
    assert isinstance(checkpoint, GGUFCheckpoint)
    tokenizer = checkpoint.tokenizer()
    tokenizer.encode("Hello")
    checkpoint.eos_token_ids(tokenizer)
    assert isinstance(checkpoint.sampling_defaults, dict)
    source = checkpoint._source
    for name in source.names():
        assert source.shape(name)
        source.file.bytes_of(source._names[name])


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_parts_load_from_any_of_their_names(tmp_path: Path, given_part: int) -> None:
    whole, parts = GGUFSource(WHOLE), GGUFSource(split(tmp_path)[given_part])
    use(tmp_path / f"m-0000{given_part + 1}-of-00003.gguf")
    assert parts.config == whole.config
    assert parts.names() == whole.names()
    for name in whole.names():
        np.testing.assert_array_equal(parts.read(name), whole.read(name))


def test_one_part_is_a_whole_file(tmp_path: Path) -> None:
    (path,) = split(tmp_path, 1)
    assert GGUFSource(path).names() == GGUFSource(WHOLE).names()


def test_parts_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: truncated, tensor .* ends at byte"):
        read_gguf(first)
    second.unlink()
    with pytest.raises(
        ModelError, match=r"m-00001-of.*: one of 3 parts of a model; missing beside it: m-00002-of-00003"
    ):
        read_gguf(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: split\.no 2 and split\.count 3 do not fit its name"):
        read_gguf(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"one of 3 parts .* they must end in -00001-of-00003\.gguf and so on"):
        read_gguf(renamed)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    extra = {"split.no": (Value.UINT16, 1), "split.count": (Value.UINT16, 3)}
    write(second, extra, dict(sorted(TENSORS.items())[:1]))
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: another part has tensors blk\.0\.attn_k\.bias too"):
        read_gguf(first)
    write(second, extra, {})
    with pytest.raises(ModelError, match=r"the parts hold \d+ tensors, split\.tensors\.count is \d+"):
        read_gguf(first)
    with pytest.raises(ModelError, match=r"split\.count must be an integer"):
        read_gguf(write(tmp_path / "a.gguf", METADATA | {"split.count": (Value.STRING, "3")}))


def header(version: int = 3, num_tensors: int = 0, num_metadata: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_metadata) + body


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


DAMAGED = {
    "an unknown value type": (header(3, 0, 1, pair("k", 13, bytes(8))), "'k' has the unknown value type 13"),
    "an array of arrays": (header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 9, 1))), "'k' has the unknown value type 9"),
    "a key twice": (header(3, 0, 2, pair("k", 0, b"1") * 2), "it has 'k' twice"),
    "not UTF-8": (header(3, 0, 1, struct.pack("<Q", 1) + b"\xff"), "a string is not UTF-8: invalid start byte"),
    "a long string": (header(3, 0, 1, struct.pack("<Q", 2**63)), f"{2**63} more bytes should follow"),
    "many strings": (header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 8, 2**60))), f"{2**63} more bytes should follow"),
    "many numbers": (header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 4, 2**60))), f"{2**62} more bytes should follow"),
    "many keys": (header(3, 0, 2**63), "8 more bytes should follow"),
    "many tensors": (header(3, 2**63), "8 more bytes should follow"),
    "no dimensions": (header(3, 1, 0, tensor("t", ())), "tensor 't' has 0 dimensions, expected 1 to 4"),
    "many dimensions": (header(3, 1, 0, tensor("t", (1,) * 5)), "tensor 't' has 5 dimensions, expected 1 to 4"),
    "an empty dimension": (header(3, 1, 0, tensor("t", (0, 2))), r"tensor t of type F32 has shape \(2, 0\)"),
    "half a block": (header(3, 1, 0, tensor("t", (33,), Kind.Q8_0)), "whose rows should be a multiple of 32"),
    "a wrong offset": (header(3, 1, 0, tensor("t", (2,), 0, 32) + bytes(99)), "lies at offset 32, expected 0"),
    "one upon the other": (
        header(3, 2, 0, tensor("t", (2,)) + tensor("u", (2,)) + bytes(99)),
        "tensor u lies at offset 0, expected 32",
    ),
    "a tensor twice": (
        header(3, 2, 0, tensor("t", (2,)) + tensor("t", (2,), 0, 32) + bytes(99)),
        "it has tensor t twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_headers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    content, message = DAMAGED[name]
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(
        ModelError, match=rf"m\.gguf: truncated or damaged inside its header, at byte \d+ of \d+: .*{message}"
    ):
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(1), "GGUF version 1 is not supported; supported: versions 2, 3"),
        (header(4), "GGUF version 4 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF big-endian files are not supported; .* \\(little-endian\\)"),
        (b"ggjt" + bytes(60), "not a GGUF file, it starts with b'ggjt'"),
        (header(3, 1, 0, tensor("t", (2**40, 2**40)) + bytes(64)), "truncated, tensor t ends at byte"),
        (
            header(3, 1, 0, tensor("blk.0.new.weight", (2,), 99)),
            "tensor blk.0.new.weight has type number 99, which gguf",
        ),
        (
            header(3, 0, 1, pair("general.alignment", 4, struct.pack("<I", 0))),
            "general.alignment must be an integer in",
        ),
        (
            header(3, 0, 1, pair("general.alignment", 4, struct.pack("<I", 24))),
            "alignment must be a power of two, found 24",
        ),
        (header(3, 0, 1, pair("general.alignment", 8, string("32"))), "alignment must be an integer in .*, found '32'"),
    ],
)
def test_other_reasons(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=rf"m\.gguf: .*{message}"):
        read_gguf(tmp_path / "m.gguf")


CHANGES: dict[str, Typed] = {
    "qwen2.block_count": (Value.STRING, "two"),
    "qwen2.embedding_length": (Value.FLOAT32, 32.0),
    "qwen2.attention.head_count": (Value.ARRAY, [4, 4]),
    "qwen2.attention.head_count_kv": (Value.UINT32, 0),
    "qwen2.context_length": (Value.INT32, -1),
    "qwen2.rope.freq_base": (Value.STRING, "1e6"),
    "qwen2.attention.layer_norm_rms_epsilon": (Value.FLOAT32, float("nan")),
    "qwen2.rope.scaling.type": (Value.BOOL, True),
    "qwen2.expert_count": (Value.STRING, "8"),
    "tokenizer.ggml.model": (Value.UINT32, 1),
    "tokenizer.ggml.pre": (Value.ARRAY, ["qwen2"]),
    "tokenizer.ggml.tokens": (Value.ARRAY, [1, 2]),
    "tokenizer.ggml.token_type": (Value.ARRAY, [1, 2]),
    "tokenizer.ggml.merges": (Value.ARRAY, ["t h", "zz yy"]),
    "tokenizer.ggml.add_bos_token": (Value.UINT32, 1),
    "tokenizer.ggml.bos_token_id": (Value.STRING, "1"),
    "tokenizer.ggml.eos_token_id": (Value.FLOAT32, 1.5),
    "tokenizer.chat_template": (Value.UINT32, 1),
    "general.sampling.top_k": (Value.STRING, "40"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_metadata_of_another_type_is_named(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "m.gguf", METADATA | {key: CHANGES[key]})
    with pytest.raises(ModelError) as caught:
        use(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert key in str(caught.value)


def test_tokens_that_do_not_go_together(tmp_path: Path) -> None:
    tokens = list(METADATA["tokenizer.ggml.tokens"][1])
    cases = {
        "tokens": ([*tokens[:-1], tokens[0]], f"tokens 0 and {len(tokens) - 1} are both {tokens[0]!r}"),
        "token_type": ([1] * (len(tokens) + 1), f"must hold {len(tokens)} types, found {len(tokens) + 1}"),
        "merges": (["th"], "must hold pairs of tokens, found 'th'"),
    }
    for key, (value, message) in cases.items():
        path = write(tmp_path / "m.gguf", METADATA | {f"tokenizer.ggml.{key}": (Value.ARRAY, value)})
        with pytest.raises(ModelError) as caught:
            use(path)
        assert message in str(caught.value)


def test_tokens_without_a_text_have_llama_cpps_name(tmp_path: Path) -> None:
    tokens = [*METADATA["tokenizer.ggml.tokens"][1][:-2], "", "<|im_end|>"]
    changes = {"tokens": tokens, "merges": [], "token_type": [1] * len(tokens)}
    more = {f"tokenizer.ggml.{key}": (Value.ARRAY, value) for key, value in changes.items() if value}
    without = {key: value for key, value in METADATA.items() if key != "tokenizer.ggml.merges"}
    path = write(tmp_path / "m.gguf", without | more | {"tokenizer.ggml.merges": (Value.ARRAY, ["t h"])})
    if not {"t", "h", "th"} <= set(tokens):
        pytest.fail("the reference file's vocabulary has changed")
    tokenizer = open_checkpoint(str(path)).tokenizer()
    assert tokenizer.token(len(tokens) - 2) == f"[EMPTY_{len(tokens) - 2}]"
    assert tokenizer.special_token_ids == {len(tokens) - 1}, "what ends a turn is special, whatever its type says"


CONTENT = WHOLE.read_bytes()
NUM_HEADER_BYTES = min(info.start for info in read_gguf(WHOLE).tensors.values())


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.none() | st.integers(0, len(CONTENT)),
    st.dictionaries(st.integers(0, NUM_HEADER_BYTES), st.integers(0, 255), max_size=3),
    st.booleans(),
)
def test_any_damage(tmp_path: Path, kept: int | None, changes: dict[int, int], early: bool) -> None:
    """Cut off anywhere, with any bytes of the header changed: refused as such, or read."""
    content = bytearray(CONTENT)
    for at, byte in changes.items():
        content[at % 2048 if early else at] = byte  # most of the header is the vocabulary
    path = tmp_path / "m.gguf"
    path.write_bytes(content[:kept])
    with contextlib.suppress(ModelError):
        use(path)
