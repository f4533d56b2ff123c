"""Prefixes by what they are: the hash chain, the values' envelope, held blocks, and what a fetch is worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm.errors import InvalidRequestError
from lenvm.scoring import BlockLayout
from lenvm_service.prefix_cache import (
    BlockCache,
    ChainBlock,
    ChainRoot,
    Codec,
    CodecError,
    SessionRecord,
    TransferCosts,
)
from lenvm_service.prefix_cache.connect import check_url

SECRET = b"0123456789abcdef"
RNG = np.random.default_rng(0)
LAYOUT = BlockLayout("torch", "float32", (2, 2, 1, 4, 8))
ROOT, KEY = b"r" * 32, b"k" * 32


def root(**changes: Any) -> ChainRoot:
    given_ = {"model_sha": "m", "layout": "l", "block_tokens": 4, "tenant": "", "handle_secret": SECRET}
    return ChainRoot(**{**given_, **changes})


# -- the chain ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=11), max_size=6))
def test_a_prefix_is_the_same_however_it_arrives(parts: list[list[int]]) -> None:
    chain = root().empty()
    for part in parts:
        chain = chain.extend(part)
    whole = root().extend([token for part in parts for token in part])
    assert chain.blocks == whole.blocks
    assert chain.handle == whole.handle
    assert chain.length == sum(map(len, parts))
    assert np.frombuffer(chain.packed, dtype="<u4").tolist() == [token for part in parts for token in part]


def test_a_key_says_everything_that_a_state_depends_on() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    chain = root().extend(tokens)
    assert [len(block.tokens) for block in chain.blocks] == [16, 16]
    assert (len(chain.tail), chain.usable) == (4, 2)
    assert root().extend(tokens[:8]).usable == 1  # the last token is computed: its state's value is wanted
    others = [
        root().extend([0, *tokens[1:]]),  # an early token changes every later key
        root(model_sha="other").extend(tokens),
        root(layout="other").extend(tokens),
        root(tenant="other").extend(tokens),
        root(secret=SECRET).extend(tokens),
    ]
    for other in others:
        assert not {block.key for block in other.blocks} & {block.key for block in chain.blocks}
        assert other.handle != chain.handle
    assert root().extend(tokens[:8]).blocks == chain.blocks
    other = root(handle_secret=b"another-secret--").extend(tokens)
    assert other.blocks == chain.blocks
    assert other.handle != chain.handle


# -- the codec ---------------------------------------------------------------------------------------------------------


def block() -> np.ndarray[Any, Any]:
    return RNG.standard_normal(LAYOUT.shape).astype(np.float32).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("secret", [b"", SECRET])
def test_values_come_back_bit_by_bit(secret: bytes) -> None:
    codec = Codec(LAYOUT, num_bins=3, secret=secret)
    wanted = block()
    value = codec.pack_block(ROOT, KEY, wanted)
    assert len(value) == codec.block_bytes
    assert codec.unpack_block(ROOT, KEY, value).tobytes() == wanted.tobytes()
    record = SessionRecord(np.array([5, 7, 70_000], "<u4").tobytes(), -1.25, np.array([-1.0, -2.0, -math.inf]))
    again = codec.unpack_session(ROOT, b"s-1", codec.pack_session(ROOT, b"s-1", record))
    assert again.token_ids == [5, 7, 70_000]
    assert again.logit == -1.25
    assert again.bin_logprobs is not None
    assert record.bin_logprobs is not None
    assert again.bin_logprobs.tolist() == record.bin_logprobs.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_int8_is_a_quarter_and_close(dtype: str) -> None:
    layout = BlockLayout("torch", dtype, LAYOUT.shape)
    codec = Codec(layout, num_bins=0, payload="int8")
    numbers = RNG.standard_normal(layout.shape).astype(np.float32) * 3
    if dtype == "bfloat16":
        raw = (numbers.reshape(-1).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    else:
        raw = numbers.astype(dtype).reshape(-1).view(np.uint8)
    value = codec.pack_block(ROOT, KEY, raw)
    assert len(value) == codec.block_bytes
    assert len(value) < Codec(layout, num_bins=0).block_bytes or dtype != "float32"
    back = codec.unpack_block(ROOT, KEY, value)
    if dtype == "bfloat16":
        found = (back.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        found = back.view(dtype).astype(np.float32)
    scale = np.abs(numbers).max(-1, keepdims=True) / 127
    assert (np.abs(found.reshape(layout.shape) - numbers) <= 0.51 * scale + 0.01 * np.abs(numbers)).all()
    # A codec of the other form reads it too: what a value is, it says itself.
    assert Codec(layout, num_bins=0).unpack_block(ROOT, KEY, value).tobytes() == back.tobytes()


@pytest.mark.parametrize("secret", [b"", SECRET])
def test_no_changed_byte_goes_unnoticed(secret: bytes) -> None:
    codec = Codec(LAYOUT, num_bins=3, secret=secret)
    value = bytes(codec.pack_block(ROOT, KEY, block()))
    for at in range(len(value)):
        for change in (1, 0x80):
            wrong = bytearray(value)
            wrong[at] ^= change
            with pytest.raises(CodecError):
                codec.unpack_block(ROOT, KEY, bytes(wrong))
    for wrong_size in (value[:-1], value + b"x", value[:40], b"", b"x" * len(value)):
        with pytest.raises(CodecError):
            codec.unpack_block(ROOT, KEY, wrong_size)


def test_a_value_of_another_key_model_kind_or_secret_is_refused() -> None:
    codec = Codec(LAYOUT, num_bins=3, secret=SECRET)
    value = bytes(codec.pack_block(ROOT, KEY, block()))
    session = codec.pack_session(ROOT, KEY, SessionRecord(bytes(4), 0.0, np.zeros(3)))
    with pytest.raises(CodecError, match="another"):
        codec.unpack_block(ROOT, b"x" * 32, value)
    with pytest.raises(CodecError, match="another"):
        codec.unpack_block(b"x" * 32, KEY, value)
    with pytest.raises(CodecError, match="no value of ours"):
        codec.unpack_block(ROOT, KEY, session)
    for other in (b"", b"another-secret--"):  # a forger can do everything but know the secret
        with pytest.raises(CodecError, match="changed"):
            codec.unpack_block(ROOT, KEY, Codec(LAYOUT, num_bins=3, secret=other).pack_block(ROOT, KEY, block()))
    wide = Codec(LAYOUT, num_bins=4, secret=SECRET)
    with pytest.raises(CodecError, match="size"):
        wide.unpack_session(ROOT, KEY, codec.pack_session(ROOT, KEY, SessionRecord(b"", 0.0, np.zeros(3))))
    nan = codec.pack_session(ROOT, KEY, SessionRecord(bytes(4), math.nan, np.zeros(3)))
    with pytest.raises(CodecError, match="none"):
        codec.unpack_session(ROOT, KEY, nan)
    with pytest.raises(ValueError, match="bytes"):
        codec.pack_block(ROOT, KEY, block()[:-4])


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_whatever_bytes_there_are_only_a_codec_error_comes(data: bytes, ours: bool) -> None:
    codec = Codec(LAYOUT, num_bins=3)
    head = codec.pack_session(ROOT, KEY, SessionRecord(bytes(8), 0.0, np.zeros(3)))[:78] if ours else b""
    with pytest.raises(CodecError):
        codec.unpack_block(ROOT, KEY, head + data)
    with pytest.raises(CodecError):
        codec.unpack_session(ROOT, KEY, head + data)


# -- held blocks -------------------------------------------------------------------------------------------------------


def blocks(*names: str) -> list[ChainBlock]:
    return [ChainBlock(name.encode(), b"") for name in names]


def test_children_go_before_their_parents() -> None:
    cache = BlockCache()
    held: Any = [f"block {n}" for n in range(3)]
    cache.put(blocks("a", "b", "c"), held)
    cache.put(blocks("x"), ["other"])  # type: ignore[list-item]
    assert cache.match(blocks("a", "b", "q")) == held[:2]
    assert cache.match(blocks("q", "a")) == []
    assert b"c" in cache
    order = []
    while len(cache):
        order.append(next(iter(cache._blocks)).decode())
        assert cache.evict()
    assert order == ["c", "x", "b", "a"]
    assert not cache.evict()
    assert cache.oldest is None


# -- costs -------------------------------------------------------------------------------------------------------------


def test_what_a_fetch_is_worth() -> None:
    costs = TransferCosts(32, 1_000_000)
    assert not costs.worth(5)
    assert math.isnan(costs.break_even_tokens)
    costs.computed(1000, 1.0)  # 32 ms a block
    assert not costs.worth(5)  # nothing is known of Redis
    costs.probed(0.004)
    costs.fetched(100_000_000, 1.0)  # 10 ms a block
    # 8 ms of round trips are saved back by 22 ms a block: from 12 tokens on.
    assert costs.break_even_tokens == pytest.approx(8 / (22 / 32))
    assert costs.worth(1)
    costs.computed(10**9, 1.0)
    for _ in range(60):
        costs.computed(10**9, 1.0)
    assert costs.break_even_tokens == math.inf
    assert not costs.worth(1000)
    assert not costs.worth(0)
    costs.forget_transfer()
    assert math.isnan(costs.break_even_tokens)


def test_numbers_alone_are_asked_for_where_computing_takes_longer() -> None:
    costs = TransferCosts(32, 1)
    assert not costs.worth_asking(100)
    costs.computed(1000, 1.0)
    costs.probed(0.001)
    assert costs.worth_asking(3)
    assert not costs.worth_asking(2)


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "rediss://user:secret@host:6380",
        "unix:///tmp/redis.sock",
        "redis+sentinel://a:26379,b:26379/service/1",
        "redis+cluster://user:secret@a:7000,b:7001",
    ],
)
def test_urls_that_are_some(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://host",
        "redis://",
        "unix://",
        "redis://host:x",
        "redis+sentinel://a:1",
        "redis+cluster://",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="no URL of a Redis"):
        check_url(url)
