// The inner loops, one table of them per instruction set; kernels.cpp says how they work.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../plan.h"

namespace fastgen {

constexpr int kMaxPanels = 5;   // of one tile
constexpr int kMaxColumns = 8;  // of one tile

// out[c*ldout + p*16 ...] += sum over taps t, channels k of weights[p*stride + (t, k)*16 ...] * x[t*ldx + c][k]
// for the P panels and C columns of the tile. weights and stride (between panels) are in elements.
using TileFn = void (*)(const void* weights, int64_t stride, const int32_t* nchan, int ntaps, const float* const* x,
                        int64_t ldx, float* out, int64_t ldout);

// One micro-op of the map or reduction kind: dst[0, n) = f(a, b, c), dst[0] for reductions.
using MapFn = void (*)(float* dst, const float* a, const float* b, const float* c, int n, const float* imm);

struct Kernels {
  const char* name;
  int width;                                        // floats per vector
  int max_columns[kMaxPanels + 1];                  // of a tile of so many panels; 0: there is none
  int gemm_panels;                                  // of the tile that is best when columns abound
  TileFn tile[2][kMaxPanels + 1][kMaxColumns + 1];  // [float, bfloat16][panels][columns]
  MapFn map[kFunctions];                            // by Fn; null for movement
  void (*add)(float* dst, const float* a, int n);   // dst += a
  double (*peak)(int64_t rounds);  // fused multiply-adds without memory; returns floating point operations done
  float (*stream)(const float* data, int64_t n);  // sum of data: a read at full width
};

// Sets this machine can run, slowest first; "baseline" always.
std::vector<std::string> supported_isas();

// `isa` one of supported_isas() or "auto" (the last of them). Throws std::invalid_argument.
const Kernels& kernels_for(const std::string& isa);

}  // namespace fastgen
