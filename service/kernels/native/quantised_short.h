/* Products of int8 activations with int8 and int4 weights where a vector is shorter than a strip: AVX2, with and without VNNI, and
 * aarch64's dot products.
 *
 * A strip of quantised_strips.h is PARTS vectors wide. Layout and invariants are those of that file: the integer sums are exact, also by AVX2, whose
 * products of bytes are added in pairs of 16 bits that saturate.
 */
#ifndef DEEPSEEK_QUANTISED_SHORT_H
#define DEEPSEEK_QUANTISED_SHORT_H

#include "quantised_strips.h"
#include "vector.h"

#if HAS_DOTS && !defined(ISA_AVX512)
#define PARTS (16 / WIDTH)
#define WHOLE_BYTES (4 * WIDTH)

INLINE vint splat_int(int32_t x) { return x - (vint){0}; }
INLINE vint load_words(const void *p) {
    vint x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* `nearest` rounds to nearest even, multiply_add once. add_fours: sum + weights times x, by fours of bytes, of weights that are ADDED more than they
 * stand for; `flip` makes those of what is stored. add_nibbles: the same of weights 0 .. 15 for the GROUP inputs of a group, after which whole_sums are
 * their sums. */
#if defined(ISA_AVX2)
INLINE vint nearest(vfloat x) { return (vint)_mm256_cvtps_epi32((__m256)x); }
INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#if defined(ISA_AVX_VNNI)
#define ADDED 128
INLINE vint flip(vint stored) { return stored; }
INLINE vint add_fours(vint sum, vint weights, vint x) { return (vint)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x); }
INLINE vint add_nibbles(vint sum, vint nibbles, vint x) { return add_fours(sum, nibbles, x); }
INLINE vint whole_sums(vint sum) { return sum; }
#else
#define ADDED 0
INLINE vint flip(vint stored) { return stored ^ (int32_t)0x80808080u; }
/* The sign of x goes to the weight: pairs are then 2 * 127 * 127 at most, which 16 bits hold. */
INLINE vint add_fours(vint sum, vint weights, vint x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8((__m256i)weights, (__m256i)x));
    return sum + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
/* A half word is 16 products of a group at most, 16 * 15 * 127. */
INLINE vint add_nibbles(vint sum, vint nibbles, vint x) {
    return (vint)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)nibbles, (__m256i)x));
}
INLINE vint whole_sums(vint sum) { return (vint)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#endif
#else
#define ADDED 0
INLINE vint flip(vint stored) { return stored ^ (int32_t)0x80808080u; }
INLINE vint nearest(vfloat x) { return (vint)vcvtnq_s32_f32((float32x4_t)x); }
INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vint add_fours(vint sum, vint weights, vint x) { return (vint)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, (int8x16_t)x); }
INLINE vint add_nibbles(vint sum, vint nibbles, vint x) { return add_fours(sum, nibbles, x); }
INLINE vint whole_sums(vint sum) { return sum; }
#endif

/* The largest magnitude of a row: of its bits, so that what is not a number stays. */
INLINE float largest_magnitude(const float *x, int64_t inputs) {
    vint top = {0};
    for (int64_t i = 0; i < inputs; i += WIDTH) {
        const vint bits = (vint)load_some(FLOAT32, x, i, inputs - i < WIDTH ? inputs - i : WIDTH) & 0x7fffffff;
        const vint more = bits > top;
        top = (bits & more) | (top & ~more);
    }
    int32_t bits = 0;
    for (int i = 0; i < WIDTH; i++) bits = top[i] > bits ? top[i] : bits;
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    return largest;
}

/* Quantise one row to -127 .. 127: its largest magnitude over 127 is the scale; sums of each `group` inputs. Runs of 64 come `line` bytes
 * apart. */
