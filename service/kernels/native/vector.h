/* Vectors of the instruction set that the including file is compiled for, written once with the compilers' vector extensions.
 *
 * WIDTH floats a vector: 16 with AVX-512, 8 with AVX2, 4 elsewhere (SSE2, NEON). Loads and stores take any alignment and convert from
 * and to the element type in memory; rounding is to nearest even. Invariant: arithmetic on lanes is the same at every width; only the
 * order of sums across lanes depends on it.
 */
#ifndef DEEPSEEK_VECTOR_H
#define DEEPSEEK_VECTOR_H

#include <math.h>
#include <string.h>

#include "native.h"

#if defined(HAS_X86_KERNELS)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(ISA_AVX512)
#define WIDTH 16
#elif defined(ISA_AVX2)
#define WIDTH 8
#else
#define WIDTH 4
#endif

/* Whether products of bfloat16 pairs are compiled; the processor must have them besides (AVX512-BF16, Cooper Lake and Zen 4 on). */
#if defined(ISA_AVX512) && defined(__GNUC__) && !defined(__clang__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

/* Whether bytes are multiplied and summed by fours. */
#if defined(ISA_AVX512) || defined(ISA_AVX2) || defined(ISA_DOTPROD)
#define HAS_DOTS 1
#else
#define HAS_DOTS 0
#endif

typedef float vfloat __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vint __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vuint __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t vhalf __attribute__((vector_size(WIDTH * 2)));
typedef int8_t vbyte __attribute__((vector_size(WIDTH)));

INLINE vfloat splat(float x) { return x - (vfloat){0}; }
INLINE vfloat pick(vint mask, vfloat yes, vfloat no) { return (vfloat)(((vint)yes & mask) | ((vint)no & ~mask)); }
INLINE vfloat vmaximum(vfloat a, vfloat b) { return pick(a > b, a, b); }

INLINE vfloat load_float(const float *p) {
    vfloat x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_float(float *p, vfloat x) { memcpy(p, &x, sizeof x); }

INLINE vfloat widen_bfloat16(vhalf h) { return (vfloat)(__builtin_convertvector(h, vuint) << 16); }
INLINE vhalf narrow_bfloat16(vfloat x) {
    vuint bits = (vuint)x;
    vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vuint nan = (vuint)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40u) & nan), vhalf);
}

INLINE vfloat widen_float16(vhalf h) {
#if defined(ISA_AVX512)
    return (vfloat)_mm512_cvtph_ps((__m256i)h);
#elif defined(ISA_AVX2)
    return (vfloat)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (vfloat)vcvt_f32_f16((float16x4_t)h);
#else
    /* Exponent and mantissa moved into place are too small by 2^112, subnormals included; an exponent of all ones stays that. */
    vuint bits = __builtin_convertvector(h, vuint);
    vuint magnitude = (bits & 0x7fffu) << 13;
    vfloat scaled = (vfloat)magnitude * splat(0x1p112f);
    vuint special = (vuint)((bits & 0x7c00u) == 0x7c00u);
    vuint value = ((vuint)scaled & ~special) | ((magnitude | 0x7f800000u) & special);
    return (vfloat)(value | ((bits & 0x8000u) << 16));
#endif
}
INLINE vhalf narrow_float16(vfloat x) {
#if defined(ISA_AVX512)
    return (vhalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(ISA_AVX2)
    return (vhalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (vhalf)vcvt_f16_f32((float32x4_t)x);
#else
    vuint bits = (vuint)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    /* From 2^-14 on: drop 13 bits with rounding. Below: adding 1/2 leaves the subnormal's bits, rounded, at the bottom of the sum. */
    vuint normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    vuint small = (vuint)((vfloat)magnitude + splat(0.5f)) - (vuint)splat(0.5f);
    vuint is_small = (vuint)(magnitude < 0x38800000u), is_large = (vuint)(magnitude >= 0x477ff000u), nan = (vuint)(x != x);
    vuint half = (small & is_small) | (normal & ~is_small);
    half = (half & ~is_large) | (0x7c00u & is_large) | (0x0200u & nan);
    return __builtin_convertvector(half | sign, vhalf);
#endif
}

/* One of them, in registers: what is stored in pieces and loaded as a whole has to be waited for. */
INLINE float widen_half(uint16_t h) { return widen_float16((vhalf){h})[0]; }

/* Written out for x86: of the conversion of a whole vector GCC 12 makes one of each byte. */
INLINE vfloat widen_bytes(const int8_t *p) {
#if defined(ISA_AVX512)
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(ISA_AVX2)
    return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vbyte b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vint), vfloat);
#endif
}

