// Columns of an op. The linear part is a rectangle, panels x columns, cut into tiles (kernels.cpp); the vector
// program then runs column by column.
#include "columns.h"

#include <algorithm>
#include <cstring>

#include "../heads.h"

namespace fastgen {
namespace {

int64_t floor_div(int64_t a, int32_t b) {
  if (b == 1) return a;
  const int64_t q = a / b;
  return q * b > a ? q - 1 : q;
}

// Columns whose scratch stays in a core's second-level cache.
int64_t block_of(const ReadyOp& ready) {
  constexpr int64_t kFloats = 64 << 10;
  return std::clamp<int64_t>(kFloats / (ready.stride + 1), 1, Columns::kBlock);
}

}  // namespace

Columns::Columns(const Run& run) : run_(run), program_(run.tables.program()), slots_(run.args.slots) {
  x_.resize(run.tables.max_taps * kBlock);
  int64_t floats = 0;
  for (const ReadyOp& s : run.tables.ready_ops()) floats = std::max(floats, s.stride * block_of(s));
  scratch_ = Pages(sizeof(float) * floats, "scratch");
  params_.resize(program_.head.params);
  uniforms_.resize((head_uniforms(program_.head) + 3) / 4 * 4);  // they are made four at a time
  values_.resize(program_.head.channels);
  known_.resize(program_.head.channels);
}

void Columns::compute(const ReadyOp& ready, Range columns) {
  const int64_t block = block_of(ready);
  float* scratch = scratch_.as<float>();
  for (int64_t c = columns.begin; c < columns.end; c += block) {
    const Range part{c, std::min(c + block, columns.end)};
    linear(ready, part, {0, ready.panels}, scratch);
    for (int64_t i = part.begin; i < part.end; ++i) program(ready, i, scratch + (i - c) * ready.stride);
  }
}

void Columns::linear(const ReadyOp& ready, Range columns, Range panels, float* scratch) {
  if (panels.begin == panels.end || columns.begin == columns.end) return;
  start_columns(ready, columns, panels, scratch);
  if (ready.op.k == 0) return;
  point_columns(ready, columns);
  run_tiles(ready, columns.end - columns.begin, panels, scratch);
}

// Where tap `tap` of iteration site (i, j) is read in slot 0, or null when that is out of bounds.
const float* Columns::source(const Tap& t, int64_t i, int64_t j) const {
  const int64_t row = floor_div(i * t.mul_i + t.off_i, t.div_i);
  const int64_t col = floor_div(j * t.mul_j + t.off_j, t.div_j);
  if (row < t.lo_i || row >= t.hi_i || col < t.lo_j || col >= t.hi_j) return nullptr;
  return run_.places[t.buf].at(row, col, t.chan);
}

// Out-of-bounds taps read zeros rather than being skipped: the same operations whatever the neighbours in the tile.
void Columns::point_columns(const ReadyOp& ready, Range columns) {
  for (int32_t t = 0; t < ready.op.ntaps; ++t) {
    const Tap& tap = ready.taps[t];
    const int64_t step = run_.places[tap.buf].slot;
    const float** x = x_.data() + t * kBlock;
    int64_t slot = columns.begin % slots_;
    for (int64_t c = columns.begin, m = c / slots_; c < columns.end; ++m, slot = 0) {
      const float* from = source(tap, run_.sites[m].i, run_.sites[m].j);
      for (; slot < slots_ && c < columns.end; ++slot, ++c) *x++ = from ? from + slot * step : run_.zeros;
    }
  }
}

// bias + site_bias + partial: what the accumulators start from.
void Columns::start_columns(const ReadyOp& ready, Range columns, Range panels, float* scratch) {
  const Op& op = ready.op;
  const int64_t first = panels.begin * kPanel, padded = panels.end * kPanel - first;
  const int n = static_cast<int>(std::min<int64_t>(op.acc - first, padded));
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    float* acc = scratch + (c - columns.begin) * ready.stride + first;
    if (op.bias >= 0)
      std::memcpy(acc, program_.consts + op.bias + first, padded * sizeof(float));
    else
      std::memset(acc, 0, padded * sizeof(float));
    for (const int32_t buffer : {op.site_bias, op.partial}) {
      if (buffer < 0) continue;
      const Site q = run_.sites[c / slots_];
      const BufferPlace& place = run_.places[buffer];
      const float* more = place.at(int64_t{q.i} * op.up_i + op.par_i, int64_t{q.j} * op.up_j + op.par_j, 0);
      run_.kernels.add(acc, more + c % slots_ * place.slot + first, n);
    }
  }
}

