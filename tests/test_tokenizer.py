"""The tokenizer: ids, chat prompts, and text that arrives token by token."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ModelError, RequestError
from jaxserve.models.loading import gguf_tokenizer, hf_tokenizer
from jaxserve.models.loading.gguf_file import read_gguf
from jaxserve.models.loading.gguf_tokenizer import PRE_TOKENIZERS, build
from jaxserve.models.loading.hub import resolve
from jaxserve.tokenizer import _BYTE_LEVEL, Tokenizer

METADATA = read_gguf(resolve("smollm2-135m")).metadata
TOKENIZER = gguf_tokenizer.load(METADATA)
MISSING_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
"""SmolLM2's vocabulary has no tokens for these bytes, so its own tokenizer drops the characters written with them."""
TEXTS = [
    "Hello, world!",
    "  two spaces\n\n\ttab and 3 newlines \n",
    "日本語と中文, 한국어, ไทย",
    "👩‍👩‍👧‍👦 emoji 🇯🇵 with joiners 🏳️‍🌈",
    "don't it's WE'LL 3.14159 1234567890",
    "e\u0301 is not é",
    "",
]


def stream(
    tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True, after: Sequence[int] = ()
) -> list[str]:
    """The pieces that a stream gives, the flushed rest last."""
    decoder = tokenizer.decode_stream(skip_special_tokens, after)
    return [*(decoder.step(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_roundtrip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_roundtrip_and_stream_of_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert "".join(stream(TOKENIZER, ids)) == TOKENIZER.decode(ids)
    if not MISSING_BYTES & set(text.encode()):
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_stream_of_any_tokens(ids: list[int], skip: bool) -> None:
    """Sampled tokens need not be valid text; most of the first 256 are single bytes."""
    for some in (ids, [17 + i % 256 for i in ids]):
        assert "".join(stream(TOKENIZER, some, skip)) == TOKENIZER.decode(some, skip)


def test_golden_ids() -> None:
    """Digits stand alone, a space belongs to the word after it, special tokens are found in the text."""
    ids = TOKENIZER.encode("Hello  world 12345 <|im_end|>")
    pieces = ["Hello", " ", " world", " ", "1", "2", "3", "4", "5", " ", "<|im_end|>"]
    assert [TOKENIZER.decode([i], skip_special_tokens=False) for i in ids] == pieces
    assert ids == [19556, 216, 905, 216, 33, 34, 35, 36, 37, 216, 2]


def test_special_tokens() -> None:
    assert TOKENIZER.eos_token_id == 2
    assert TOKENIZER.special_token_ids == frozenset(range(17))
    assert TOKENIZER.vocab_size == 49152
    assert TOKENIZER.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert TOKENIZER.decode([1, 81, 2]) == "a"
    assert TOKENIZER.decode([1, 81, 2], skip_special_tokens=False) == "<|im_start|>a<|im_end|>"


def test_ids_outside_of_the_vocabulary_have_no_text() -> None:
    assert TOKENIZER.decode([81, 60000]) == "a"
    assert stream(TOKENIZER, [81, 60000]) == ["a", "", ""]


def test_lone_surrogate_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="valid Unicode"):
        TOKENIZER.encode("a\ud800")


@pytest.mark.parametrize("text", ["日本語は難しい", "👩‍👩‍👧‍👦🇯🇵🏳️‍🌈", "a🤷🏽‍♀️b"])
def test_stream_never_gives_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text)
    pieces = stream(TOKENIZER, ids)
    assert len(ids) > len(text)  # characters are split over tokens
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = stream(TOKENIZER, ids[:1] if text[0] != "a" else ids[:2])
    assert cut[-1] == "\ufffd"  # only the end of the output gives up on a character
    assert not any("\ufffd" in piece for piece in cut[:-1])


def test_chat_template_gives_chatml() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<b>Hi</b> & 'bye'"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Again"},
    ]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert TOKENIZER.apply_chat_template(messages, add_generation_prompt=False) == expected
    assert TOKENIZER.apply_chat_template(messages) == expected + "<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert TOKENIZER.apply_chat_template(messages[1:2]).startswith(default + "<|im_start|>user\n<b>")


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(build(METADATA), special_tokens={"bos_token": "<s>"}, chat_template=template)


