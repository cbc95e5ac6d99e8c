"""The noise: Random123's known answers, an independent implementation, and the native one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.errors import ShapeError
from fastgen.rng import philox, seed_of, uniforms

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
WORD = 2**32


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def slow_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The definition, in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q // WORD) ^ b ^ k, q % WORD, (p // WORD) ^ d ^ m, p % WORD
        k, m = (k + 0x9E3779B9) % WORD, (m + 0xBB67AE85) % WORD
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    k0, k1 = words(key)
    got = philox(tuple(torch.tensor([w]) for w in words(counter)), (k0, k1))
    assert tuple(int(w) for w in got) == words(answer) == slow_philox(words(counter), (k0, k1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**64 - 1),
    samples=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3),
    steps=st.lists(st.integers(0, WORD - 1), min_size=1, max_size=3),
    count=st.integers(1, 9),
)
def test_uniforms_are_named_by_seed_sample_step_and_number(
    seed: int, samples: list[int], steps: list[int], count: int
) -> None:
    got = uniforms(seed, torch.tensor(samples), torch.tensor(steps), count)
    assert got.shape == (len(samples), len(steps), count)
    for i, sample in enumerate(samples):
        for j, step in enumerate(steps):
            for k in range(count):
                counter = (k // 4, step, sample % WORD, sample // WORD)
                bits = slow_philox(counter, (seed % WORD, seed // WORD))[k % 4]
                assert got[i, j, k].item() == (bits + 0.5) / 2**32
            alone = uniforms(seed, torch.tensor([sample]), step, count)
            assert torch.equal(alone[0], got[i, j])


def test_inside_the_open_interval_and_exact() -> None:
    u = uniforms(7, torch.arange(1000), torch.arange(20), 25)
    assert u.dtype == torch.float64
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    scaled = u * 2**33
    assert torch.equal(scaled % 2, torch.ones_like(scaled))  # odd multiples of 2^-33: neither 0 nor 1
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 63 + 6 * (2 * 63) ** 0.5


def test_seed_of() -> None:
    state = torch.get_rng_state()
    assert seed_of(2**64 - 1) == 2**64 - 1
    assert seed_of(np.int64(5)) == 5
    first = torch.Generator().manual_seed(3)
    again = torch.Generator().manual_seed(3)
    drawn = [seed_of(first) for _ in range(4)]
    assert drawn == [seed_of(again) for _ in range(4)]
    assert len(set(drawn)) == 4
    assert all(0 <= seed < 2**63 for seed in drawn)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_seeds(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^seed"):
        seed_of(seed)


def test_bad_arguments() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"samples are torch.float32 \[1\]"):
        uniforms(0, one.float(), 0, 1)
    with pytest.raises(ShapeError, match=r"samples are torch.int64 \[\]"):
        uniforms(0, one[0], 0, 1)
    with pytest.raises(ShapeError, match=r"step is torch.int64 \[1, 1\]"):
        uniforms(0, one, one[None], 1)
    for step in (-1, WORD):
        with pytest.raises(ValueError, match=f"step={step}"):
            uniforms(0, one, step, 1)
        with pytest.raises(ValueError, match=f"step={step}"):
            uniforms(0, one, torch.tensor([0, step]), 1)
    with pytest.raises(ValueError, match="samples=-3"):
        uniforms(0, torch.tensor([2, -3]), 0, 1)
    with pytest.raises(ValueError, match="count=0"):
        uniforms(0, one, 0, 0)


def test_native_uniforms_are_the_same() -> None:
    native = pytest.importorskip("fastgen._native", reason="the extension is not built")
    samples = [0, 1, 2**32 - 1, 2**32, 2**63 - 1]
    for seed in (0, 1, 2**32, 2**64 - 1):
        for step in (0, 1023, 2**32 - 1):
            ours = uniforms(seed, torch.tensor(samples), step, 13).numpy()
            assert np.array_equal(native.uniforms(seed, np.array(samples, np.uint64), step, 13), ours)
