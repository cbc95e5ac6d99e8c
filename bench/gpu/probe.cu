// What bounds a persistent sampling kernel on this GPU, measured in isolation: how long CTAs take to meet, how long a
// word takes from one to another, how fast a group of them reads weights out of the second-level cache, what an mma
// costs, and all of it together in one stage of a network that a cluster shares.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a bench/gpu/probe.cu -o probe && ./probe probe.jsonl
//
// Every figure is the median of a few launches between two events, divided by the rounds inside the kernel; the rounds
// are many, so that the launch does not count. Waits are bounded: a partner that does not come ends the kernel with a
// trap. The results are JSON lines, written as they come: one of the device, one {group, name, value, unit, note} for
// each measurement, one {error} for each that failed; the same as a table goes to stdout. A measurement that fails is
// null; exit status 1. 2: no device; 3: one that has no clusters.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "probe_kernels.cuh"
#include "probe_measure.cuh"

namespace {

using namespace probe;

constexpr int kRounds = 20000;

void measure_barriers(int multiprocessors, uint32_t* words) {
  const auto zeroed = [&](auto then) {
    const cudaError_t error = cudaMemsetAsync(words, 0, 1 << 16);
    return error == cudaSuccess ? then() : error;
  };
  for (int threads : {128, 256, 512}) {
    const std::string t = ", " + std::to_string(threads) + " threads", name = "__syncthreads" + t;
    const double us = median_us(name, [&] { return launch(cta_barrier, {1, threads}, 10 * kRounds); });
    add("barrier", name, us / (10 * kRounds), "us");
  }
  for (int cluster : {2, 4, 8, 16})
    for (int threads : {128, 256, 512}) {
      const std::string name = "cluster of " + std::to_string(cluster) + ", " + std::to_string(threads) + " threads";
      if (!allow(cluster_barrier, 0, name)) continue;
      const Shape shape{cluster, threads, cluster};
      const double us = median_us(name, [&] { return launch(cluster_barrier, shape, kRounds); });
      add("barrier", name, us / kRounds, "us");
    }
  for (int ctas : {16, multiprocessors})
    for (int threads : {256, 512}) {
      const Shape shape{ctas, threads, 1, true};
      const std::string who = ", " + std::to_string(ctas) + " CTAs, " + std::to_string(threads) + " threads";
      std::string name = "flags in memory" + who;
      double us = median_us(name, [&] { return zeroed([&] { return launch(flag_barrier, shape, words, kRounds); }); });
      add("barrier", name, us / kRounds, "us");
      name = "counter in memory" + who;
      us = median_us(name, [&] { return zeroed([&] { return launch(counter_barrier, shape, words, kRounds); }); });
      add("barrier", name, us / kRounds, "us");
      name = "grid.sync" + who;
      us = median_us(name, [&] { return launch(grid_barrier, shape, kRounds); });
      add("barrier", name, us / kRounds, "us");
    }
}

void measure_exchanges(uint32_t* words) {
  std::string name = "one way through L2";
  double us = median_us(name, [&] {
    const cudaError_t error = cudaMemsetAsync(words, 0, 1 << 16);
    return error == cudaSuccess ? launch(exchange_in_memory, {2, 32, 1, true}, words, kRounds) : error;
  });
  add("exchange", name, us / (2 * kRounds), "us");
  for (int cluster : {2, 8, 16}) {
    name = "one way in a cluster of " + std::to_string(cluster);
    if (!allow(exchange_in_cluster, 0, name)) continue;
    us = median_us(name, [&] { return launch(exchange_in_cluster, {cluster, 32, cluster}, kRounds); });
    add("exchange", name, us / (2 * kRounds), "us");
  }
}

void measure_reads(int multiprocessors, const uint4* data, size_t bytes, uint32_t* out) {
  const auto terabytes = [](double total, double us) { return total / us * 1e-6; };
  for (size_t mb : {4, 8, 16, 24, 40, 56, 400}) {
    const size_t size = std::min(mb << 20, bytes);
    const int passes = std::max(2, static_cast<int>((2000u << 20) / size)), ctas = 2 * multiprocessors;
    const std::string name = "all CTAs read " + std::to_string(mb) + " MB together";
    const double us = median_us(
        name, [&] { return launch(read_by_groups, {ctas, 512}, data, size / sizeof(uint4), passes, ctas, out); }, 3);
    add("read", name, terabytes(1.0 * size * passes, us), "TB/s");
  }
  const size_t size = 8 << 20;
  const int passes = 20;
  for (int group : {8, 16, 66, multiprocessors}) {
    if (group > multiprocessors) continue;
    const int most = multiprocessors / group;
    std::vector<int> counts = {1};
    if (most > 1) counts.push_back(most);
    for (int groups : counts) {
      const std::string name = std::to_string(groups) + " x " + std::to_string(group) + " CTAs, 8 MB each";
      const Shape shape{group * groups, 1024};
      const double us = median_us(
          name, [&] { return launch(read_by_groups, shape, data, size / sizeof(uint4), passes, group, out); }, 3);
      char note[64];
      std::snprintf(note, sizeof note, "%.1f us a pass", us / passes);
      add("read", name, terabytes(1.0 * size * passes * groups, us), "TB/s", note);
    }
  }
}

void measure_mma(int multiprocessors, long long* cycles, float* out) {
  const int rounds = 4000;
  const auto clocks = [&](const std::string& name, auto kernel) {
    if (std::isnan(median_us(name, [&] { return launch(kernel, {1, 32}, rounds, cycles, out); }, 1)))
      return double(NAN);
    long long n = 0;
    return ok(cudaMemcpy(&n, cycles, sizeof n, cudaMemcpyDeviceToHost), name) ? 1.0 * n / rounds : double(NAN);
  };
  add("mma", "m16n8k16, each waits for the one before", clocks("mma latency", mma_chains<1>), "cycles");
  add("mma", "m16n8k16, 4 independent in a warp", clocks("mma of 4 chains", mma_chains<4>) / 4, "cycles");
  add("mma", "m16n8k16, 8 independent in a warp", clocks("mma of 8 chains", mma_chains<8>) / 8, "cycles");
  const Shape all{2 * multiprocessors, 256};
  const double us = median_us("mma rate", [&] { return launch(mma_chains<8>, all, 20000, cycles, out); });
  const double flops = 2.0 * 16 * 8 * 16 * 8 * 20000 * (all.ctas * all.threads / 32);
  add("mma", "m16n8k16 on all multiprocessors", flops / us * 1e-6, "TFLOP/s");
}

// The weights of the fused stages as mma takes them, and as plain matrices [layer][out][in].
struct Network {
  std::vector<__nv_bfloat16> packed;
  std::vector<float> plain, x;

