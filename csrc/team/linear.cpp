#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fragments.h"
#include "half.h"

namespace fastgen::team {
namespace {

// n rounded up to a stride that spreads the columns a warp touches at once over all banks.
int32_t bank_stride(int64_t n) { return static_cast<int32_t>(round_up(n, 32) + 4); }

// Linear row at place `local` of a slice, -1: none.
int32_t row_at(const Fibers& f, const Stage& s, int32_t slice, int32_t local) {
  const int32_t fiber = slice * s.width + local % s.width;
  return fiber < s.fibers ? f.row_of[static_cast<size_t>(fiber) * s.rows + local / s.width] : -1;
}

float weight(const Program& p, const Op& op, int32_t row, int32_t k) {
  const int64_t at = op.weights + (int64_t{row} / kPanel * op.k + k) * kPanel + row % kPanel;
  if (p.weight_bits == 32) return static_cast<const float*>(p.weights)[at];
  return from_bfloat16(static_cast<const uint16_t*>(p.weights)[at]);
}

template <class T>
void append(T value, std::vector<char>* to) {
  const size_t at = to->size();
  to->resize(at + sizeof value);
  std::memcpy(to->data() + at, &value, sizeof value);
}

}  // namespace

void shape_linear(const Fibers& f, int32_t k, Stage* s) {
  s->fibers = f.fibers, s->rows = f.rows, s->registers = f.registers;
  s->width = f.rows > 0 && kTileRows % f.rows == 0 ? kTileRows / f.rows : kTileRows;
  s->slices = (f.fibers + s->width - 1) / s->width;
  s->k = f.rows > 0 ? k : 0;
  s->ksteps = (s->k + kTileDepth - 1) / kTileDepth;
  // As many chunks as warps, for one slice to keep a whole CTA busy; but none shorter than two k-steps.
  s->chunk = std::clamp((s->ksteps + 7) / 8, 2, 32);
  s->nchunks = (s->ksteps + s->chunk - 1) / s->chunk;
}

void pack_linear(const Program& p, const Op& op, const Fibers& f, Precision precision, Stage* s,
                 std::vector<char>* weights, std::vector<float>* consts) {
  const int32_t local = s->rows * s->width;
  if (op.bias >= 0 && s->rows > 0) {
    s->bias = static_cast<int32_t>(consts->size());
    for (int32_t i = 0; i < s->slices * local; ++i) {
      const int32_t row = row_at(f, *s, i / local, i % local);
      consts->push_back(row < 0 ? 0.0f : p.consts[op.bias + row]);
    }
  }
  s->weights = round_up(static_cast<int64_t>(weights->size()), 16);
  weights->resize(s->weights);
  const int32_t depth = s->ksteps * kTileDepth;
  const auto value = [&](int32_t slice, int32_t row, int32_t k) {
    const int32_t linear = row_at(f, *s, slice, row);
    return linear < 0 || k >= s->k ? 0.0f : weight(p, op, linear, k);
  };
  for (int32_t slice = 0; slice < s->slices; ++slice)
    for (int32_t tile = 0; tile < local / kTileRows; ++tile)
      if (precision == kFloat32) {
        for (int32_t k = 0; k < depth; ++k)
          for (int32_t r = 0; r < kTileRows; ++r) append(value(slice, tile * kTileRows + r, k), weights);
      } else {
        for (int32_t i = 0; i < s->ksteps * kLanes * 8; ++i) {
          const int32_t e = i % 8, lane = i / 8 % kLanes, kstep = i / 8 / kLanes;
          const float w = value(slice, tile * kTileRows + a_row(lane, e), kstep * kTileDepth + a_k(lane, e));
          append(precision == kBfloat16 ? to_bfloat16(w) : to_float16(w), weights);
        }
      }
}

void choose_tiles(Precision precision, int32_t work_bytes, Stage* s) {
  const int64_t element = precision == kFloat32 ? 4 : 2;
  for (int32_t cols : {64, 32, 16, 8})
    for (int32_t kblock = std::max(s->nchunks, 1); kblock >= 1; kblock = cols > 8 || kblock == 1 ? 0 : (kblock + 1) / 2)
      for (int32_t group : {8, 4, 2, 1}) {
        if (group > 1 && group / 2 >= s->slices) continue;
        const int64_t points = round_up(int64_t{s->nplaces} * cols * 8, 16);
        if (points > kMaxPoints * 8 && cols > 8) continue;
        const int32_t local = s->rows * s->width;
        s->cols = cols, s->group = group, s->kblock = kblock;
        s->ldb = s->k > 0 ? kblock * s->chunk * kTileDepth + 8 : 0;
        s->lds = bank_stride(s->registers * s->width);
        s->ldp = bank_stride(group * local);
        s->at_b = static_cast<int32_t>(points);
        s->at_s = static_cast<int32_t>(s->at_b + round_up(int64_t{s->ldb} * cols * element, 16));
        s->at_p = static_cast<int32_t>(s->at_s + round_up(int64_t{s->lds} * cols * group * 4, 16));
        const int64_t partial = s->nchunks > 1 ? int64_t{kblock} * bank_stride(local) * kTileCols * 4 : 0;
        if (s->at_p + partial <= work_bytes) return;
      }
  throw std::invalid_argument("op " + std::to_string(s->op) + " (" + std::to_string(s->k) + " channels in, " +
                              std::to_string(s->registers) + " registers, " + std::to_string(s->nplaces) +
                              " places) does not fit " + std::to_string(work_bytes) + " bytes of shared memory");
}

}  // namespace fastgen::team
