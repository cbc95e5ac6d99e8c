// The team interpreter on host threads: against plain loops, and equal bytes whatever the team is.
#include <cmath>
#include <cstring>
#include <vector>

#include "../team/fragments.h"
#include "../team/half.h"
#include "../team/host_team.h"
#include "../team/lower.h"
#include "../team/warp.h"
#include "check.h"
#include "random_program.h"

using namespace fastgen;
using namespace fastgen::team;
using fastgen::test::Naive;
using fastgen::test::RandomProgram;

namespace {

struct Shape {
  int ranks = 1, warps = 1, teams = 1, shared_bytes = 48 << 10;
};

struct Call {
  uint64_t first = 0;
  int32_t slots = 5;
  const std::vector<float>* given = nullptr;  // of samples 0, 1, ...; all of them known
};

struct Result {
  std::vector<float> out, params;
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
  bool operator==(const Result& o) const { return same(out, o.out) && same(params, o.params); }
};

std::vector<float> conditioning(int64_t floats, const Call& c) {
  std::vector<float> cond(c.slots * floats);
  for (int64_t i = 0; i < static_cast<int64_t>(cond.size()); ++i) cond[i] = std::sin(0.37f * (i + c.first * floats));
  return cond;
}

Result empty_result(const Program& p, const Call& c) {
  return {std::vector<float>(c.slots * int64_t{p.rows} * p.cols * p.head.channels, -7.0f),
          std::vector<float>(c.slots * p.steps * p.head.params)};
}

Result naive(const Program& p, int64_t cond_floats, const Call& c) {
  Result r = empty_result(p, c);
  const std::vector<float> cond = conditioning(cond_floats, c);
  const float* conds[] = {cond.data()};
  const std::vector<uint8_t> mask(r.out.size(), 1);
  RunArgs args = {};
  args.slots = c.slots, args.seed = 0x123456789abcdefull, args.first = c.first, args.temperature = 0.9f;
  args.cond = conds, args.out = r.out.data(), args.params = r.params.data();
  if (c.given) args.given = c.given->data() + c.first * r.out.size() / c.slots, args.mask = mask.data();
  Naive(p, args).run();
  return r;
}

Result on_team(const Program& p, int64_t cond_floats, const Call& c, const Shape& shape,
               Precision precision = kFloat32) {
  const std::vector<char> block = lower(p, {precision, shape.shared_bytes});
  const Header& h = *reinterpret_cast<const Header*>(block.data());
  Result r = empty_result(p, c);
  const std::vector<float> cond = conditioning(cond_floats, c);
  const float* conds[] = {cond.data()};
  const std::vector<uint8_t> mask(r.out.size(), 1);
  std::vector<float> arena(c.slots * h.arena);  // zeros: random programs read what nobody wrote
  Launch a = {};
  a.block = block.data(), a.arena = arena.data(), a.arena_stride = h.arena, a.cond = conds;
  a.out = r.out.data(), a.params = r.params.data(), a.slots = c.slots, a.temperature = 0.9f;
  a.seed = 0x123456789abcdefull, a.first = c.first, a.teams = shape.teams;
  if (c.given) a.given = c.given->data() + c.first * r.out.size() / c.slots, a.mask = mask.data();
  run_on_host(a, {shape.ranks, shape.warps});
  return r;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float d = std::fabs(a[i] - b[i]);
    worst = d <= worst ? worst : d;  // a NaN wins
  }
  return worst;
}

const Shape kShapes[] = {{1, 1}, {3, 1}, {4, 2}, {3, 2, 2}, {1, 2, 5, 200 << 10}, {4, 1, 1, 24 << 10}};

