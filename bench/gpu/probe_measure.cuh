// How the probe measures, and how it writes what it found: JSON lines, flushed one by one.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace probe {

inline std::FILE* results = nullptr;  // JSON lines
inline int errors = 0;

inline std::string number(double v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", v);
  return std::isfinite(v) ? text : "null";
}

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

inline void write_line(const std::string& object) {
  if (!results) return;
  std::fprintf(results, "%s\n", object.c_str());
  std::fflush(results);
}

inline void report_error(const std::string& what) {
  ++errors;
  std::fprintf(stderr, "probe: error: %s\n", what.c_str());
  write_line("{\"error\": " + quoted(what) + "}");
}

inline bool ok(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return true;
  (void)cudaGetLastError();
  report_error(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
  return false;
}

inline void add(const std::string& group, const std::string& name, double value, const std::string& unit,
                const std::string& note = "") {
  write_line("{\"group\": " + quoted(group) + ", \"name\": " + quoted(name) + ", \"value\": " + number(value) +
             ", \"unit\": " + quoted(unit) + ", \"note\": " + quoted(note) + "}");
  std::printf("%-9s %-52s %10.3f %-10s %s\n", group.c_str(), name.c_str(), value, unit.c_str(), note.c_str());
  std::fflush(stdout);
}

// Median microseconds of `launch` on the default stream, after one launch that does not count; NaN if it fails.
inline double median_us(const std::string& what, const std::function<cudaError_t()>& launch, int repeats = 5) {
  std::vector<double> times;
  cudaEvent_t begin, end;
  if (!ok(cudaEventCreate(&begin), what) || !ok(cudaEventCreate(&end), what)) return NAN;
  for (int i = 0; i <= repeats; ++i) {
    float ms = NAN;
    if (!ok(cudaEventRecord(begin), what) || !ok(launch(), what) || !ok(cudaEventRecord(end), what) ||
        !ok(cudaEventSynchronize(end), what) || !ok(cudaEventElapsedTime(&ms, begin, end), what))
      return NAN;
    if (i > 0) times.push_back(1e3 * ms);
  }
  (void)cudaEventDestroy(begin), (void)cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

struct Shape {
  int ctas, threads;
  int cluster = 1;
  bool cooperative = false;
  size_t shared = 0;
};

struct Config {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  explicit Config(const Shape& s) {
    config.gridDim = dim3(s.ctas), config.blockDim = dim3(s.threads), config.dynamicSmemBytes = s.shared;
    if (s.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(s.cluster), 1, 1};
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = s.cooperative;
    }
    config.attrs = &attribute, config.numAttrs = 1;
  }
  Config(const Config&) = delete;  // it points into itself
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const Shape& shape, A... arguments) {
  const Config c(shape);
  return cudaLaunchKernelEx(&c.config, kernel, static_cast<P>(arguments)...);
}

// What a kernel may ask for beyond the portable: clusters over 8, shared memory over 48 KB.
template <class K>
bool allow(K* kernel, size_t shared, const std::string& what) {
  return ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            what) &&
         ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
}

template <class K>
int resident_clusters(K* kernel, const Shape& shape, const std::string& what) {
  const Config c(shape);
  int count = 0;
  return ok(cudaOccupancyMaxActiveClusters(&count, kernel, &c.config), what) ? count : 0;
}

}  // namespace probe
