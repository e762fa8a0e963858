// Products of few tokens with live values whose columns are known by number, at each level of instructions.

#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "decode.h"

#define GAPFX_BODY "decode_numbered_body.h"
#include "each_level.h"

namespace gapfx::decode {

Rows numbered_rows() {
#if GAPFX_X86
  if (level() == kAvx512) return avx512::numbered;
  if (level() == kAvx2) return avx2::numbered;
#endif
  return portable::numbered;
}

}  // namespace gapfx::decode