void random_programs() {
  for (int seed = 0; seed < 10; ++seed) {
    RandomProgram program(seed < 8 ? seed : 1000 + seed, seed >= 8);
    const Program& p = program.program();
    const int64_t cond = program.cond_floats();
    const Result one = on_team(p, cond, {}, kShapes[0]);
    for (const Shape& shape : kShapes)
      CHECK(on_team(p, cond, {}, shape) == one, "seed %d: team of %d x %d", seed, shape.ranks, shape.warps);
    Result parts = on_team(p, cond, {0, 2}, kShapes[2]);
    const Result rest = on_team(p, cond, {2, 3}, kShapes[1]);
    parts.out.insert(parts.out.end(), rest.out.begin(), rest.out.end());
    parts.params.insert(parts.params.end(), rest.params.begin(), rest.params.end());
    CHECK(parts == one, "seed %d: in two calls", seed);

    // Given the same values, parameters agree with plain loops; in 16 bits to their rounding.
    const Call known{1, 3, &one.out};
    const Result want = naive(p, cond, known);
    const Result got = on_team(p, cond, known, kShapes[2]);
    CHECK(Result::same(got.out, want.out), "seed %d", seed);
    CHECK(largest_difference(got.params, want.params) < 1e-4f, "seed %d: %g", seed,
          largest_difference(got.params, want.params));
    for (const Precision precision : {kBfloat16, kFloat16}) {
      const Result half = on_team(p, cond, known, kShapes[1], precision);
      CHECK(half == on_team(p, cond, known, kShapes[3], precision), "seed %d precision %d", seed, precision);
    }
  }
}

// One large product, no thresholds: 16-bit operands cost what their rounding costs.
void half_products() {
  test::Tables t;
  Program& p = t.p;
  p.rows = 1, p.cols = 2, p.steps = 2, p.row_len = p.period = 2;
  Head& h = p.head;
  h.kind = kGaussianMixture, h.channels = h.phases = 1, h.n = 20, h.params = 60;
  h.floor_log_scale = -3, h.clip_lo = -1, h.clip_hi = 1, h.enc = 1, h.table = h.start = -1, h.delay = 0;
  h.input = t.state(1, 1, 2, 1, 2, kInput);
  t.buffers.push_back({500, 1, 2, 1, 2, kCond, 0});
  const int32_t params = t.state(60, 1, 2, 1, 2);
  t.param_ptr = {0, 1}, t.step_phase = {0, 0};
  t.taps = {{params, 0, 60, 1, 1, 1, 1, 0, 0, 0, 1, 0, 2}, {1, 0, 500, 1, 1, 1, 1, 0, 0, 0, 1, 0, 2}};
  for (int i = 0; i < 64 * 500; ++i) t.weights.push_back(std::sin(0.1f * i) / 22);
  t.code = {{kStore, 0, 0, params, 0, 60, 0, 0, 0}};
  t.ops = {{1, 1, 60, 500, 0, -1, -1, -1, 0, 1, 64, 1, 1, 0, 0, 1, 2, 0}};
  t.row_items = {{0, 0, 2, 1}}, t.row_ptr = {0, 1}, t.step_ptr = {0, 0, 0}, t.step_site = {0, 1};
  const Program& program = t.program();
  const Call call{0, 3};
  const Result want = naive(program, 1000, call);
  const float tolerance[] = {1e-5f, 2e-2f, 2e-3f};
  for (const Precision precision : {kFloat32, kBfloat16, kFloat16})
    for (const Shape& shape : kShapes) {
      const float worst = largest_difference(on_team(program, 1000, call, shape, precision).params, want.params);
      CHECK(worst < tolerance[precision], "precision %d: %g", precision, worst);
      CHECK(precision == kFloat32 || worst > 1e-5f, "precision %d: %g: nothing was rounded", precision, worst);
    }
}

// A x B through the fragment maps is the matrix product; every element has one lane.
void fragments() {
  uint16_t a[16][16], b[16][8];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = to_float16(static_cast<float>((i * 7 + k * 3) % 11 - 5));
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = to_float16(static_cast<float>((k * 5 + j * 2) % 13 - 6));
  uint16_t packed[kLanes * 8], x[8 * 24];
  std::vector<int> seen_a(256), seen_c(128);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int e = 0; e < 8; ++e)
      packed[lane * 8 + e] = a[a_row(lane, e)][a_k(lane, e)], ++seen_a[a_row(lane, e) * 16 + a_k(lane, e)];
    for (int e = 0; e < 4; ++e) ++seen_c[c_row(lane, e) * 8 + c_col(lane, e)];
    // A lane's pairs are neighbours in memory: 32-bit registers hold two.
    for (int e = 0; e < 8; e += 2) CHECK(a_row(lane, e) == a_row(lane, e + 1), "lane %d", lane);
    for (int e = 0; e < 4; e += 2)
      CHECK(b_k(lane, e) + 1 == b_k(lane, e + 1) && b_k(lane, e) % 2 == 0, "lane %d", lane);
  }
  for (int n : seen_a) CHECK(n == 1, "an element of A has %d places", n);
  for (int n : seen_c) CHECK(n == 1, "an element of C has %d places", n);
  for (int j = 0; j < 8; ++j)
    for (int k = 0; k < 16; ++k) x[j * 24 + k] = b[k][j];
  Sums<1> sums;
  sums.clear();
  Weights<kFloat16> weights;
  weights.load(packed);
  multiply_step<kFloat16, 1>(sums, weights, x, 24);
  sums.each([&](int row, int column, float& sum) {
    float want = 0;
    for (int k = 0; k < 16; ++k) want += from_float16(a[row][k]) * from_float16(b[k][column]);
    CHECK(sum == want, "(%d, %d): %g, expected %g", row, column, sum, want);
  });
}