HI = [{"role": "user", "content": "héllo"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0] | tojson }}", '<s>{"role": "user", "content": "héllo"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if not tools %}\nx{% endif %}", "x"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "héllo"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_template_functions(template: str, expected: str) -> None:
    assert with_template(template).apply_chat_template(HI) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "rejected by the model's chat template"),
        ("{{ messages[0].content + 1 }}", "rejected by the model's chat template"),
        ("{{ messages.append(1) }}", "rejected by the model's chat template"),
        ("{{ ''.__class__.__mro__ }}", "rejected by the model's chat template: .*unsafe"),
    ],
)
def test_template_errors(template: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        with_template(template).apply_chat_template(HI)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message"),
        ("hi", "messages must be a list"),
        (["hi"], r"messages\[0\] must be an object, got 'hi'"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string, got None"),
        ([*HI, {"role": 1, "content": ""}], r"messages\[1\]\.role must be a string, got 1"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a string, got 5"),
        ([{"role": "user", "content": {"type": "text"}}], r"messages\[0\]\.content must be a string, got {"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content\[1\] must be {'type': 'text', 'text': \.\.\.}, got {'type': 'image_url'",
        ),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content\[0\] must be .*, got 'a'"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TOKENIZER.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one"}], "one"),
        (({"type": "text", "text": "one"}, {"type": "text", "text": "two"}), "one\ntwo"),
        ([], ""),
        (None, ""),
    ],
)
def test_contents_become_one_text(content: Any, text: str) -> None:
    messages, plain = ([{"role": "assistant", "content": c, "name": "n"}, *HI] for c in (content, text))
    assert TOKENIZER.apply_chat_template(messages) == TOKENIZER.apply_chat_template(plain)
    assert messages[0]["content"] is content, "the caller's are left as they are"
    if not text:
        assert TOKENIZER.apply_chat_template([{"role": "assistant"}, *HI]) == TOKENIZER.apply_chat_template(plain)


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = hf_tokenizer.load(tmp_path)
    assert [loaded.encode(text) for text in TEXTS] == [TOKENIZER.encode(text) for text in TEXTS]
    assert loaded.apply_chat_template(HI) == TOKENIZER.apply_chat_template(HI)
    assert (loaded.eos_token_id, loaded.special_token_ids) == (2, TOKENIZER.special_token_ids)


def test_transformers_reads_the_saved_folder_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text) for text in TEXTS] == [TOKENIZER.encode(text) for text in TEXTS]
    expected = theirs.apply_chat_template(HI, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.apply_chat_template(HI) == expected


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [TOOL]},
        {"tools": []},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"mood": "!"},
    ],
)
def test_options_of_templates_as_in_transformers(options: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=build(METADATA))
    for content in ("And so ", "on\n"):
        messages = [*HI, {"role": "assistant", "content": content}]
        # Ours ends where the assistant answers, unless told otherwise.
        wanted = {"add_generation_prompt": True, **options}
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, **wanted)
        assert with_template(TEMPLATE).apply_chat_template(messages, **options) == expected


def test_conversations_with_tools_may_have_a_template_of_their_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(build(METADATA), special_tokens={}, chat_template="plain", tool_template="tools")
    tokenizer.save(tmp_path)
    for one in (tokenizer, hf_tokenizer.load(tmp_path)):
        assert (one.apply_chat_template(HI), one.apply_chat_template(HI, tools=[TOOL])) == ("plain", "tools")
    gguf = METADATA | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    assert gguf_tokenizer.load(gguf).apply_chat_template(HI, tools=[TOOL]) == "tools"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "named"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    assert hf_tokenizer.load(tmp_path).apply_chat_template(HI, tools=[TOOL]) == "named"


def test_what_options_refuse() -> None:
    tokenizer = with_template("{{ messages[0].content | upper }}")
    with pytest.raises(RequestError, match="add_generation_prompt must be false with continue_final_message, got true"):
        tokenizer.apply_chat_template(HI, continue_final_message=True)
    with pytest.raises(RequestError, match="the model's chat template changes the last message's content"):
        tokenizer.apply_chat_template(HI, continue_final_message=True, add_generation_prompt=False)


