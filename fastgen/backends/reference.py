"""The reference executor: interprets a packed program in torch, op by op. It is the specification of csrc/plan.h."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastgen import rng
from fastgen.backends.base import CompiledExecutor, Setting
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.request import Request
from fastgen.errors import Cancelled
from fastgen.graph.functions import REDUCE, arity, pointwise
from fastgen.program import records as R
from fastgen.program.functions import function_names
from fastgen.program.programs import Programs


class Machine:
    """One run of a program: buffers [slots, ring_rows, ring_cols, C], poisoned with NaN."""

    def __init__(
        self, program: R.Program, slots: int, cond: list[Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.p, self.slots, self.device, self.dtype = program, slots, device, dtype
        self.consts = torch.from_numpy(program.consts).to(device, dtype)
        if program.weights.dtype == np.uint16:
            blob = torch.from_numpy(program.weights.view(np.int16)).view(torch.bfloat16)
        else:
            blob = torch.from_numpy(program.weights)
        self.weights = blob.to(device, dtype)
        self.buffers: list[Tensor] = []
        for b in program.buffers:
            shape = (slots, int(b["ring_rows"]), int(b["ring_cols"]), int(b["channels"]))
            if b["kind"] == R.COND:
                self.buffers.append(cond[int(b["offset"])].to(device, dtype).view(shape))
            elif b["kind"] == R.CONST:
                start, n = int(b["offset"]), shape[1] * shape[2] * shape[3]
                self.buffers.append(self.consts[start : start + n].view(1, *shape[1:]).expand(shape))
            else:
                self.buffers.append(torch.full(shape, float("nan"), device=device, dtype=dtype))
        head = program.head
        if head["start"] >= 0:
            width = int(head["channels"] * head["enc"])
            start = int(head["start"])
            self.buffers[int(head["input"])][:, 0, 0, :width] = self.consts[start : start + width]

    def read(self, tap: Any, qi: Tensor, qj: Tensor, fill: float = 0.0) -> Tensor:
        """[slots, sites, nchan] of one tap at iteration sites (qi, qj)."""
        b = self.p.buffers[int(tap["buf"])]
        si = torch.div(qi * int(tap["mul_i"]) + int(tap["off_i"]), int(tap["div_i"]), rounding_mode="floor")
        sj = torch.div(qj * int(tap["mul_j"]) + int(tap["off_j"]), int(tap["div_j"]), rounding_mode="floor")
        ok = (si >= int(tap["lo_i"])) & (si < int(tap["hi_i"])) & (sj >= int(tap["lo_j"])) & (sj < int(tap["hi_j"]))
        chan = slice(int(tap["chan"]), int(tap["chan"]) + int(tap["nchan"]))
        value = self.buffers[int(tap["buf"])][:, si % int(b["ring_rows"]), sj % int(b["ring_cols"]), chan]
        return torch.where(ok[None, :, None], value, torch.full((), fill, device=self.device, dtype=self.dtype))

    def op(self, op: Any, qi: Tensor, qj: Tensor) -> None:
        """Runs one op at iteration sites."""
        di, dj = qi * int(op["up_i"]) + int(op["par_i"]), qj * int(op["up_j"]) + int(op["par_j"])
        scratch = torch.full(
            (self.slots, len(qi), int(op["scratch"])), float("nan"), device=self.device, dtype=self.dtype
        )
        acc = int(op["acc"])
        if acc:
            scratch[..., :acc] = self._linear(op, qi, qj, di, dj)
        for m in self.p.code[int(op["code0"]) : int(op["code0"]) + int(op["ncode"])]:
            self._micro(m, scratch, qi, qj, di, dj)

    def _linear(self, op: Any, qi: Tensor, qj: Tensor, di: Tensor, dj: Tensor) -> Tensor:
        acc, k = int(op["acc"]), int(op["k"])
        total = torch.zeros(self.slots, len(qi), acc, device=self.device, dtype=self.dtype)
        if op["bias"] >= 0:
            total = total + self.consts[int(op["bias"]) : int(op["bias"]) + acc]
        for buf in (int(op["site_bias"]), int(op["partial"])):
            if buf >= 0:
                b = self.p.buffers[buf]
                total = total + self.buffers[buf][:, di % int(b["ring_rows"]), dj % int(b["ring_cols"])]
        if not k:
            return total
        panels = -(-acc // R.PANEL)
        w = self.weights[int(op["weights"]) : int(op["weights"]) + panels * k * R.PANEL].view(panels, k, R.PANEL)
        dense = w.transpose(0, 1).reshape(k, panels * R.PANEL)[:, :acc]
        taps = self.p.taps[int(op["tap0"]) : int(op["tap0"]) + int(op["ntaps"])]
        return total + torch.cat([self.read(t, qi, qj) for t in taps], -1) @ dense

    def _micro(self, m: Any, scratch: Tensor, qi: Tensor, qj: Tensor, di: Tensor, dj: Tensor) -> None:
        fn, n, dst = function_names()[int(m["fn"])], int(m["n"]), int(m["dst"])
        imm = (float(m["imm0"]), float(m["imm1"]), float(m["imm2"]))

        def at(x: Any, count: int) -> Tensor:
            x = int(x)
            return (
                scratch[..., x : x + count]
                if x >= 0
                else self.consts[~x : ~x + count].expand(*scratch.shape[:2], count)
            )

        if fn == "load":
            scratch[..., dst : dst + n] = self.read(self.p.taps[int(m["a"])], qi, qj, imm[0])
        elif fn == "store":
            b = self.p.buffers[int(m["b"])]
            chan = slice(int(m["c"]), int(m["c"]) + n)
            self.buffers[int(m["b"])][:, di % int(b["ring_rows"]), dj % int(b["ring_cols"]), chan] = at(m["a"], n)
        elif fn == "embed":
            row = at(m["a"], 1)[..., 0].nan_to_num(0).long().clamp(0, int(imm[0]) - 1)
            table = self.consts[int(m["b"]) : int(m["b"]) + int(imm[0]) * n].view(-1, n)
            scratch[..., dst : dst + n] = table[row]
        elif fn == "gather":
            index = self.consts[int(m["b"]) : int(m["b"]) + n].long()
            scratch[..., dst : dst + n] = scratch[..., int(m["a"]) + index]
        elif fn == "fill":
            scratch[..., dst : dst + n] = imm[0]
        elif fn == "broadcast":
            scratch[..., dst : dst + n] = at(m["a"], 1).expand(*scratch.shape[:2], n)
        elif fn in REDUCE:
            scratch[..., dst] = REDUCE[fn](at(m["a"], n))
        else:
            operands = [at(m[k], n) for k in "abc"[: arity(fn)]]
            scratch[..., dst : dst + n] = pointwise(fn, operands, imm).to(self.dtype)

    def items(self, items: Any, periods: int) -> None:
        """Runs schedule items, shifted by whole periods."""
        for item in items:
            op = self.p.ops[int(item["op"])]
            q = int(item["q0"]) + torch.arange(int(item["count"])) * int(item["qstep"]) + int(op["advance"]) * periods
            q = q[(q >= 0) & (q < int(op["q_rows"]) * int(op["q_cols"]))]
            if len(q):
                qi, qj = q // int(op["q_cols"]), q % int(op["q_cols"])
                self.op(op, qi.to(self.device), qj.to(self.device))


class ReferenceExecutor(CompiledExecutor):
    """Any torch device; float64 where asked for."""

    name = "reference"

    def __init__(
        self,
        programs: Programs,
        conditioning: Conditioning,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.programs, self.conditioning, self.dtype, self.weight_dtype = programs, conditioning, dtype, weight_dtype
        self.spec = programs.plan.spec
        self.device = device or torch.device("cpu")

    @classmethod
    def make(cls, setting: Setting) -> Self:
        """See Executor."""
        return cls(setting.programs, setting.conditioning, weight_dtype=setting.dtype)

    @property
    def weights_in(self) -> torch.dtype:
        """See CompiledExecutor."""
        return self.weight_dtype

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """See Executor."""
        p = self.programs(request.length, self.weight_dtype)
        cond = self.conditioning.sources(p, request)
        with torch.no_grad():
            machine = Machine(p, request.slots, cond, self.device, self.dtype)
            return self._loop(p, machine, request)

    def _loop(self, p: R.Program, m: Machine, r: Request) -> tuple[Tensor, Tensor | None]:
        head, spec = self.spec.head, self.spec
        channels, phases = spec.channels, spec.phases
        out = torch.zeros(r.slots, p.rows * p.cols, channels, dtype=torch.float32) if r.out is None else r.out.zero_()
        params = torch.zeros(r.slots, p.steps, int(p.head["params"]), dtype=torch.float32) if r.want_params else None
        samples = torch.arange(r.slots) + r.first
        for t in range(p.steps):
            slot, periods = t % p.period, t // p.period
            if t % p.row_len == 0:
                row = slot // p.row_len
                m.items(p.row_items[p.row_ptr[row] : p.row_ptr[row + 1]], periods)
                if r.progress is not None and r.progress(t) is False:
                    raise Cancelled
            m.items(p.step_items[p.step_ptr[slot] : p.step_ptr[slot + 1]], periods)
            site, phase = int(p.step_site[slot]) + periods * (p.period // phases), int(p.step_phase[slot])
            theta = self._params(m, site, phase)
            if params is not None:
                params[:, t] = theta.cpu().float()
            u = rng.uniforms(r.seed, samples, t, head.num_uniforms(channels))
            which = slice(0, channels) if head.at_once else slice(phase, phase + 1)
            value = head.draw(theta.cpu(), u, r.temperature, r.known(site, which))
            out[:, site, which] = value
            self._write(m, site, which, value)
        if r.progress is not None and r.progress(p.steps) is False:
            raise Cancelled
        return out, params

    def _params(self, m: Machine, site: int, phase: int) -> Tensor:
        qi, qj = (torch.tensor([k], device=m.device) for k in divmod(site, m.p.cols))
        taps = m.p.taps[int(m.p.param_ptr[phase]) : int(m.p.param_ptr[phase + 1])]
        return torch.cat([m.read(tap, qi, qj)[:, 0] for tap in taps], -1)

    def _write(self, m: Machine, site: int, which: slice, value: Tensor) -> None:
        """Writes the encoded value to the input buffer."""
        p, spec = m.p, self.spec
        target = site + int(p.head["delay"])
        if target >= p.rows * p.cols:
            return
        buf = int(p.head["input"])
        b = p.buffers[buf]
        i, j = target // p.cols, target % p.cols
        enc = spec.head.enc
        chan = slice(which.start * enc, which.stop * enc)
        code = spec.head.encode(value).to(m.device, m.dtype)
        m.buffers[buf][:, i % int(b["ring_rows"]), j % int(b["ring_cols"]), chan] = code
