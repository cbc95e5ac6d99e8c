// The kernels that bench/gpu/probe.cu times. Each repeats one thing many times; waits are bounded, and a partner that
// does not come ends the kernel with a trap.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace probe {

// ---- words between threads ------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}

constexpr uint32_t kPolls = 1u << 24;  // seconds: far beyond any wait of a healthy run

template <class F>
__device__ __forceinline__ void wait_until(F arrived) {
  for (uint32_t n = 0; n < kPolls; ++n)
    if (arrived()) return;
  __trap();
}

// ---- clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0,%%cluster_ctarank;" : "=r"(r));
  return r;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0,%%cluster_nctarank;" : "=r"(r));
  return r;
}

__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of this CTA's shared variable in the memory of CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in(const void* mine, uint32_t rank) {
  uint32_t there;
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}

__device__ __forceinline__ void store_in_cluster(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0],%1;" ::"r"(address), "r"(v) : "memory");
}

// ---- barriers -------------------------------------------------------------------------------------------------------

__global__ void cta_barrier(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncthreads();
}

__global__ void cluster_barrier(int rounds) {
  for (int i = 0; i < rounds; ++i) cluster_meet();
}

__global__ void grid_barrier(int rounds) {
  cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  for (int i = 0; i < rounds; ++i) grid.sync();
}

// Everybody adds one to a word and waits for the sum. counter: zeroed.
__global__ void counter_barrier(uint32_t* counter, int rounds) {
  for (int i = 1; i <= rounds; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      const uint32_t goal = gridDim.x * i;
      wait_until([&] { return static_cast<int32_t>(load_acquire(counter) - goal) >= 0; });
    }
    __syncthreads();
  }
}

constexpr int kFlagWords = 8;  // a 32-byte sector each

// Everybody sets a flag of its own, and its threads look at those of all. flags: zeroed.
__global__ void flag_barrier(uint32_t* flags, int rounds) {
  for (int i = 1; i <= rounds; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flags + blockIdx.x * kFlagWords, i);
    for (uint32_t other = threadIdx.x; other < gridDim.x; other += blockDim.x)
      wait_until([&] { return static_cast<int32_t>(load_acquire(flags + other * kFlagWords) - i) >= 0; });
    __syncthreads();
  }
}

// ---- one word there and back ----------------------------------------------------------------------------------------

// Through the second-level cache; the word is its own flag. words: zeroed, two lines.
__global__ void exchange_in_memory(uint32_t* words, int rounds) {
  if (threadIdx.x != 0) return;
  uint32_t *mine = words + blockIdx.x * 64, *other = words + (1 - blockIdx.x) * 64;
  for (uint32_t i = 1; i <= static_cast<uint32_t>(rounds); ++i) {
    if (blockIdx.x == 0) store_relaxed(other, i);
    wait_until([&] { return load_relaxed(mine) == i; });
    if (blockIdx.x == 1) store_relaxed(other, i);
  }
}

// Between the first and the last CTA of a cluster, through distributed shared memory.
__global__ void exchange_in_cluster(int rounds) {
  __shared__ volatile uint32_t word;
  word = 0;
  cluster_meet();
  const uint32_t rank = cluster_rank(), last = cluster_size() - 1;
  if (threadIdx.x == 0 && (rank == 0 || rank == last)) {
    const uint32_t other = address_in(const_cast<uint32_t*>(&word), last - rank);
    for (uint32_t i = 1; i <= static_cast<uint32_t>(rounds); ++i) {
      if (rank == 0) store_in_cluster(other, i);
      wait_until([&] { return word == i; });
      if (rank == last) store_in_cluster(other, i);
    }
  }
  __syncwarp();
  cluster_meet();  // nobody leaves while another may write to its memory
}

// ---- reading weights ------------------------------------------------------------------------------------------------

constexpr int kInFlight = 4;  // loads of 16 bytes that a thread has under way

