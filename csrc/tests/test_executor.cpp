// The executor against plain loops: equal bytes with fused multiply-add, for every thread count and grouping of slots.
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "../cpu/executor.h"
#include "check.h"
#include "random_program.h"

using namespace fastgen;
using namespace fastgen::test;

namespace {

struct Result {
  std::vector<float> out, params;
  bool operator==(const Result& o) const { return same(out, o.out) && same(params, o.params); }
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

struct Call {
  uint64_t first = 0;
  int32_t slots = 1;
  const std::vector<float>* given = nullptr;  // of samples 0, 1, ...
  const std::vector<uint8_t>* mask = nullptr;
};

// run(args) for samples [first, first + slots) with conditioning that depends on the sample alone.
template <class Run>
Result call(const Program& p, int64_t cond_floats, const Call& c, Run run) {
  const int64_t values = int64_t{p.rows} * p.cols * p.head.channels;
  Result r{std::vector<float>(c.slots * values), std::vector<float>(c.slots * p.steps * p.head.params)};
  std::vector<float> cond(c.slots * cond_floats);
  for (int64_t i = 0; i < static_cast<int64_t>(cond.size()); ++i)
    cond[i] = std::sin(0.37f * (i + c.first * cond_floats));
  const float* conds[] = {cond.data()};
  RunArgs args = {};
  args.slots = c.slots, args.seed = 0x123456789abcdefull, args.first = c.first, args.temperature = 0.9f;
  args.cond = conds, args.out = r.out.data(), args.params = r.params.data();
  if (c.mask) args.given = c.given->data() + c.first * values, args.mask = c.mask->data() + c.first * values;
  run(args);
  return r;
}

Result execute(Executor& e, int64_t cond_floats, const Call& c) {
  return call(e.program(), cond_floats, c, [&](const RunArgs& args) { e.run(args); });
}

Result naive(const Program& p, int64_t cond_floats, const Call& c) {
  return call(p, cond_floats, c, [&](const RunArgs& args) { Naive(p, args).run(); });
}

void join(Result* a, const Result& b) {
  a->out.insert(a->out.end(), b.out.begin(), b.out.end());
  a->params.insert(a->params.end(), b.params.begin(), b.params.end());
}

bool has(const std::string& isa) {
  for (const std::string& name : supported_isas())
    if (name == isa) return true;
  return false;
}

void compare(RandomProgram& program, int seed, const std::vector<int>& thread_counts) {
  const Program& p = program.program();
  const int64_t cond = program.cond_floats();
  const Result want = naive(p, cond, {0, 5});
  for (const std::string isa : {"avx2", "avx512"}) {
    if (!has(isa)) continue;
    for (int threads : thread_counts) {
      Executor e(p, threads, isa);
      CHECK(execute(e, cond, {0, 5}) == want, "seed %d %s %d threads", seed, isa.c_str(), threads);
      Result parts = execute(e, cond, {0, 2});
      join(&parts, execute(e, cond, {2, 3}));
      CHECK(parts == want, "seed %d %s %d threads, in two calls", seed, isa.c_str(), threads);
    }
  }
}

void random_programs() {
  for (int seed = 0; seed < 40; ++seed) {
    RandomProgram program(seed);
    compare(program, seed, {1, 2, 3, 5});
  }
  for (int seed = 0; seed < 3; ++seed) {  // large enough for ranks to share panels, columns, or both
    RandomProgram program(seed, true);
    compare(program, 1000 + seed, {1, 2, 5});
  }
}

// bfloat16 weights equal float weights of the same values.
void half_weights() {
  for (int seed = 0; seed < 5; ++seed) {
    RandomProgram program(seed, seed == 0);
    for (float& w : program.weights) {
      uint32_t bits;
      std::memcpy(&bits, &w, 4);
      bits &= 0xffff0000u;
      std::memcpy(&w, &bits, 4);
      program.half_weights.push_back(bits >> 16);
    }
    const int64_t cond = program.cond_floats();
    const std::vector<uint16_t> half = std::move(program.half_weights);
    program.half_weights.clear();
    const std::string isas[] = {"baseline", "avx2", "avx512"};
    for (const std::string& isa : isas) {
      if (!has(isa)) continue;
      Executor whole(program.program(), 2, isa);
      program.half_weights = half;
      Executor halved(program.program(), 2, isa);
      program.half_weights.clear();
      CHECK(execute(whole, cond, {0, 3}) == execute(halved, cond, {0, 3}), "seed %d %s", seed, isa.c_str());
    }
  }
}

// Without fused multiply-add rounding differs; with all values known, parameters must still be close. Known values
// come back as they are.
void baseline_and_known_values() {
  for (int seed = 0; seed < 40; ++seed) {
    RandomProgram program(seed);
    const Program& p = program.program();
    const int64_t cond = program.cond_floats();
    const std::vector<float> given = naive(p, cond, {0, 4}).out;
    std::vector<uint8_t> mask(given.size(), 1);
    Executor e(p, 2, "baseline");
    const Call call{1, 3, &given, &mask};
    const Result got = execute(e, cond, call), want = naive(p, cond, call);
    CHECK(Result::same(got.out, want.out), "seed %d", seed);
    float worst = 0;
    for (size_t i = 0; i < got.params.size(); ++i) worst = std::fmax(worst, std::fabs(got.params[i] - want.params[i]));
    CHECK(worst < 1e-4f, "seed %d: %g", seed, worst);

    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 == 0;
    Executor best(p, 2, "auto");
    const Result some = execute(best, cond, call);
    if (has("avx2")) CHECK(some == naive(p, cond, call), "seed %d", seed);
    const size_t skip = given.size() - some.out.size();
    for (size_t i = 0; i < some.out.size(); ++i)
      if (mask[skip + i]) CHECK(some.out[i] == given[skip + i], "seed %d", seed);
  }
}

void cancel_and_throw() {
  RandomProgram program(0, true);  // an image: it reports every row
  const Program& p = program.program();
  const int64_t cond = program.cond_floats();
  for (int threads : {1, 2, 5}) {
    Executor e(p, threads, "auto");
    const Result want = execute(e, cond, {0, 2});
    int calls = 0;
    bool cancelled = false, thrown = false, reentered = false;
    const auto with = [&](const Executor::Progress& progress) {
      return call(p, cond, {0, 2}, [&](const RunArgs& args) { e.run(args, progress); });
    };
    try {
      with([&](int64_t) { return ++calls < 2; });
    } catch (const Cancelled&) {
      cancelled = true;
    }
    CHECK(cancelled && calls == 2, "%d calls", calls);
    try {
      with([](int64_t) -> bool { throw std::string("mine"); });
    } catch (const std::string& s) {
      thrown = s == "mine";
    }
    CHECK(thrown, "%d threads", threads);
    try {
      with([&](int64_t) { return with([](int64_t) { return true; }).out.empty(); });
    } catch (const std::logic_error&) {
      reentered = true;
    }
    CHECK(reentered, "%d threads", threads);
    int64_t last = 0;
    const Result again = with([&](int64_t steps) { return (last = steps) > 0; });
    CHECK(again == want && last == p.steps, "%d threads", threads);
  }
}

void side_by_side() {
  RandomProgram program(4);
  const Program& p = program.program();
  const int64_t cond = program.cond_floats();
  Executor one(p, 2, "auto"), other(p, 3, "auto");
  const Result want = execute(one, cond, {0, 3});
  std::vector<std::thread> callers;
  std::vector<int> equal(4);
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] { equal[i] = execute(i % 2 ? one : other, cond, {0, 3}) == want; });
  for (std::thread& t : callers) t.join();
  for (int i = 0; i < 4; ++i) CHECK(equal[i], "caller %d", i);
}