void Columns::run_tiles(const ReadyOp& ready, int64_t columns, Range panels, float* scratch) {
  const Kernels& k = run_.kernels;
  const bool half = program_.weight_bits == 16;
  const int64_t step = static_cast<int64_t>(ready.op.k) * kPanel, ld = ready.stride;
  // As many panels at a time as leave registers for all columns; when columns abound, the tile that is best for that.
  int most = kMaxPanels;
  while (most > k.gemm_panels && k.max_columns[most] < columns) --most;
  const int64_t groups = (panels.end - panels.begin + most - 1) / most;
  for (int g = 0; g < groups; ++g) {
    const Range part = share(panels.end - panels.begin, groups, g);
    const int height = static_cast<int>(part.end - part.begin);
    const int64_t first = panels.begin + part.begin;
    const char* weights = ready.weights + first * step * run_.tables.weight_bytes();
    const int64_t tiles = (columns + k.max_columns[height] - 1) / k.max_columns[height];
    for (int i = 0; i < tiles; ++i) {
      const Range c = share(columns, tiles, i);
      k.tile[half][height][c.end - c.begin](weights, step, ready.nchan.data(), ready.op.ntaps, x_.data() + c.begin,
                                            kBlock, scratch + c.begin * ld + first * kPanel, ld);
    }
  }
}

void Columns::program(const ReadyOp& ready, int64_t column, float* scratch) {
  const auto operand = [&](int32_t x) { return x >= 0 ? scratch + x : program_.consts + ~x; };
  for (const Instruction& in : ready.code) {
    const Micro& m = in.micro;
    if (in.map)
      in.map(scratch + m.dst, operand(m.a), operand(m.b), operand(m.c), m.n, &m.imm0);
    else
      move(ready, m, run_.sites[column / slots_], column % slots_, scratch);
  }
}

void Columns::move(const ReadyOp& ready, const Micro& m, Site q, int64_t slot, float* scratch) {
  const auto operand = [&](int32_t x) { return x >= 0 ? scratch + x : program_.consts + ~x; };
  float* dst = scratch + m.dst;
  const size_t bytes = m.n * sizeof(float);
  switch (m.fn) {
    case kLoad: {
      const Tap& tap = program_.taps[m.a];
      if (const float* from = source(tap, q.i, q.j))
        std::memcpy(dst, from + slot * run_.places[tap.buf].slot, bytes);
      else
        std::fill_n(dst, m.n, m.imm0);
      return;
    }
    case kStore: {
      const Op& op = ready.op;
      const BufferPlace& place = run_.places[m.b];
      float* to = place.at(int64_t{q.i} * op.up_i + op.par_i, int64_t{q.j} * op.up_j + op.par_j, m.c);
      std::memcpy(to + slot * place.slot, operand(m.a), bytes);
      return;
    }
    case kEmbed: {
      const float x = *operand(m.a);
      const float row = x > 0 ? std::min(x, m.imm0 - 1) : 0;  // NaN: row 0
      std::memcpy(dst, program_.consts + m.b + static_cast<int64_t>(row) * m.n, bytes);
      return;
    }
    case kGather: {
      const float* from = operand(m.a);
      const float* index = program_.consts + m.b;
      for (int32_t k = 0; k < m.n; ++k) dst[k] = from[static_cast<int32_t>(index[k])];
      return;
    }
    case kCopy: std::memmove(dst, operand(m.a), bytes); return;
    case kFill: std::fill_n(dst, m.n, m.imm0); return;
    case kBroadcast: std::fill_n(dst, m.n, *operand(m.a)); return;
  }
}

}  // namespace fastgen
