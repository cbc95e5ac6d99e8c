// The draw: parameters at a site become values, which go to the output and, encoded, to the input buffer.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../heads.h"
#include "../rng.h"
#include "columns.h"

namespace fastgen {

constexpr float kDrawn = std::numeric_limits<float>::quiet_NaN();  // "not known", to head_draw

void Columns::draw(int64_t step, int32_t site, int32_t phase, int64_t slot) {
  const Head& h = program_.head;
  const RunArgs& args = run_.args;
  const float* params = gather_params(step, site, phase, slot);
  const int32_t first = h.phases == 1 ? 0 : phase;  // the value channels this step draws
  const int32_t count = h.phases == 1 ? h.channels : 1;
  const int64_t at = (slot * program_.rows * program_.cols + site) * h.channels + first;
  const uint64_t sample = args.first + static_cast<uint64_t>(slot);
  for (size_t block = 0; block * 4 < uniforms_.size(); ++block)
    uniform_block(args.seed, sample, static_cast<uint32_t>(step), static_cast<uint32_t>(block), &uniforms_[block * 4]);
  const float* known = nullptr;
  if (args.mask) {
    for (int32_t c = 0; c < count; ++c) known_[c] = args.mask[at + c] ? args.given[at + c] : kDrawn;
    known = known_.data();
  }
  head_draw(h, params, uniforms_.data(), args.temperature, values_.data(), known);
  for (int32_t c = 0; c < count; ++c) {
    if (args.mask && args.mask[at + c]) values_[c] = args.given[at + c];  // also where a given value is NaN
    args.out[at + c] = values_[c];
    feed(site, slot, first + c, values_[c]);
  }
}

// The parameters of a step, in args.params if they are wanted.
const float* Columns::gather_params(int64_t step, int32_t site, int32_t phase, int64_t slot) {
  const Head& h = program_.head;
  const RunArgs& args = run_.args;
  float* params = params_.data();
  if (args.params) params = args.params + (slot * program_.steps + step) * h.params;
  int32_t filled = 0;
  for (int32_t t = program_.param_ptr[phase]; t < program_.param_ptr[phase + 1]; ++t) {
    const Tap& tap = program_.taps[t];
    const float* from = source(tap, site / program_.cols, site % program_.cols);
    if (from)
      std::memcpy(params + filled, from + slot * run_.places[tap.buf].slot, tap.nchan * sizeof(float));
    else
      std::fill_n(params + filled, tap.nchan, 0.0f);
    filled += tap.nchan;
  }
  return params;
}

// Writes what forward's input holds for a value.
void Columns::feed(int32_t site, int64_t slot, int32_t channel, float value) {
  const Head& h = program_.head;
  const int64_t target = int64_t{site} + h.delay;
  if (target >= static_cast<int64_t>(program_.rows) * program_.cols) return;
  const BufferPlace& place = run_.places[h.input];
  float* to = place.at(target / program_.cols, target % program_.cols, channel * h.enc) + slot * place.slot;
  if (h.table < 0) {
    *to = value;
    return;
  }
  const float last = static_cast<float>(h.kind == kBernoulli ? 1 : h.n - 1);
  const float row = value > 0 ? std::min(value, last) : 0;  // NaN: row 0
  std::memcpy(to, program_.consts + h.table + static_cast<int64_t>(row) * h.enc, h.enc * sizeof(float));
}

}  // namespace fastgen
