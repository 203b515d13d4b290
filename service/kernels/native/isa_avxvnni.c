/* The kernels for AVX2 with VNNI in 256 bits (Alder Lake and later, Gracemont: processors without AVX-512). */
#include "native.h"

#if defined(HAS_AVX_VNNI_KERNELS)
#if defined(__clang__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avxvnni")
#endif
#define ISA_AVX2 1
#define ISA_AVX_VNNI 1
#define KERNELS_TABLE kernels_avxvnni
#define KERNELS_NAME "avxvnni"
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
