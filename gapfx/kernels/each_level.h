// Compiles GAPFX_BODY once for each level of instructions, in namespaces portable, avx2 and avx512. Bodies use
// GAPFX_LANES (fp32 lanes of a register), GAPFX_FN for functions and GAPFX_INLINE for what is always inlined.
// No include guard: each source includes it once for its body.

#include "cpu.h"

#if GAPFX_X86
// GCC 12 warns of its own undefined registers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

namespace portable {
#define GAPFX_LANES 4
#define GAPFX_FN static
#define GAPFX_INLINE static inline __attribute__((always_inline))
#include "lanes_body.h"
#include GAPFX_BODY
#undef GAPFX_LANES
#undef GAPFX_FN
#undef GAPFX_INLINE
}  // namespace portable

#if GAPFX_X86

namespace avx2 {
#define GAPFX_LANES 8
#define GAPFX_FN __attribute__((target("avx2,fma,popcnt,bmi,bmi2"))) static
#define GAPFX_INLINE __attribute__((target("avx2,fma,popcnt,bmi,bmi2"), always_inline)) static inline
#include "lanes_body.h"
#include GAPFX_BODY
#undef GAPFX_LANES
#undef GAPFX_FN
#undef GAPFX_INLINE
}  // namespace avx2

namespace avx512 {
#define GAPFX_512 "avx2,fma,popcnt,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2"
#define GAPFX_LANES 16
#define GAPFX_FN __attribute__((target(GAPFX_512))) static
#define GAPFX_INLINE __attribute__((target(GAPFX_512), always_inline)) static inline
#include "lanes_body.h"
#include GAPFX_BODY
#undef GAPFX_LANES
#undef GAPFX_FN
#undef GAPFX_INLINE
#undef GAPFX_512
}  // namespace avx512

#endif

}  // namespace
