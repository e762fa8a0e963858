// The level of instructions in use.

#include "cpu.h"

namespace gapfx {

namespace {

Level detect() {
#if GAPFX_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2"))
    return kAvx512;
  if (has_avx2) return kAvx2;
#endif
  return kPortable;
}

const Level found = detect();
Level used = found;

}  // namespace

Level level() { return used; }

}  // namespace gapfx

// Changes with the signatures of exported functions: a library of another version is not used.
GAPFX_API int gapfx_abi(void) { return 5; }

// The level in use, see gapfx_use_level.
GAPFX_API int gapfx_level(void) { return gapfx::level(); }

// 0 portable, 1 AVX2, 2 AVX-512; the best for a number below 0. A level that this processor lacks is not taken.
// Returns the one in use.
GAPFX_API int gapfx_use_level(int level) {
  using namespace gapfx;
  used = level < 0 || level > found ? found : static_cast<Level>(level);
  return used;
}
