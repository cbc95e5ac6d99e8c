// The team interpreter on the programs of tests/cases.py (tests/dump_programs.py writes them): equal bytes whatever the
// team is, and no parameter from memory that nobody wrote. Under sanitizers this is where a missing barrier shows.
//   test_cases DIR
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <vector>

#include "../team/host_team.h"
#include "../team/lower.h"
#include "../validate.h"
#include "check.h"

using namespace fastgen;
using namespace fastgen::team;

namespace {

// A program read from a file, and the bytes its tables lie in.
class ProgramFile {
 public:
  explicit ProgramFile(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    int64_t numbers[6];
    std::memcpy(numbers, bytes_.data(), sizeof numbers);
    at_ = sizeof numbers;
    p_.rows = numbers[0], p_.cols = numbers[1], p_.steps = numbers[2];
    p_.row_len = numbers[3], p_.period = numbers[4], p_.arena = numbers[5];
    p_.nbuffers = table(&p_.buffers), p_.ntaps = table(&p_.taps), p_.ncode = table(&p_.code), p_.nops = table(&p_.ops);
    table(&p_.row_items), table(&p_.row_ptr), table(&p_.step_items), table(&p_.step_ptr), table(&p_.step_site);
    table(&p_.step_phase), table(&p_.param_ptr);
    p_.nconsts = table(&p_.consts);
    const Head* head = nullptr;
    table(&head);
    p_.head = *head;
    const float* weights = nullptr;
    p_.nweights = table(&weights);
    p_.weights = weights, p_.weight_bits = 32;
  }

  const Program& program() const { return p_; }

 private:
  template <class T>
  int64_t table(const T** to) {  // copied out: in the file they are not aligned
    int64_t size = 0;
    std::memcpy(&size, bytes_.data() + at_, sizeof size);
    at_ += sizeof size;
    tables_.emplace_back(size / 8 + 1);
    std::memcpy(tables_.back().data(), bytes_.data() + at_, size);
    at_ += size;
    *to = reinterpret_cast<const T*>(tables_.back().data());
    return size / static_cast<int64_t>(sizeof(T));
  }

  std::vector<char> bytes_;
  std::vector<std::vector<int64_t>> tables_;
  size_t at_ = 0;
  Program p_ = {};
};

struct Shape {
  int ranks, warps, teams;
};

std::vector<float> run(const Program& p, Precision precision, const Shape& shape) {
  constexpr int kSlots = 3;
  const std::vector<char> block = lower(p, {precision, 64 << 10});
  const Header& h = *reinterpret_cast<const Header*>(block.data());
  std::vector<std::vector<float>> conds(num_conds(p));
  for (int32_t i = 0; i < p.nbuffers; ++i) {
    const Buffer& b = p.buffers[i];
    if (b.kind == kCond) conds[b.offset].resize(int64_t{kSlots} * b.rows * b.cols * b.channels);
  }
  std::vector<const float*> pointers;
  for (std::vector<float>& c : conds) {
    for (size_t i = 0; i < c.size(); ++i) c[i] = std::sin(0.37f * i);
    pointers.push_back(c.data());
  }
  const int64_t values = int64_t{kSlots} * p.rows * p.cols * p.head.channels;
  std::vector<float> result(values + kSlots * p.steps * p.head.params);  // values, then parameters
  std::vector<float> arena(kSlots * h.arena, std::numeric_limits<float>::quiet_NaN());
  Launch a = {};
  a.block = block.data(), a.arena = arena.data(), a.arena_stride = h.arena, a.cond = pointers.data();
  a.out = result.data(), a.params = result.data() + values;
  a.slots = kSlots, a.temperature = 1, a.seed = 7, a.teams = shape.teams;
  run_on_host(a, {shape.ranks, shape.warps});
  return result;
}

void compare(const std::string& name, const Program& p) {
  for (const Precision precision : {kFloat32, kBfloat16, kFloat16}) {
    const std::vector<float> one = run(p, precision, {1, 1, 1});
    CHECK(std::none_of(one.begin(), one.end(), [](float x) { return x != x; }), "%s: NaN", name.c_str());
    for (const Shape& shape : {Shape{3, 1, 2}, Shape{4, 2, 1}}) {
      const std::vector<float> other = run(p, precision, shape);
      CHECK(std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0, "%s, precision %d: team of %d x %d",
            name.c_str(), precision, shape.ranks, shape.warps);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int programs = 0;
  if (argc > 1)
    for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
      if (entry.path().extension() != ".program") continue;
      compare(entry.path().stem().string(), ProgramFile(entry.path()).program());
      ++programs;
    }
  CHECK(programs > 0, "no programs; write them with python -m tests.dump_programs DIR");
  return report("cases");
}
