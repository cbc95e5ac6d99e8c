"""What is kept between calls, from many threads and across a fork."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading

import pytest
import torch

import fastgen
from fastgen.errors import FastgenError
from fastgen.kept import Kept
from tests.oracle import at_length, by_name, compile_case, values_of


def test_the_oldest_goes_first() -> None:
    kept: Kept[int, str] = Kept(2)
    kept.put(1, "one")
    kept.put(2, "two")
    assert kept.get(1) == "one"
    kept.put(3, "three")
    assert (kept.get(1), kept.get(2), kept.get(3)) == ("one", None, "three")
    assert kept.made(2, lambda: "again") == "again" and kept.made(2, lambda: "not asked for") == "again"
    assert kept.get(1) is None
    kept.clear()
    assert kept.get(2) is None


def test_one_sampler_in_threads_at_many_lengths() -> None:
    case = by_name("wavenet-onehot")[0]
    sampler = compile_case(at_length(case, 96), threads=1)
    lengths = range(40, 52)
    wanted = {n: sampler.sample(1, seed=1, length=n) for n in lengths}
    wrong: list[object] = []

    def work(k: int) -> None:
        for r in range(30):
            n = lengths[(7 * k + r) % len(lengths)]
            try:
                if not torch.equal(sampler.sample(1, seed=1, length=n), wanted[n]):
                    wrong.append(n)
            except Exception as error:
                wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child() -> None:
    """The one-liner plans anew; a sampler of the parent says what to do."""
    case = by_name("masked-sequential")[0]
    model = case.build()
    options = dict(shape=case.shape, head=case.head, seed=1, threads=1)
    wanted = fastgen.sample(model, 2, **options)
    sampler = compile_case(case)
    child = os.fork()
    if child == 0:  # no assertion leaves it: it is pytest's copy
        code = 1
        try:
            code = 0 if torch.equal(fastgen.sample(model, 2, **options), wanted) else 2
            sampler.sample(1)
            code = 3
        except FastgenError as error:
            code = code or (0 if "compile again in the child" in str(error) else 4)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert values_of(case, sampler.sample(1)).isfinite().all()


@pytest.mark.parametrize("send", [pickle.dumps, copy.deepcopy])
def test_a_sampler_does_not_travel(send: object) -> None:
    sampler = compile_case(by_name("masked-sequential")[0])
    with pytest.raises(TypeError, match="send the module and compile it there"):
        send(sampler)  # type: ignore[operator]
