// The executor's own copy of a program, with every op made ready to run.
#pragma once
#include <vector>

#include "../plan.h"
#include "kernels.h"
#include "memory.h"

namespace fastgen {

// A micro-op with its function looked up. Operands as in Micro; those the function does not have repeat `a`.
struct Instruction {
  MapFn map;  // null for movement
  Micro micro;
};

struct ReadyOp {
  Op op;
  int32_t panels;  // ceil(acc / 16)
  int64_t stride;  // floats from one column's scratch to the next
  const Tap* taps;
  std::vector<int32_t> nchan;  // of each tap
  const char* weights;         // its first panel
  std::vector<Instruction> code;
  double linear_cycles;   // of one panel and one column, estimated
  double program_cycles;  // of one column, estimated
};

class Tables {
 public:
  // Validates and copies. Throws std::invalid_argument and OutOfMemory.
  Tables(const Program& program, const Kernels& kernels);
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;

  const Program& program() const { return program_; }
  const std::vector<ReadyOp>& ready_ops() const { return ready_ops_; }
  int64_t weight_bytes() const { return program_.weight_bits / 8; }

  int32_t max_taps = 0, max_nchan = 0;  // over the linear parts
  int32_t max_count = 0;                // over the items

 private:
  ReadyOp make_ready(const Op& op, const Kernels& kernels) const;

  Program program_;  // its pointers lead into the vectors below
  std::vector<Buffer> buffers_;
  std::vector<Tap> taps_;
  std::vector<Micro> code_;
  std::vector<Op> ops_;
  std::vector<Item> row_items_, step_items_;
  std::vector<int32_t> row_ptr_, step_ptr_, step_site_, step_phase_, param_ptr_;
  std::vector<float> consts_;
  Pages weights_;
  std::vector<ReadyOp> ready_ops_;
};

}  // namespace fastgen