def test_folder_layouts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json, the supported kind of tokenizer; found: none"):
        hf_tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}"}]
    config = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert hf_tokenizer.load(tmp_path).apply_chat_template(HI) == "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        hf_tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["Hi", " '", "s", " ", "1", "2", "3", "4", "\n\n", " x", "…"]),
        ("gpt-2", ["Hi", " '", "s", " 1234", "\n\n", " x", "…"]),
        ("llama-bpe", ["Hi", " '", "s", " ", "123", "4", "\n\n", " x", "…"]),
        ("qwen2", ["Hi", " '", "s", " ", "1", "2", "3", "4", "\n\n", " x", "…"]),
        ("default", ["Hi", " ", "'", "s", " ", "123", "4", "\n\n", " x", "…"]),
    ],
)
def test_pre_tokenizers(pre: str, expected: list[str]) -> None:
    text = "Hi 's 1234\n\n x…"
    backend = build(METADATA | {"tokenizer.ggml.pre": pre})
    pieces = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == expected
    assert pre in PRE_TOKENIZERS


def test_bos_and_eos_flags() -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = gguf_tokenizer.load(METADATA | flags)
    assert tokenizer.encode("a") == [1, 81, 2]
    assert tokenizer.encode("a", add_special_tokens=False) == TOKENIZER.encode("a") == [81]
    without = {k: v for k, v in METADATA.items() if k != "tokenizer.ggml.add_bos_token"}
    assert gguf_tokenizer.load(without).encode("a") == [81]
    assert gguf_tokenizer.load(without | {"tokenizer.ggml.pre": "llama-bpe"}).encode("a") == [1, 81]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.pre": "kimi"}, "tokenizer.ggml.pre 'kimi' is not supported; supported: default, gpt-2"),
        ({"tokenizer.ggml.model": "llama"}, "missing metadata: tokenizer.ggml.scores"),
    ],
)
def test_unsupported_gguf_tokenizer(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        gguf_tokenizer.load(METADATA | change)


def sentencepiece() -> Tokenizer:
    """A small vocabulary as llama.cpp writes it: unknown, control and byte tokens, then pieces by falling score."""
    pieces = ["▁", "a", "h", "e", "l", "o", "w", "r", "d", "▁h", "he", "ll", "▁he", "llo", "▁hello", "▁w", "or", "ld"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<|user|>"]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces) + 1)],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return gguf_tokenizer.load({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def test_sentencepiece() -> None:
    tokenizer = sentencepiece()

    def pieces(text: str) -> list[str]:
        return [tokenizer._backend.id_to_token(i) for i in tokenizer.encode(text)]

    assert pieces("hello world") == ["<s>", "▁hello", "▁w", "or", "ld"]
    assert pieces("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert pieces("<|user|>a</s>") == ["<s>", "<|user|>", "▁", "a", "</s>"]
    for text in ("hello world", " two  spaces ", "日本 👩‍👩‍👧 é"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(stream(tokenizer, ids)) == text
        assert not any("\ufffd" in piece for piece in stream(tokenizer, ids))


def metaspace(scheme: str) -> Tokenizer:
    """A vocabulary as newer sentencepiece conversions have it, whose decoder drops the first token's space."""
    pieces = ["<unk>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁▁"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, special_tokens={}, chat_template=None)


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "a", "b", "##a", "##b", ".", ",", "'"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["[CLS]"])
    return Tokenizer(backend, special_tokens={}, chat_template=None)


SPLIT_ANYWHERE = {
    "byte level": TOKENIZER,
    "metaspace": metaspace("always"),
    "metaspace, first": metaspace("first"),
    "word pieces": wordpiece(),
}


@pytest.mark.parametrize("name", SPLIT_ANYWHERE)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=30), st.integers(0, 30), st.booleans(), st.booleans())
def test_prompt_and_stream_are_the_decoded_whole(
    name: str, numbers: list[int], cut: int, skip: bool, single_bytes: bool
) -> None:
    tokenizer = SPLIT_ANYWHERE[name]
    single_bytes = single_bytes and name == "byte level"
    ids = [17 + number % 256 if single_bytes else number % tokenizer.vocab_size for number in numbers]
    prompt, whole = tokenizer.decode(ids[:cut], skip), tokenizer.decode(ids, skip)
    text = "".join(stream(tokenizer, ids[cut:], skip, ids[:cut]))
    if whole.startswith(prompt):
        assert prompt + text == whole
    else:  # half a character that the stream completes
        assert prompt.endswith("\ufffd")
        assert whole.endswith(text)


@settings(max_examples=200, deadline=None)
@given(st.text("helowrd 日é\u00a0👩", max_size=30), st.integers(0, 60), st.booleans())
def test_sentencepiece_continues_a_prompt(text: str, cut: int, skip: bool) -> None:
    """The first token after a prompt keeps its space, and a run of bytes may be cut anywhere."""
    tokenizer = sentencepiece()
    ids = tokenizer.encode(text)
    prompt, whole = tokenizer.decode(ids[:cut], skip), tokenizer.decode(ids, skip)
    pieces = stream(tokenizer, ids[cut:], skip, ids[:cut])
    if whole.startswith(prompt):
        assert prompt + "".join(pieces) == whole
    else:
        assert whole.endswith("".join(pieces))
        assert len("".join(pieces)) <= 1 + len(ids) - cut
    assert not any("\ufffd" in piece for piece in pieces)


def test_contexts_of_every_length() -> None:
    """More bytes, or special tokens without a text, than a stream looks at first."""
    tokenizer = sentencepiece()
    bos, hello, world = tokenizer.encode("hello world")[0], *tokenizer.encode("hello world")[1:3]
    for num_special in (1, 7, 8, 20, 100, 500):
        for skip in (True, False):
            assert "".join(stream(tokenizer, [world], skip, [hello, *[bos] * num_special])) == " w"
    for num_characters in range(1, 30):
        ids = tokenizer.encode("日" * num_characters + "本")
        assert "".join(stream(tokenizer, ids[-3:], True, ids[:-3])) == "本"
        assert "".join(stream(tokenizer, ids[-2:], True, ids[:-2])) == "本"


def test_bytes_of_tokens() -> None:
    """Those of a text's tokens are the text's, whatever its characters are divided into."""
    for text in (*TEXTS, " <|im_end|>"):
        assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode(text))) == text.encode()
    tokenizer = sentencepiece()
    for text in ("hello world", " two  spaces ", "日本 👩‍👩‍👧 é"):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == b" " + text.encode()
    assert tokenizer.token_bytes(1) == b"<s>"
    assert TOKENIZER.token_bytes(60000) == b""
    assert set(_BYTE_LEVEL) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 277)))