static float quantise_row(const float *x, int64_t inputs, int64_t padded, int64_t group, int8_t *out, int64_t line, int32_t *sums) {
    const float largest = largest_magnitude(x, inputs);
    const vfloat inverse = splat(largest > 0 ? 127.0f / largest : 0.0f);
    for (int64_t begin = 0; begin < padded; begin += group) {
        const int64_t end = begin + group < padded ? begin + group : padded;
        vint sum = {0};
        for (int64_t i = begin; i < end; i += WIDTH) {
            const int64_t count = end - i < WIDTH ? end - i : WIDTH, there = inputs - i < count ? inputs - i : count;
            const vint value = nearest(there > 0 ? load_some(FLOAT32, x, i, there) * inverse : splat(0.0f));
            const vbyte bytes = __builtin_convertvector(value, vbyte);
            sum += value;
            memcpy(out + (i >> 6) * line + (i & 63), &bytes, count);
        }
        int32_t total = 0;
        for (int i = 0; i < WIDTH; i++) total += sum[i];
        *sums++ = total;
    }
    return largest / 127.0f;
}

INLINE vint four_inputs(const int8_t *x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return splat_int(value);
}

/* Write the results of one row for the outputs of a vector that there are. */
INLINE void put_outputs(vfloat value, const struct product *p, int64_t row, int64_t output) {
    const int64_t left = p->outputs - output, count = left < WIDTH ? left : WIDTH;
    if (count > 0) store_some(FLOAT32, p->out, row * p->outputs + output, value, count);
}
INLINE vfloat bias_of(const struct product *p, int64_t output) {
    const int64_t left = p->outputs - output, count = left < WIDTH ? left : WIDTH;
    return p->bias && count > 0 ? load_some(FLOAT32, p->bias, output, count) : splat(0.0f);
}
INLINE void put_int8(vint sums, vfloat row_scale, const struct product *p, int64_t row, int64_t output) {
    if (output >= p->outputs) return;
    const vfloat scale = row_scale * load_float(p->scales + output);
    put_outputs(multiply_add(__builtin_convertvector(sums, vfloat), scale, bias_of(p, output)), p, row, output);
}

/* A tile is R rows times the vectors of one strip (ONE) or two (TWO), named as in quantised_strips.h. Of two strips the second may lie beyond the
 * last: it is the first once more then, and not written. */
#if WIDTH == 8
#define ONE STRIPS_2
#define TWO STRIPS_4
#else
#define ONE STRIPS_4
#define TWO(X, r) STRIPS_4(X, r) X(r, 4) X(r, 5) X(r, 6) X(r, 7)
#endif
#define BYTES_OF(c) ((c) < PARTS ? first : second) + (c) % PARTS * WHOLE_BYTES
#define ZERO(r, c) vint a##r##_##c = {0};
#define ZERO_ROW(r, S) S(ZERO, r)

#define LOAD_8(r, c) const vint w##c = flip(load_words(BYTES_OF(c) + 64 * i));
#define DOT_8(r, c) a##r##_##c = add_fours(a##r##_##c, w##c, value);
#define PUT_8(r, c) put_int8(a##r##_##c - offset, row_scale, p, row + r, output + WIDTH * c);
#define DOT_ROW_8(r, S)                                             \
    {                                                               \
        const vint value = four_inputs(x + (r) * padded + 4 * i);   \
        S(DOT_8, r)                                                 \
    }
#define PUT_ROW_8(r, S)                                       \
    {                                                         \
        const vint offset = splat_int(ADDED * p->x_sums[row + r]); \
        const vfloat row_scale = splat(p->x_scales[row + r]); \
        S(PUT_8, r)                                           \
    }
#define TILE_8(R, S)                                                                                            \
    static void int8_tile_##R(const struct product *p, int64_t row, int64_t output, struct ahead ahead) {       \
        const int64_t padded = p->padded;                                                                       \
        const uint8_t *first = p->weight + output * padded, *second = output + 16 < p->outputs ? first + 16 * padded : first; \
        const int8_t *x = p->x + row * padded;                                                                  \
        ROWS_##R(ZERO_ROW, S)                                                                                   \
        for (int64_t i = 0; i < padded / 4; i++) {                                                              \
            ahead = fetch(ahead);                                                                               \
            S(LOAD_8, 0)                                                                                        \
            ROWS_##R(DOT_ROW_8, S)                                                                              \
        }                                                                                                       \
        ROWS_##R(PUT_ROW_8, S)                                                                                  \
        (void)second;                                                                                           \
    }