/* Elements at p + i of type `type`, which is constant where this is inlined. */
INLINE vfloat load(enum element type, const void *p, int64_t i) {
    if (type == FLOAT32) return load_float((const float *)p + i);
    vhalf h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return type == BFLOAT16 ? widen_bfloat16(h) : widen_float16(h);
}
INLINE void store(enum element type, void *p, int64_t i, vfloat x) {
    if (type == FLOAT32) {
        store_float((float *)p + i, x);
        return;
    }
    vhalf h = type == BFLOAT16 ? narrow_bfloat16(x) : narrow_float16(x);
    memcpy((uint16_t *)p + i, &h, sizeof h);
}

/* The last count <= WIDTH elements; lanes past them are 0 and are not touched in memory. */
INLINE vfloat load_some(enum element type, const void *p, int64_t i, int64_t count) {
    if (count == WIDTH) return load(type, p, i);
    size_t bytes = type == FLOAT32 ? 4 : 2;
    unsigned char buffer[WIDTH * 4] = {0};
    memcpy(buffer, (const unsigned char *)p + i * bytes, count * bytes);
    return load(type, buffer, 0);
}
INLINE void store_some(enum element type, void *p, int64_t i, vfloat x, int64_t count) {
    if (count == WIDTH) {
        store(type, p, i, x);
        return;
    }
    size_t bytes = type == FLOAT32 ? 4 : 2;
    unsigned char buffer[WIDTH * 4];
    store(type, buffer, 0, x);
    memcpy((unsigned char *)p + i * bytes, buffer, count * bytes);
}

INLINE float sum_lanes(vfloat x) {
#if defined(ISA_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float lanes[WIDTH];
    store_float(lanes, x);
    for (int width = WIDTH / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
INLINE float maximum_of_lanes(vfloat x) {
#if defined(ISA_AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#endif
    float lanes[WIDTH];
    store_float(lanes, x);
    for (int width = WIDTH / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

/* 2^r for -1/2 .. 1/2: the factors of a polynomial, the highest power first, to within 2 units in the last place. */
static const float EXP2[] = {0x1.430912p-13f, 0x1.5d87fep-10f, 0x1.3b2ab6p-7f, 0x1.c6b08ep-5f, 0x1.ebfbe0p-3f, 0x1.62e430p-1f, 1.0f};
#define EXP2_TERMS 7

INLINE vfloat polynomial(vfloat r, const float *factors, const int terms) {
    vfloat y = splat(factors[0]);
#pragma GCC unroll 8
    for (int i = 1; i < terms; i++) y = y * r + splat(factors[i]);
    return y;
}

#if defined(ISA_AVX512)
/* 2^x by a polynomial, 0 for -infinity. */
INLINE __m512 exp2_by(__m512 x, const float *factors, const int terms) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps((__m512)polynomial((vfloat)_mm512_sub_ps(x, whole), factors, terms), whole);
}
INLINE __m512 exp2_lanes(__m512 x) { return exp2_by(x, EXP2, EXP2_TERMS); }
#endif

/* 2^x to within 2 units in the last place; 0 below 2^-126 (but with AVX-512), infinity from 2^128 on, NaN stays NaN. */
INLINE vfloat vexp2(vfloat x) {
#if defined(ISA_AVX512)
    return (vfloat)exp2_lanes((__m512)x);
#else
    vint zero = x < splat(-126.0f), large = x >= splat(128.0f);
    x = pick(zero | large, splat(0.0f), x);
    vfloat shifted = x + splat(0x1.8p23f); /* its low bits are the nearest integer */
    vfloat r = x - (shifted - splat(0x1.8p23f));
    vfloat scaled = (vfloat)((vint)polynomial(r, EXP2, EXP2_TERMS) + ((vint)shifted << 23));
    return pick(large, splat(INFINITY), pick(zero, splat(0.0f), scaled));
#endif
}

#define LOG2_E 1.4426950408889634f

#endif
