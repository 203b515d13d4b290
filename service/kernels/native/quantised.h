/* Products of int8 activations with int8 and int4 weights by AVX-512, 16 outputs a vector, by VNNI's dot products of four.
 *
 * dpbusd takes the weights as the unsigned operand, so what the offset of strips adds depends on the row alone: 128 (or 8) times the sum of
 * its activations. Where vectors are shorter see quantised_short.h; invariants and layout are those of quantised_strips.h.
 */
#ifndef DEEPSEEK_QUANTISED_H
#define DEEPSEEK_QUANTISED_H

#include "quantised_strips.h"

#if defined(ISA_AVX512)
#include <immintrin.h>
#include <string.h>

INLINE __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0; }

/* The largest magnitude of a row: of its bits, so that what is not a number stays. */
INLINE float largest_magnitude(const float *x, int64_t inputs) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i tops[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 64 <= inputs; i += 64)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++)
            tops[part] = _mm512_max_epu32(tops[part], _mm512_and_si512(magnitude, _mm512_loadu_si512(x + i + 16 * part)));
    for (; i < inputs; i += 16)
        tops[0] = _mm512_max_epu32(tops[0], _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(first_of(inputs - i), x + i)));
    uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_max_epu32(tops[0], tops[1]), _mm512_max_epu32(tops[2], tops[3])));
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    return largest;
}

/* Quantise one row to -127 .. 127: its largest magnitude over 127 is the scale; sums of each `group` inputs. Runs of 64 come `line` bytes
 * apart. */
static float quantise_row(const float *x, int64_t inputs, int64_t padded, int64_t group, int8_t *out, int64_t line, int32_t *sums) {
    const float largest = largest_magnitude(x, inputs);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    for (int64_t begin = 0; begin < padded; begin += group) {
        const int64_t end = begin + group < padded ? begin + group : padded;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = begin; i < end; i += 16) {
            int8_t *to = out + (i >> 6) * line + (i & 63);
            const int whole = i + 16 <= inputs && i + 16 <= end; /* masked stores of bytes take long */
            const __m512 from = whole ? _mm512_loadu_ps(x + i) : _mm512_maskz_loadu_ps(first_of(inputs - i), x + i);
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(from, inverse));
            sum = _mm512_add_epi32(sum, value);
            if (whole)
                _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(value));
            else
                _mm_mask_storeu_epi8(to, first_of(end - i), _mm512_cvtepi32_epi8(value));
        }
        *sums++ = _mm512_reduce_add_epi32(sum);
    }
    return largest / 127.0f;
}

/* sum + dot products of four: written out, since GCC 12 moves every sum to another register and back around its own intrinsic. Where
 * memory is waited for that costs nothing, and the compiler may then place loads as it likes (products of int8). */
INLINE __m512i add_dots(__m512i sum, __m512i not_negative, __m512i any) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(not_negative), "v"(any));
    return sum;
}

INLINE __m512i four_inputs(const int8_t *x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return _mm512_set1_epi32(value);
}

/* Write up to 16 results of one row, the bias added. */
INLINE void put_outputs(__m512 value, const struct product *p, int64_t row, int64_t output) {
    int64_t count = p->outputs - output;
    if (count <= 0) return;
    const __mmask16 mask = first_of(count);
    if (p->bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, p->bias + output));
    _mm512_mask_storeu_ps(p->out + row * p->outputs + output, mask, value);
}

/* What sums of a row and 16 outputs stand for, the bias of those in the mask added: one rounding, wherever this is inlined. */
INLINE __m512 int8_values(__m512i sums, __m512i offset, __m512 row_scale, const struct product *p, int64_t output, __mmask16 there) {
    const __m512 scale = _mm512_mul_ps(row_scale, _mm512_loadu_ps(p->scales + output));
    const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(there, p->bias + output) : _mm512_setzero_ps();
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, offset)), scale, bias);
}