void half_floats() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float x = from_float16(h), y = from_bfloat16(h);
    if (x == x) CHECK(to_float16(x) == h, "float16 %x", h);
    if (y == y) CHECK(to_bfloat16(y) == h, "bfloat16 %x", h);
  }
  CHECK(to_float16(NAN) == 0x7fff && to_bfloat16(NAN) == 0x7fff, "NaN");
#if defined(__FLT16_MAX__)  // the compiler's own conversion
  uint32_t bits = 1;
  for (int i = 0; i < 2000000; ++i) {
    bits = bits * 1664525u + 1013904223u;
    const float x =
        i % 2 ? float_of(bits) : std::ldexp(float_of((bits & 0x7fffff) | 0x3f800000), -int(bits >> 23) % 40);
    if (x != x) continue;
    const _Float16 theirs = static_cast<_Float16>(x);
    uint16_t h;
    std::memcpy(&h, &theirs, 2);
    CHECK(to_float16(x) == h, "%.9g: %x, expected %x", x, to_float16(x), h);
    if (failures > 20) return;
  }
#endif
}

// A partner that never comes to a barrier ends in an error, not in a wait without end.
void lost_partner() {
  RandomProgram program(3);
  const Program& p = program.program();
  const std::vector<char> block = lower(p, {kFloat32, 48 << 10});
  const Header& h = *reinterpret_cast<const Header*>(block.data());
  Result r = empty_result(p, {0, 2});
  const std::vector<float> cond = conditioning(program.cond_floats(), {0, 2});
  const float* conds[] = {cond.data()};
  std::vector<float> arena(2 * h.arena);
  Launch a = {};
  a.block = block.data(), a.arena = arena.data(), a.arena_stride = h.arena, a.cond = conds, a.out = r.out.data();
  a.slots = 2, a.temperature = 1, a.teams = 1;
  bool thrown = false;
  try {
    run_on_host(a, {3, 1, 1, 50'000'000});
  } catch (const Lost&) {
    thrown = true;
  }
  CHECK(thrown, "a lost partner went unnoticed");
}

// Cancelled at once: a step is finished, and no more; the count says so.
void cancel() {
  RandomProgram program(1);
  const Program& p = program.program();
  const std::vector<char> block = lower(p, {kFloat32, 48 << 10});
  const Header& h = *reinterpret_cast<const Header*>(block.data());
  Result r = empty_result(p, {0, 2});
  const std::vector<float> cond = conditioning(program.cond_floats(), {0, 2});
  const float* conds[] = {cond.data()};
  std::vector<float> arena(2 * h.arena);
  for (const uint32_t cancel : {0u, 1u}) {
    Control control = {};
    Launch a = {};
    a.block = block.data(), a.arena = arena.data(), a.arena_stride = h.arena, a.cond = conds, a.out = r.out.data();
    a.slots = 2, a.temperature = 1, a.teams = 1, a.cancel = &cancel, a.control = &control;
    run_on_host(a, {3, 2});
    const uint32_t want = cancel ? (p.row_len == 1 ? 1 : 0) : static_cast<uint32_t>(p.steps);
    CHECK(control.done == want, "%u steps, expected %u", control.done, want);
  }
}

void too_little_shared_memory() {
  RandomProgram program(1000, true);
  bool thrown = false;
  try {
    lower(program.program(), {kFloat32, 2 << 10});
  } catch (const std::invalid_argument& error) {
    thrown = std::string(error.what()).find("shared memory") != std::string::npos;
  }
  CHECK(thrown, "no error");
}

}  // namespace

int main() {
  fragments();
  half_floats();
  half_products();
  random_programs();
  lost_partner();
  cancel();
  too_little_shared_memory();
  return report("team");
}
