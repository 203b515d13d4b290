/* The kernels for any machine that the compiler targets: SSE2 on x86-64, NEON on aarch64. */
#define KERNELS_TABLE kernels_baseline
#define KERNELS_NAME "baseline"
#include "isa.h"
