/* The kernels for AVX-512 with its byte, word and length extensions and VNNI (Cascade Lake, Ice Lake, Zen 4 and later). */
#include "native.h"

#if defined(HAS_X86_KERNELS)
#if defined(__clang__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#define ISA_AVX512 1
#define KERNELS_TABLE kernels_avx512
#define KERNELS_NAME "avx512"
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