  Network() : packed(kRanks * kLayers * kLayerWords * 8), plain(kLayers * kWidth * kWidth), x(kColumns * kWidth) {
    std::mt19937 made(0);
    std::normal_distribution<float> normal;
    const auto rounded = [](float v) { return __bfloat162float(__float2bfloat16(v)); };
    for (float& w : plain) w = rounded(normal(made) / 8);  // large enough that the sigmoids do not all say one half
    for (float& v : x) v = rounded(normal(made));
    size_t at = 0;
    for (int rank = 0; rank < kRanks; ++rank)
      for (int layer = 0; layer < kLayers; ++layer)
        for (int step = 0; step < kWidth / 16; ++step)
          for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 8; ++e) {  // PTX ISA, fragment A of mma.m16n8k16
              const int row = rank * 16 + lane / 4 + 8 * (e / 2 % 2),
                        k = step * 16 + 2 * (lane % 4) + e % 2 + 8 * (e / 4);
              packed[at++] = __float2bfloat16(plain[(layer * kWidth + row) * kWidth + k]);
            }
  }

  // The activations after `stages` stages, on the host.
  std::vector<float> after(int stages) const {
    std::vector<float> in = x, out(x.size());
    for (int s = 0; s < stages; ++s, std::swap(in, out))
      for (int column = 0; column < kColumns; ++column)
        for (int row = 0; row < kWidth; ++row) {
          const float* w = &plain[(s % kLayers * kWidth + row) * kWidth];
          double sum = 0;
          for (int k = 0; k < kWidth; ++k) sum += 1.0 * w[k] * in[column * kWidth + k];
          out[column * kWidth + row] = __bfloat162float(__float2bfloat16(static_cast<float>(1 / (1 + std::exp(-sum)))));
        }
    return in;
  }
};