def test_sentencepiece_stream_survives_invalid_bytes(ids: list[int]) -> None:
    tokenizer = sentencepiece()
    assert len("".join(stream(tokenizer, ids))) >= len(tokenizer.decode(ids))


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_other_threads_run_on_meanwhile(work):
    """With an interval so long, a thread runs beside another only where that one gives Python's lock back itself."""
    text = "The quick brown fox jumps over the lazy dog. " * 20_000
    function, argument = (TOKENIZER.encode, text) if work == "encode" else (TOKENIZER.decode, [504, 282] * 400_000)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (function(argument), done.set()))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        time.sleep(0.02)
        assert not done.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_a_limit_of_tokens():
    text = "The quick brown fox"
    assert len(TOKENIZER.encode(text, max_tokens=4)) == 4
    with pytest.raises(RequestError, match=r"^prompt of 4 tokens exceeds max_model_len 3$"):
        TOKENIZER.encode(text, max_tokens=3)
    with pytest.raises(RequestError, match=r"^prompt of 810 characters, at least 10 tokens, exceeds the limit of 9$"):
        TOKENIZER.encode("x" * 810, max_tokens=9, limit_name="the limit of")


def test_what_stands_between_special_tokens() -> None:
    """Most tokenizers write them as they are."""
    assert wordpiece().spaces_special_tokens
    assert not any(t.spaces_special_tokens for t in (TOKENIZER, metaspace("always"), Tokenizer.of_bytes()))