// Each group of `group` CTAs reads all n words of 16 bytes, `passes` times.
__global__ void read_by_groups(const uint4* data, size_t n, int passes, int group, uint32_t* out) {
  const size_t stride = static_cast<size_t>(group) * blockDim.x;
  const size_t first = static_cast<size_t>(blockIdx.x % group) * blockDim.x + threadIdx.x;
  uint32_t sum = 0;
  for (int pass = 0; pass < passes; ++pass)
    for (size_t i = first; i < n; i += stride * kInFlight) {
      uint4 v[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const size_t at = i + j * stride;
        v[j] = at < n ? __ldcg(data + at) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
  if (sum == 0x12345678u) *out = sum;  // so that the loads are needed
}

// ---- mma ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma(float* c, const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Every warp has `Chains` accumulators, each the sum of `rounds` products. cycles: of the first warp.
template <int Chains>
__global__ void mma_chains(int rounds, long long* cycles, float* out) {
  const uint32_t some = 0x3c003c00u + threadIdx.x;  // two bfloat16 near 0.0078
  const uint4 a = make_uint4(some, some + 1, some + 2, some + 3);
  float c[Chains][4] = {};
  const long long start = clock64();
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int j = 0; j < Chains; ++j) mma(c[j], a, some + j, some);
  }
  const long long end = clock64();
  float sum = 0;
#pragma unroll
  for (int j = 0; j < Chains; ++j) sum += c[j][0] + c[j][1] + c[j][2] + c[j][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = end - start;
}

// ---- one stage of a network -----------------------------------------------------------------------------------------

// A layer of 256 inputs and 256 outputs for 8 columns, shared by a cluster of 16: each CTA keeps the weights of 16
// outputs for kLayers layers in shared memory. A stage is: every warp multiplies two k-steps; the 8 partial sums are
// added; sigmoid; every CTA sends its outputs to all others; cluster barrier. Fragments are packed as mma wants them.
constexpr int kWidth = 256, kColumns = 8, kRanks = 16, kLayers = 8, kStageThreads = 256;
constexpr int kPitch = kWidth + 8;             // of a column of activations: other banks for each
constexpr int kLayerWords = kWidth / 16 * 32;  // of 16 bytes, in one CTA
constexpr int kPartials = 16 * kColumns + 8;   // of a warp
constexpr size_t kStageShared = 200 << 10;     // as much as the real kernel would take
constexpr size_t kStageNeeds = kLayers * kLayerWords * sizeof(uint4) + 2 * kColumns * kPitch * sizeof(__nv_bfloat16) +
                               8 * kPartials * sizeof(float);
static_assert(kStageNeeds <= kStageShared, "a stage's shared memory");

// weights [rank][layer][k-step][lane] of 16 bytes; x [column][256], the input of the first stage and the result.
__global__ void __launch_bounds__(kStageThreads, 1) fused_stages(const uint4* weights, __nv_bfloat16* x, int stages) {
  extern __shared__ uint4 memory[];
  uint4* mine = memory;
  auto* activations = reinterpret_cast<__nv_bfloat16*>(memory + kLayers * kLayerWords);  // [2][column][kPitch]
  auto* partial = reinterpret_cast<float*>(activations + 2 * kColumns * kPitch);         // [warp][row][column]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t rank = cluster_rank();
  for (int i = threadIdx.x; i < kLayers * kLayerWords; i += kStageThreads)
    mine[i] = weights[rank * kLayers * kLayerWords + i];
  for (int i = threadIdx.x; i < kColumns * kWidth; i += kStageThreads)
    activations[i / kWidth * kPitch + i % kWidth] = x[i];
  __syncthreads();
  cluster_meet();
  for (int s = 0; s < stages; ++s) {
    const uint4* layer = mine + s % kLayers * kLayerWords;
    const __nv_bfloat16* in = activations + s % 2 * kColumns * kPitch;
    __nv_bfloat16* out = activations + (s + 1) % 2 * kColumns * kPitch;
    float c[4] = {};
#pragma unroll
    for (int k = 2 * warp; k < 2 * warp + 2; ++k) {
      const auto* b = reinterpret_cast<const uint32_t*>(in + g * kPitch + k * 16 + 2 * t);
      mma(c, layer[k * 32 + lane], b[0], b[4]);
    }
    float* p = partial + warp * kPartials + g * kColumns + 2 * t;
    p[0] = c[0], p[1] = c[1], p[8 * kColumns] = c[2], p[8 * kColumns + 1] = c[3];
    __syncthreads();
    if (threadIdx.x < 64) {
      const int column = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
      float sum[2] = {};
#pragma unroll
      for (int w = 0; w < 8; ++w)
        for (int r = 0; r < 2; ++r) sum[r] += partial[w * kPartials + (row + r) * kColumns + column];
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(__fdividef(1.0f, 1.0f + __expf(-sum[0])), __fdividef(1.0f, 1.0f + __expf(-sum[1])));
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(&pair);
      const __nv_bfloat16* to = out + column * kPitch + rank * 16 + row;
#pragma unroll
      for (uint32_t d = 0; d < kRanks; ++d) store_in_cluster(address_in(to, (rank + d) % kRanks), bits);
    }
    cluster_meet();
  }
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < kColumns * kWidth; i += kStageThreads)
      x[i] = activations[stages % 2 * kColumns * kPitch + i / kWidth * kPitch + i % kWidth];
}

__global__ void nothing() {}

}  // namespace probe
