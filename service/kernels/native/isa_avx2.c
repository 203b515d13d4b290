/* The kernels for AVX2 with FMA and half conversion (x86-64-v3). */
#include "native.h"

#if defined(HAS_X86_KERNELS)
#if defined(__clang__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define ISA_AVX2 1
#define KERNELS_TABLE kernels_avx2
#define KERNELS_NAME "avx2"
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
