// Which instructions the kernels may use, and what their sources share.
//
// A source that is compiled for several levels includes its body once for each: the body's functions are static, in a
// namespace of the level, and compiled with the level's instructions. What is exported calls the one for `level()`.

#pragma once

#include <cstdint>

#define GAPFX_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__)
#define GAPFX_X86 1
#else
#define GAPFX_X86 0
#endif

namespace gapfx {

// AVX2 stands for Haswell's instructions (popcnt, bmi and fma with it), AVX-512 for Ice Lake's and Zen 4's.
enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that this processor has, unless `gapfx_use_level` says less.
Level level();

}  // namespace gapfx
