// The lowered program: what lower() makes of a program (plan.h) for the team interpreter (interpreter.h).
//
// One relocatable block of bytes, so that it is uploaded in one copy and the same bytes serve a GPU and host threads.
// A header with offsets, then flat tables. An op becomes a stage, or two:
//
//   fibers    The linear part's rows and the lanes of the vector program fall into *fibers*: what depends on each other
//             lane by lane (of a gate: row c and row c + C; of a residual: a row and its load). Fibers never talk to
//             each other, so `width` of them make a *slice* of rows * width = 16 (or a few times 16) output rows, which
//             one warp row-tile computes and one CTA finishes by itself: no exchange inside an op. A fiber's program
//             is straight line code over a few registers.
//   columns   Where lanes do talk (a norm, an embedding by a computed index) the linear part is stored to a temporary
//             buffer, and after a barrier one warp runs the whole vector program of a column.
//
// Weights are the A operand of mma.m16n8k16, packed so that a lane's four registers of a k-step are one 16-byte load
// (fragments.h); in float32, panels of [k][16].
#pragma once
#include <cstdint>

#include "../plan.h"

namespace fastgen::team {

// clang-format off: the comments are in columns
enum Precision : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr int kLanes = 32;
constexpr int kTileRows = 16, kTileCols = 8, kTileDepth = 16;  // mma.m16n8k16
constexpr int kMaxPoints = 1 << 11;  // places x columns of a block that pointers are kept of, if columns can be fewer
constexpr int kDrawScratch = 160;                              // floats a drawing warp needs beside the parameters

enum StageKind : int32_t { kFibers = 0, kColumns = 1, kDraw = 2 };
constexpr int32_t kTemp = 4;  // BufferKind beside those of plan.h: one vector per column of the item at hand

// One instruction of the fibers [lo, hi). Operands: x >= 0 a register; x < 0 consts[~x + (f - lo) * step].
// Loads:  dst = channel c + (f - lo) * step of place a, imm0 where that is outside.
// Stores: channel c + (f - lo) of place b = operand a.
// Embed:  dst = consts[b + row * c + (f - lo) * step], row = (int)a clamped to [0, imm0).
struct alignas(16) Instr {  // read as three vectors
  int32_t fn, lo, hi, step;
  int32_t dst, a, b, c;
  float imm0, imm1, imm2;
  int32_t unused;
};

// Where a vector of channels is read or written: a Tap of plan.h, and what it needs of its buffer.
struct Place {
  int64_t offset;                       // State, Input, Temp: floats into the slot's arena; Const: into consts
  int32_t kind;                         // BufferKind or kTemp
  int32_t cond;                         // Cond: its index
  int32_t chan, nchan, channels;        // channels: of the buffer
  int32_t ring_rows, ring_cols;         // Cond and Const: rows and columns
  int32_t mul_i, mul_j, div_i, div_j, off_i, off_j;
  int32_t lo_i, hi_i, lo_j, hi_j;
  int32_t k;                            // linear taps: its first channel within K
};

// Head of a descriptor; its places and instructions follow, so that one copy brings all that a stage needs.
struct Stage {
  int32_t kind, op;                     // op: its number in the program, for messages
  int32_t q_rows, q_cols, advance;      // as in Op
  int32_t places, ntaps, nplaces;       // places: byte offset in the descriptor; linear taps first, then loads and stores
  // linear part (fibers)
  int32_t k, ksteps;                    // channels; k-steps of 16
  int32_t chunk, nchunks;               // k-steps that one accumulator sums; the sums are added in order
  int64_t weights;                      // byte offset: [slice][tile][kstep][lane] of 16 bytes, or [slice][tile][k][16]
  int32_t bias;                         // offset in consts, [slice][rows * width]; -1: none
  int32_t widest;                       // most channels of a linear tap
  int32_t fibers, rows, width, slices;
  int32_t registers;                    // of a fiber; the first `rows` are the accumulators
  int32_t code, nloads, ncode;          // Instr (fibers; loads first) or Micro (columns): byte offset, how many
  int32_t scratch;                      // columns: floats of a vector program
  // tiles that fit the shared memory it was lowered for
  int32_t cols;                         // columns of a block, at most
  int32_t group;                        // slices at a time
  int32_t kblock;                       // chunks of which activations are staged at a time
  int32_t ldb, lds, ldp;                // staged activations (elements), registers, partial sums (floats): per column
  int32_t at_b, at_s, at_p;             // where they start in shared memory, in bytes
};

// The schedule: the stages of a period in order, the draws among them. 32 bytes.
struct StageItem {
  int32_t descriptor, bytes;            // offset in units of 16 bytes; size
  int32_t op;                           // of the stage; -1: a draw
  int32_t q0, count, qstep;             // as in Item; a draw of an image: q0 is the site
  int32_t sync;                         // 1: a barrier of the team comes first
  int32_t first;                        // 1: the first of its step
};

// Shared memory of a CTA: the header, the next items, two descriptors (at hand, and the next one on its way), and what
// stages use.
constexpr int kItemsAhead = 2, kItemRing = 4;
constexpr int kHeaderBytes = 768;
constexpr int kItemsAt = kHeaderBytes, kDescriptorsAt = kItemsAt + kItemRing * static_cast<int>(sizeof(StageItem));

struct Header {
  int64_t bytes;
  int64_t items, descriptors, consts, weights;  // offsets of the tables in the block
  int32_t nitems;                       // of a period
  int32_t precision;
  int32_t shared_bytes;                 // of a CTA
  int32_t descriptor_bytes;             // the largest
  int32_t work_at, work_bytes;          // what stages use of shared memory
  int32_t rows, cols, row_len, period;
  int32_t nstages, ncolumn_stages;      // for people
  int32_t draw_floats;                  // of shared memory a drawing warp needs
  int64_t steps;
  int64_t arena;                        // floats of state per slot, temporaries included
  Place input;                          // where the first value goes: the whole input buffer
  Head head;
};
static_assert(sizeof(Header) <= kHeaderBytes && sizeof(StageItem) == 32);

// One call. Everything is in the memory of the device that runs it.
struct Control {                        // written by the team, read by the host while it runs
  uint32_t done;                        // steps finished
  uint32_t unused[15];                  // a cache line each
};
struct Fault {                          // who waited in vain, and where
  uint32_t code;                        // FaultCode
  int32_t team, rank;
  int32_t op;                           // the barrier came before this op of the program; -1: before or after a draw
  int64_t step;
};
enum FaultCode : uint32_t { kNoFault = 0, kLostPartner = 1 };

constexpr int kBarrierWords = 32;       // a line of the second-level cache each
constexpr uint32_t kNoPulse = 0, kPulseOver = ~0u;  // of a team that has not begun, and of one that has left

struct Launch {
  const char* block;                    // the lowered program
  float* arena;                         // [slots][arena_stride]
  int64_t arena_stride;
  const float* const* cond;             // by cond index: [slots][rows][cols][channels]
  const float* given;                   // as in RunArgs; null: nothing is known
  const uint8_t* mask;
  float* out;
  float* params;                        // or null
  int32_t slots;
  float temperature;
  uint64_t seed, first;
  int32_t teams;                        // team t has the slots [slots * t / teams, slots * (t + 1) / teams)
  const uint32_t* cancel;               // nonzero: stop after the step
  uint32_t* stop;                       // [teams], zeroed; the steps after which a cancelled team stops
  Control* control;                     // [teams], zeroed
  uint32_t* pulse;                      // [teams], zeroed; of teams on a device, another number each step
  uint32_t* barrier;                    // [teams * kBarrierWords], zeroed; for teams that meet in memory
  Fault* fault;                         // zeroed
  uint64_t patience;                    // nanoseconds a barrier in memory waits before it reports a lost partner
};
// clang-format on

}  // namespace fastgen::team