void measure_stages() {
  const std::string name = "256 x 256, 8 columns, cluster of 16";
  const Network network;
  std::vector<__nv_bfloat16> x;
  for (float v : network.x) x.push_back(__float2bfloat16(v));
  uint4* weights = nullptr;
  __nv_bfloat16* state = nullptr;
  const size_t weight_bytes = network.packed.size() * sizeof(__nv_bfloat16), x_bytes = x.size() * sizeof x[0];
  if (!ok(cudaMalloc(&weights, weight_bytes), name) || !ok(cudaMalloc(&state, x_bytes), name)) return;
  if (!ok(cudaMemcpy(weights, network.packed.data(), weight_bytes, cudaMemcpyHostToDevice), name)) return;
  if (!ok(cudaMemcpy(state, x.data(), x_bytes, cudaMemcpyHostToDevice), name)) return;
  if (!allow(fused_stages, kStageShared, name)) return;

  const int few = kLayers + 3;
  const std::vector<float> expected = network.after(few);
  if (!ok(launch(fused_stages, {kRanks, kStageThreads, kRanks, false, kStageShared}, weights, state, few), name))
    return;
  if (!ok(cudaMemcpy(x.data(), state, x_bytes, cudaMemcpyDeviceToHost), name)) return;
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) error = std::max(error, 1.0 * std::fabs(__bfloat162float(x[i]) - expected[i]));
  add("stage", name + ", largest error after " + std::to_string(few), error, "", "of values in 0..1");
  if (!(error < 0.05)) report_error("the fused stages compute something else: error " + std::to_string(error));

  const int most = resident_clusters(fused_stages, {kRanks, kStageThreads, kRanks, false, kStageShared}, name);
  add("stage", "clusters of 16 that fit at once", most, "", "200 KB of shared memory a CTA");
  std::vector<int> counts = {1};
  if (most > 1) counts.push_back(most);
  for (int clusters : counts) {
    const Shape shape{kRanks * clusters, kStageThreads, kRanks, false, kStageShared};
    const std::string who = name + ", " + std::to_string(clusters) + " at once";
    const double us = median_us(who, [&] { return launch(fused_stages, shape, weights, state, kRounds); });
    add("stage", who, us / kRounds, "us", us / kRounds > 0.6 ? "over 0.6 us: clusters lose their advantage" : "");
  }
  (void)cudaFree(weights), (void)cudaFree(state);
}

void measure_launches() {
  const int nodes = 40, replays = 200;
  const std::string name = "a node of a graph of " + std::to_string(nodes) + " empty kernels";
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  if (!ok(cudaStreamCreate(&stream), name)) return;
  if (!ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), name)) return;
  for (int i = 0; i < nodes; ++i) nothing<<<1, 32, 0, stream>>>();
  if (!ok(cudaStreamEndCapture(stream, &graph), name) || !ok(cudaGraphInstantiate(&ready, graph, 0), name)) return;
  // On the default stream, where the events are: the graph runs where it is launched.
  double us = median_us(name, [&] {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < replays && error == cudaSuccess; ++i) error = cudaGraphLaunch(ready, nullptr);
    return error;
  });
  add("launch", name, us / (replays * nodes), "us");
  us = median_us("empty kernels in a stream", [&] {
    for (int i = 0; i < 4000; ++i) nothing<<<1, 32>>>();
    return cudaGetLastError();
  });
  add("launch", "an empty kernel in a stream", us / 4000, "us");
  (void)cudaGraphExecDestroy(ready), (void)cudaGraphDestroy(graph), (void)cudaStreamDestroy(stream);
}

bool measure_all(const cudaDeviceProp& p) {
  const size_t bytes = size_t{400} << 20;
  uint32_t *words = nullptr, *out = nullptr;
  uint4* data = nullptr;
  long long* cycles = nullptr;
  float* sums = nullptr;
  if (!ok(cudaMalloc(&words, 1 << 16), "cudaMalloc") || !ok(cudaMalloc(&out, sizeof *out), "cudaMalloc") ||
      !ok(cudaMalloc(&data, bytes), "cudaMalloc") || !ok(cudaMalloc(&cycles, sizeof *cycles), "cudaMalloc") ||
      !ok(cudaMalloc(&sums, sizeof(float) * 256 * 2 * p.multiProcessorCount), "cudaMalloc"))
    return false;
  std::vector<uint32_t> random(bytes / sizeof(uint32_t));
  std::mt19937 made(1);
  for (uint32_t& word : random) word = made();
  if (!ok(cudaMemcpy(data, random.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy")) return false;
  measure_barriers(p.multiProcessorCount, words);
  measure_exchanges(words);
  measure_stages();
  measure_mma(p.multiProcessorCount, cycles, sums);
  measure_launches();
  measure_reads(p.multiProcessorCount, data, bytes, out);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: probe OUT.jsonl\n");
    return 2;
  }
  int count = 0;
  cudaDeviceProp p = {};
  if (!ok(cudaGetDeviceCount(&count), "no CUDA device can be used") ||
      !ok(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties"))
    return 2;
  if (p.major != 9) {
    std::fprintf(stderr, "probe: %s is sm_%d%d; this program is for clusters of sm_90\n", p.name, p.major, p.minor);
    return 3;
  }
  results = std::fopen(argv[1], "a");
  if (!results) {
    std::fprintf(stderr, "probe: cannot write %s\n", argv[1]);
    return 1;
  }
  std::printf("%s, %d multiprocessors, L2 %.0f MB\n", p.name, p.multiProcessorCount, p.l2CacheSize / 1048576.0);
  write_line("{\"probed\": " + quoted(p.name) + ", \"multiprocessors\": " + number(p.multiProcessorCount) +
             ", \"l2_mb\": " + number(p.l2CacheSize / 1048576.0) +
             ", \"shared_bytes\": " + number(static_cast<double>(p.sharedMemPerBlockOptin)) + "}");
  measure_all(p);
  std::fclose(results);
  return errors == 0 ? 0 : 1;
}