// A damaged program is refused or runs; it never reads or writes outside (run this with the address sanitizer).
void damaged_programs() {
  std::mt19937 random(1);
  int refused = 0, ran = 0;
#if defined(__SANITIZE_THREAD__)
  constexpr int kRounds = 300;  // one thread: there is little to see
#else
  constexpr int kRounds = 3000;
#endif
  for (int round = 0; round < kRounds; ++round) {
    RandomProgram program(round % 20);
    const auto damage = [&](auto& records) {
      if (records.empty()) return;
      int32_t* words = reinterpret_cast<int32_t*>(records.data());
      const size_t n = records.size() * sizeof(records[0]) / 4;
      const int32_t values[] = {-1, 0, 1, 2, 7, 30, 1000, -1000, INT32_MAX, INT32_MIN};
      words[random() % n] = values[random() % 10];
    };
    std::vector<Head> head{program.p.head};
    switch (random() % 8) {
      case 0: damage(program.buffers); break;
      case 1: damage(program.taps); break;
      case 2:
      case 3: damage(program.code); break;
      case 4: damage(program.ops); break;
      case 5: damage(random() % 2 ? program.row_items : program.step_items); break;
      case 6: damage(head); break;
      case 7:
        damage(random() % 3 == 0 ? program.step_site : random() % 2 == 0 ? program.step_phase : program.param_ptr);
        break;
    }
    program.p.head = head[0];
    try {
      const Program& p = program.program();
      Executor e(p, 1, "auto");
      bool other_cond = false;  // than what call() prepares; its size is the caller's promise
      for (const Buffer& b : program.buffers)
        other_cond |=
            b.kind == kCond && (b.offset != 0 || int64_t{b.rows} * b.cols * b.channels != program.cond_floats());
      if (other_cond || p.head.params > 5000) continue;
      execute(e, program.cond_floats(), {0, 1});
      ++ran;
    } catch (const std::invalid_argument&) {
      ++refused;
    } catch (const std::bad_alloc&) {
      ++refused;
    }
  }
  CHECK(refused > kRounds / 6 && ran > kRounds / 6, "%d refused, %d ran", refused, ran);
}

void wrong_calls() {
  RandomProgram program(5);
  const Program& p = program.program();
  const auto refuses = [&](auto&& body) {
    try {
      body();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(refuses([&] { Executor(p, 0, "auto"); }), "no threads");
  CHECK(refuses([&] { Executor(p, 1, "sse9"); }), "unknown isa");
  Executor e(p, 2, "auto");
  CHECK(refuses([&] { execute(e, program.cond_floats(), {0, 0}); }), "no slots");
  CHECK(refuses([&] { call(p, program.cond_floats(), {}, [&](RunArgs args) { args.temperature = 0, e.run(args); }); }),
        "temperature 0");
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash must not swallow what was said before
  random_programs();
  half_weights();
  baseline_and_known_values();
  cancel_and_throw();
  side_by_side();
  damaged_programs();
  wrong_calls();
  return report("test_executor");
}
