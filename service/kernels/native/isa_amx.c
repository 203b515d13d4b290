/* The kernels for AVX-512 with VNNI, bfloat16 and AMX's tiles of int8 and bfloat16 (Sapphire Rapids and later). */
#include "native.h"

#if defined(HAS_AMX_KERNELS)
#if defined(__clang__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16,prefer-vector-width=512")
#endif
#define ISA_AVX512 1
#define ISA_AMX 1
#define KERNELS_TABLE kernels_amx
#define KERNELS_NAME "amx"
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