INLINE void put_int8(__m512i sums, __m512i offset, __m512 row_scale, const struct product *p, int64_t row, int64_t output) {
    const int64_t count = p->outputs - output;
    if (count <= 0) return;
    const __mmask16 there = first_of(count);
    _mm512_mask_storeu_ps(p->out + row * p->outputs + output, there, int8_values(sums, offset, row_scale, p, output, there));
}

/* Strips beyond the last are the last once more; their results are not written. */
#define STRIP(r, c) const uint8_t *p##c = weight + (c < have ? c : have - 1) * strip;
#define ZERO_8(r, c) __m512i a##r##_##c = _mm512_setzero_si512();
#define LOAD_8(r, c) const __m512i w##c = _mm512_loadu_si512(p##c + 64 * i);
#define DOT_8(r, c) a##r##_##c = _mm512_dpbusd_epi32(a##r##_##c, w##c, value);
#define PUT_8(r, c) put_int8(a##r##_##c, offset, row_scale, p, row + r, output + 16 * c);
#define ZERO_ROW_8(r, S) S(ZERO_8, r)
#define DOT_ROW_8(r, S)                                              \
    {                                                                \
        const __m512i value = four_inputs(x + (r) * padded + 4 * i); \
        S(DOT_8, r)                                                  \
    }
#define PUT_ROW_8(r, S)                                                     \
    {                                                                       \
        const __m512i offset = _mm512_set1_epi32(128 * p->x_sums[row + r]); \
        const __m512 row_scale = _mm512_set1_ps(p->x_scales[row + r]);      \
        S(PUT_8, r)                                                         \
    }
#define TILE_8(R, C)                                                                                            \
    static void int8_tile_##R##x##C(const struct product *p, int64_t row, int64_t output, struct ahead ahead) { \
        const int64_t padded = p->padded, strip = 16 * padded, have = (p->outputs - output + 15) / 16;          \
        const uint8_t *weight = p->weight + output * padded;                                                    \
        const int8_t *x = p->x + row * padded;                                                                  \
        STRIPS_##C(STRIP, 0)                                                                                    \
        ROWS_##R(ZERO_ROW_8, STRIPS_##C)                                                                        \
        for (int64_t i = 0; i < padded / 4; i++) {                                                              \
            ahead = fetch(ahead);                                                                               \
            STRIPS_##C(LOAD_8, 0)                                                                               \
            ROWS_##R(DOT_ROW_8, STRIPS_##C)                                                                     \
        }                                                                                                       \
        ROWS_##R(PUT_ROW_8, STRIPS_##C)                                                                         \
    }
TILE_8(1, 4)
TILE_8(2, 4)
TILE_8(3, 4)
TILE_8(4, 4)
TILE_8(5, 4)
TILE_8(6, 4)
TILE_8(6, 3)
TILE_8(7, 3)
TILE_8(8, 3)

/* Int4: the sums of a group start at -8 times the sum of its activations and enter the float result with the group's scale. */
#define ZERO_4(r, c) __m512 f##r##_##c = _mm512_setzero_ps();
#define START_4(r, c) __m512i a##r##_##c = offset##r;
#define LOAD_4(r, c)                                                                      \
    const __m512i w##c = _mm512_loadu_si512(p##c + 64 * i), l##c = _mm512_and_si512(w##c, low_half), \
                  h##c = _mm512_and_si512(_mm512_srli_epi16(w##c, 4), low_half);
#define DOT_4(r, c) \
    a##r##_##c = add_dots(add_dots(a##r##_##c, l##c, first), h##c, second);
#define SCALE_4(r, c) const __m512 s##c = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p##c + 256)));
#define ADD_4(r, c) f##r##_##c = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a##r##_##c), s##c, f##r##_##c);
#define NEXT_4(r, c) p##c += 288;
#define PUT_4(r, c) put_outputs(_mm512_mul_ps(f##r##_##c, row_scale), p, row + r, output + 16 * c);
#define ZERO_ROW_4(r, S) S(ZERO_4, r)
#define START_ROW_4(r, S)                                                     \
    const __m512i offset##r = _mm512_set1_epi32(-8 * sums[(r) * groups + g]); \
    S(START_4, r)