TILE_8(1, TWO)
TILE_8(2, TWO)
TILE_8(3, ONE)
TILE_8(4, ONE)

/* Int4: the sums of a group, less 8 times that of its activations, enter the float result with the group's scale. */
#define ZERO_4(r, c) vfloat f##r##_##c = splat(0.0f);
#define LOAD_4(r, c)                                          \
    const vint w##c = load_words(BYTES_OF(c) + 64 * i), l##c = w##c & low_half, h##c = (vint)((vuint)w##c >> 4) & low_half;
#define DOT_4(r, c) a##r##_##c = add_nibbles(add_nibbles(a##r##_##c, l##c, before), h##c, after);
#define SCALE_4(r, c) const vfloat s##c = load(FLOAT16, ((c) < PARTS ? first : second) + 256, (c) % PARTS * WIDTH);
#define ADD_4(r, c) f##r##_##c = multiply_add(__builtin_convertvector(whole_sums(a##r##_##c) - offset, vfloat), s##c, f##r##_##c);
#define PUT_4(r, c) put_outputs(f##r##_##c * row_scale + bias_of(p, output + WIDTH * c), p, row + r, output + WIDTH * c);
#define ZERO_ROW_4(r, S) S(ZERO_4, r)
#define DOT_ROW_4(r, S)                                                                                                          \
    {                                                                                                                            \
        const vint before = four_inputs(x + (r) * padded + 8 * i), after = four_inputs(x + (r) * padded + 8 * i + 4);            \
        S(DOT_4, r)                                                                                                              \
    }
#define ADD_ROW_4(r, S)                                            \
    {                                                              \
        const vint offset = splat_int(8 * sums[(r) * groups + g]); \
        S(ADD_4, r)                                                \
    }
#define PUT_ROW_4(r, S)                                       \
    {                                                         \
        const vfloat row_scale = splat(p->x_scales[row + r]); \
        S(PUT_4, r)                                           \
    }
#define TILE_4(R, S)                                                                                            \
    static void int4_tile_##R(const struct product *p, int64_t row, int64_t output, struct ahead ahead) {       \
        const int64_t padded = p->padded, groups = padded / GROUP, strip = 288 * groups;                        \
        const uint8_t *first = p->weight + output / 16 * strip, *second = output + 16 < p->outputs ? first + strip : first; \
        const int8_t *x = p->x + row * padded;                                                                  \
        const int32_t *sums = p->x_sums + row * groups;                                                         \
        const vint low_half = splat_int(0x0f0f0f0f);                                                            \
        ROWS_##R(ZERO_ROW_4, S)                                                                                 \
        for (int64_t g = 0; g < groups; g++, x += GROUP, first += 288, second += 288) {                         \
            ROWS_##R(ZERO_ROW, S)                                                                               \
            for (int64_t i = 0; i < GROUP / 8; i++) {                                                           \
                ahead = fetch(ahead);                                                                           \
                S(LOAD_4, 0)                                                                                    \
                ROWS_##R(DOT_ROW_4, S)                                                                          \
            }                                                                                                   \
            S(SCALE_4, 0)                                                                                       \
            ROWS_##R(ADD_ROW_4, S)                                                                              \
        }                                                                                                       \
        ROWS_##R(PUT_ROW_4, S)                                                                                  \
    }
TILE_4(1, TWO)
TILE_4(2, TWO)
TILE_4(3, ONE)
TILE_4(4, ONE)

#define TILES_8 {4, 2, 2, 1}
#define TILES_4 {4, 2, 2, 1}
static const tile INT8_TILES[] = {NULL, int8_tile_1, int8_tile_2, int8_tile_3, int8_tile_4};
static const tile INT4_TILES[] = {NULL, int4_tile_1, int4_tile_2, int4_tile_3, int4_tile_4};

static void int8_strips(const struct product *p, int64_t begin, int64_t end, struct upcoming after) {
    product_strips(p, begin, end, INT8_TILES, after);
}

static void int4_strips(const struct product *p, int64_t begin, int64_t end, struct upcoming after) {
    product_strips(p, begin, end, INT4_TILES, after);
}

#endif
#endif
