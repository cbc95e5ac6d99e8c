// What the lanes of a warp do together. On a GPU a lane is a thread and holds its own part of a fragment; on the host a
// thread is a whole warp, loops over the lanes and holds all parts. Either way the arithmetic of every output is the
// same sequence of operations, whatever the other columns of the tile are.
#pragma once
#include "fragments.h"
#include "lowered.h"

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cmath>

#include "half.h"
#endif

#if defined(__CUDACC__)
#define FG_D __device__ __forceinline__
#define FG_UNROLL_ALL _Pragma("unroll")
#define FG_UNROLL_SOME _Pragma("unroll 4")
#else
#define FG_D inline
#define FG_UNROLL_ALL
#define FG_UNROLL_SOME
#endif

namespace fastgen::team {

#if defined(__CUDA_ARCH__)
constexpr int kHeld = 1;  // parts of a fragment that a thread holds
#else
constexpr int kHeld = kLanes;
#endif

// f(lane) for every lane this thread is.
template <class F>
FG_D void for_lanes(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x) % kLanes);
#else
  for (int lane = 0; lane < kLanes; ++lane) f(lane);
#endif
}

// clang-format off: it does not see the loops behind FG_UNROLL_ALL
// op over f(lane) of all lanes, in a fixed tree; every lane has the result. op is commutative.
template <class F, class G>
FG_D float combine_lanes(F f, G op) {
#if defined(__CUDA_ARCH__)
  float v = f(static_cast<int>(threadIdx.x) % kLanes);
  FG_UNROLL_ALL for (int d = kLanes / 2; d > 0; d /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
#else
  float v[kLanes], w[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = f(lane);
  for (int d = kLanes / 2; d > 0; d /= 2) {
    for (int lane = 0; lane < kLanes; ++lane) w[lane] = op(v[lane], v[lane ^ d]);
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = w[lane];
  }
  return v[0];
#endif
}

// Accumulators of a tile of 16 rows and NT * 8 columns.
template <int NT>
struct Sums {
  float part[NT][kHeld][4];

  FG_D void clear() {
    FG_UNROLL_ALL for (int j = 0; j < NT; ++j) FG_UNROLL_ALL for (int h = 0; h < kHeld; ++h)
        FG_UNROLL_ALL for (int e = 0; e < 4; ++e) part[j][h][e] = 0.0f;
  }
  FG_D void add(const Sums& o) {
    FG_UNROLL_ALL for (int j = 0; j < NT; ++j) FG_UNROLL_ALL for (int h = 0; h < kHeld; ++h)
        FG_UNROLL_ALL for (int e = 0; e < 4; ++e) part[j][h][e] += o.part[j][h][e];
  }
  // f(row, column, sum) for every number of the tile that this thread holds.
  template <class F>
  FG_D void each(F f) {
    for_lanes([&](int lane) {
      FG_UNROLL_ALL for (int j = 0; j < NT; ++j) FG_UNROLL_ALL for (int e = 0; e < 4; ++e)
          f(c_row(lane, e), j * kTileCols + c_col(lane, e), part[j][kHeld == 1 ? 0 : lane][e]);
    });
  }
};

// clang-format on

// How activations are kept for the product, and weights read: by precision.
template <Precision P>
struct Operand {
  using Type = uint16_t;
};
template <>
struct Operand<kFloat32> {
  using Type = float;
};

template <Precision P>
FG_D typename Operand<P>::Type to_operand(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (P == kBfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  if constexpr (P == kFloat16) return __half_as_ushort(__float2half_rn(x));
#else
  if constexpr (P == kBfloat16) return to_bfloat16(x);
  if constexpr (P == kFloat16) return to_float16(x);
#endif
  if constexpr (P == kFloat32) return x;
}

#if !defined(__CUDA_ARCH__)
// The same product on the host: fragments are unpacked by their map, and every output sums its 16 products in order.
template <Precision P, int NT>
void emulate_step(Sums<NT>& sums, const uint16_t* weights, const uint16_t* x, int ld) {
  const auto value = [](uint16_t h) { return P == kBfloat16 ? from_bfloat16(h) : from_float16(h); };
  float a[kTileRows][kTileDepth];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int e = 0; e < 8; ++e) a[a_row(lane, e)][a_k(lane, e)] = value(weights[lane * 8 + e]);
  for (int j = 0; j < NT; ++j) {
    float b[kTileDepth][kTileCols];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < 4; ++e)
        b[b_k(lane, e)][b_col(lane)] = value(x[(j * kTileCols + b_col(lane)) * ld + b_k(lane, e)]);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < 4; ++e)
        for (int k = 0; k < kTileDepth; ++k)
          sums.part[j][lane][e] = std::fma(a[c_row(lane, e)][k], b[k][c_col(lane, e)], sums.part[j][lane][e]);
  }
}
#endif

// clang-format off
// One k-step of a tile's weights: on a GPU a lane's registers of the A fragment, so that several steps can be on their
// way from memory at once; else where they lie.
template <Precision P>
struct Weights {
#if defined(__CUDA_ARCH__)
  static constexpr bool kInRegisters = P != kFloat32;
#else
  static constexpr bool kInRegisters = false;
#endif
#if defined(__CUDACC__)
  uint4 a;
#endif
  const void* at;

  FG_D void load(const void* from) {
#if defined(__CUDA_ARCH__)
    if constexpr (kInRegisters) a = __ldg(static_cast<const uint4*>(from) + threadIdx.x % kLanes);
#endif
    if constexpr (!kInRegisters) at = from;
  }
};

// sums += one k-step: weights of the tile (in fragments, or [16][16 rows] in float32) times activations x[column * ld + k]
// for NT * 8 columns.
template <Precision P, int NT>
FG_D void multiply_step(Sums<NT>& sums, const Weights<P>& weights, const typename Operand<P>::Type* x, int ld) {
  if constexpr (P == kFloat32) {
    const float* w = static_cast<const float*>(weights.at);
    for_lanes([&](int lane) {
      FG_UNROLL_SOME for (int k = 0; k < kTileDepth; ++k) {
        const float upper = w[k * kTileRows + c_row(lane, 0)], lower = w[k * kTileRows + c_row(lane, 2)];
        FG_UNROLL_ALL for (int j = 0; j < NT; ++j) {
          const float* column = x + (j * kTileCols + c_col(lane, 0)) * ld + k;
          float* c = sums.part[j][kHeld == 1 ? 0 : lane];
          c[0] = fmaf(upper, column[0], c[0]), c[1] = fmaf(upper, column[ld], c[1]);
          c[2] = fmaf(lower, column[0], c[2]), c[3] = fmaf(lower, column[ld], c[3]);
        }
      }
    });
  } else {
#if defined(__CUDA_ARCH__)
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const uint4& a = weights.a;
    FG_UNROLL_ALL for (int j = 0; j < NT; ++j) {
      const uint16_t* column = x + (j * kTileCols + b_col(lane)) * ld;
      const uint32_t b0 = *reinterpret_cast<const uint32_t*>(column + b_k(lane, 0));
      const uint32_t b1 = *reinterpret_cast<const uint32_t*>(column + b_k(lane, 2));
      float* c = sums.part[j][0];
      if constexpr (P == kBfloat16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
      else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
#else
    emulate_step<P, NT>(sums, static_cast<const uint16_t*>(weights.at), x, ld);
#endif
  }
}

// clang-format on

}  // namespace fastgen::team