#define DOT_ROW_4(r, S)                                                                                                         \
    {                                                                                                                           \
        const __m512i first = four_inputs(x + (r) * padded + 8 * i), second = four_inputs(x + (r) * padded + 8 * i + 4);        \
        S(DOT_4, r)                                                                                                             \
    }
#define ADD_ROW_4(r, S) S(ADD_4, r)
#define PUT_ROW_4(r, S)                                                \
    {                                                                  \
        const __m512 row_scale = _mm512_set1_ps(p->x_scales[row + r]); \
        S(PUT_4, r)                                                    \
    }
#define TILE_4(R, C)                                                                                            \
    static void int4_tile_##R##x##C(const struct product *p, int64_t row, int64_t output, struct ahead ahead) { \
        const int64_t padded = p->padded, groups = padded / GROUP, strip = 288 * groups;                        \
        const int64_t have = (p->outputs - output + 15) / 16;                                                   \
        const uint8_t *weight = p->weight + output / 16 * strip;                                                \
        const int8_t *x = p->x + row * padded;                                                                  \
        const int32_t *sums = p->x_sums + row * groups;                                                         \
        const __m512i low_half = _mm512_set1_epi8(15);                                                          \
        STRIPS_##C(STRIP, 0)                                                                                    \
        ROWS_##R(ZERO_ROW_4, STRIPS_##C)                                                                        \
        for (int64_t g = 0; g < groups; g++, x += GROUP) {                                                      \
            ROWS_##R(START_ROW_4, STRIPS_##C)                                                                   \
            for (int64_t i = 0; i < GROUP / 8; i++) {                                                           \
                ahead = fetch(ahead);                                                                           \
                STRIPS_##C(LOAD_4, 0)                                                                           \
                ROWS_##R(DOT_ROW_4, STRIPS_##C)                                                                 \
            }                                                                                                   \
            STRIPS_##C(SCALE_4, 0)                                                                              \
            ROWS_##R(ADD_ROW_4, STRIPS_##C)                                                                     \
            STRIPS_##C(NEXT_4, 0)                                                                               \
        }                                                                                                       \
        ROWS_##R(PUT_ROW_4, STRIPS_##C)                                                                         \
    }
TILE_4(1, 4)
TILE_4(2, 4)
TILE_4(3, 2)
TILE_4(4, 2)
TILE_4(5, 2)
TILE_4(6, 2)

#define TILES_8 {8, 6, 4, 3}
#define TILES_4 {6, 2, 4, 2}
static const tile INT8_WIDE[] = {NULL, int8_tile_1x4, int8_tile_2x4, int8_tile_3x4, int8_tile_4x4, int8_tile_5x4, int8_tile_6x4};
static const tile INT8_TALL[] = {NULL, NULL, NULL, NULL, NULL, NULL, int8_tile_6x3, int8_tile_7x3, int8_tile_8x3};
static const tile INT4_WIDE[] = {NULL, int4_tile_1x4, int4_tile_2x4};
static const tile INT4_TALL[] = {NULL, NULL, int4_tile_2x4, int4_tile_3x2, int4_tile_4x2, int4_tile_5x2, int4_tile_6x2};

static void int8_strips(const struct product *p, int64_t begin, int64_t end, struct upcoming after) {
    product_strips(p, begin, end, tile_strips(p) == p->shape->tall ? INT8_TALL : INT8_WIDE, after);
}

static void int4_strips(const struct product *p, int64_t begin, int64_t end, struct upcoming after) {
    product_strips(p, begin, end, tile_strips(p) == p->shape->tall ? INT4_TALL : INT4_WIDE, after);
}

#endif
#endif
