// The smallest test kit: CHECK counts and prints failures, report() turns them into an exit status.
#pragma once
#include <cstdio>
#include <string>

inline int failures = 0;

// CHECK(condition, "printf format of what to add", values...)
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s  ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      ++failures;                                                 \
    }                                                             \
  } while (false)

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
