// The program: what a trained module becomes after capture and planning, and all that a native executor knows.
//
// A program is a set of flat tables of plain old data. It names no model and no framework. Columns: a *site* is a
// position (i, j) of a grid; 1-D data is a grid of one row. An *op* computes all its output channels at some of its
// sites; `slots` samples are in flight side by side, each with buffers of its own, at the same step.
//
//   for row in rows:                      a row is `row_len` consecutive steps (an image row; a chunk of a sequence)
//     run the row items                   (batched work: everything that needs only finished rows)
//     for step in row:
//       run the site items                (in the order of the table; an item may read what an earlier one stored)
//       draw the value(s) of the step, write them to `out` and, encoded, to the input buffer
//
// An op is a linear part, then a small vector program on the result, per column (= site x slot):
//   scratch[0, acc)   = bias + site_bias[site] + buffer[partial][site] + sum over taps W_tap . x_tap     (if acc > 0)
//   then `ncode` micro-ops over scratch, which load, map, and store channel vectors.
// The reduction order of every output is fixed: taps in table order, channels ascending, one accumulator, fused
// multiply-add where the machine has it. So no byte depends on the number of slots, threads or columns at once.
#pragma once
#include <cstdint>

namespace fastgen {

// clang-format off: the comments are in columns
constexpr int kPanel = 16;  // outputs per weight panel

// Storage of one node's activations for one slot: [rows][cols][channels] floats, channel fastest. Row i lives at
// i % ring_rows, column j at j % ring_cols.
struct Buffer {
  int32_t channels, rows, cols, ring_rows, ring_cols;
  int32_t kind;    // BufferKind
  int64_t offset;  // State/Input: in floats into the slot's arena. Cond: index into RunArgs::cond. Const: into consts
};
enum BufferKind : int32_t {
  kState = 0,
  kInput = 1,  // what the draw writes; preset to `start` (see Head) at its sites before the first step
  kCond = 2,   // given per run, one [rows][cols][channels] per sample, never ringed
  kConst = 3,  // the same for all samples, never ringed
};

// Where a vector of `nchan` channels is read: source site = floor((q * mul + off) / div) per axis, q the op's
// iteration site; zero outside [lo, hi).
struct Tap {
  int32_t buf, chan, nchan;
  int32_t mul_i, mul_j, div_i, div_j, off_i, off_j;
  int32_t lo_i, hi_i, lo_j, hi_j;
};

// One micro-op on the scratch vector of a column. Operands a, b, c: x >= 0 is scratch + x, x < 0 is consts + ~x.
// n elements unless the comment says otherwise. dst never partly overlaps an operand (it may equal one).
struct Micro {
  int32_t fn, dst, a, b, c, n;
  float imm0, imm1, imm2;
};
enum Fn : int32_t {  // what each does, and all else that is known of it: functions.def
#define FG_FUNCTION(kind, name, code, operands, cycles) k##name = code,
#include "functions.def"
#undef FG_FUNCTION
};
constexpr int kFunctions = 128;  // codes are below

struct Op {
  int32_t tap0, ntaps;  // linear part; may be 0
  int32_t acc;          // its output channels (0: no linear part)
  int32_t k;            // sum of nchan over the taps
  int64_t weights;      // element offset of its panels: [ceil(acc/16)][k][16]
  int32_t bias;         // offset in consts of [ceil(acc/16)*16], or -1
  int32_t site_bias;    // Const buffer of acc channels read at the dst site, or -1
  int32_t partial;      // buffer of acc channels read at the dst site (hoisted sum), or -1
  int32_t code0, ncode; // vector program
  int32_t scratch;      // floats of scratch it uses (the linear part's at 0, rounded up to a panel)
  int32_t up_i, up_j, par_i, par_j;  // dst site = q * up + par
  int32_t q_rows, q_cols;            // iteration grid; q = qi * q_cols + qj, 0 <= q < q_rows * q_cols. Empty: the op never runs
  int32_t advance;                   // q per period of the schedule (sequences)
};

// Run op at q0 + m*qstep (m = 0 .. count-1), + advance * (periods elapsed); sites outside the grid are skipped.
struct Item {
  int32_t op, q0, count, qstep;
};

enum HeadKind : int32_t { kLogisticMixture = 0, kCategorical = 1, kBernoulli = 2, kGaussianMixture = 3 };

// How the parameters at a site become a value. `phases` steps per site (step_phase says which value channel a step draws)
// or, for a head that draws a pixel at once, one step per site.
struct Head {
  int32_t kind;
  int32_t channels;      // value channels per site (C)
  int32_t phases;        // steps per site: 1, or C
  int32_t n;             // mixtures, or classes
  int32_t levels;        // LogisticMixture: grid of `levels` values on [-1, 1]; 0: unrounded
  int32_t params;        // parameters per step
  int32_t input;         // buffer the encoded value goes to
  int32_t enc;           // encoded channels per value channel; value channel c -> input channels [c*enc, (c+1)*enc)
  int32_t table;         // offset in consts of [classes][enc]; -1: the value itself (enc = 1)
  int32_t delay;         // 0: step's site is the input's site; 1: the next one (predicts="next")
  int32_t start;         // offset in consts of [channels*enc] at input site 0 before the first step; -1: zeros
  float floor_log_scale; // LogisticMixture, GaussianMixture: lower bound of log-scales
  float clip_lo, clip_hi; // GaussianMixture: drawn values are clipped to this range
};

struct Program {
  const Buffer* buffers;  int32_t nbuffers;
  const Tap* taps;        int32_t ntaps;
  const Micro* code;      int32_t ncode;
  const Op* ops;          int32_t nops;
  const Item* row_items;  const int32_t* row_ptr;    // [rows_per_period + 1]
  const Item* step_items; const int32_t* step_ptr;   // [period + 1]
  const int32_t* step_site;                          // [period]: site (i*cols + j) drawn at a step; later periods: + advance
  const int32_t* step_phase;                         // [period]: which of its site's draws the step is
  const int32_t* param_ptr;                          // [phases + 1]: phase f's parameters are taps [param_ptr[f], param_ptr[f+1])
  const void* weights;    int32_t weight_bits;       // 32: float, 16: bfloat16
  int64_t nweights;                                  // elements
  const float* consts;    int64_t nconsts;
  Head head;
  int32_t rows, cols;     // sites of a sample
  int64_t steps;          // of a sample: rows * cols * phases
  int32_t row_len;        // steps per row; divides period
  int32_t period;         // steps after which the schedule repeats (images: all of them)
  int64_t arena;          // floats of state per slot
};

// The site of a step: the table's in its period, moved on by the sites of a period for every period before.
inline int64_t site_of_step(const Program& p, int64_t step) {
  return p.step_site[step % p.period] + step / p.period * (p.period / p.head.phases);
}

// One call: samples [first, first + slots) of `seed`, in lockstep.
struct RunArgs {
  int32_t slots;
  uint64_t seed, first;
  float temperature;
  const float* const* cond;     // per Cond buffer: [slots][rows][cols][channels]
  const float* given;           // [slots][rows*cols][C] known values (class index or value), or null
  const uint8_t* mask;          // [slots][rows*cols][C], 1 = known, or null
  float* out;                   // [slots][rows*cols][C]
  float* params;                // [slots][steps][head.params] or null: every parameter vector before its draw
};

}  // namespace fastgen
