/* One near block of a K/V head into the far store: rows quantised or copied, and bounds of the keys as they will be read back.
 *
 * The arithmetic is that of `demote` in reference_sparse.py, operation for operation: quotients are divided, and what is rounded is rounded
 * to even. Magnitudes are compared as integers, which leaves NaN the largest. Invariant: the same bytes with every instruction set.
 */
#include "demoting_call.h"
#include "vector.h"

/* Added to a float32 below 2^22 it leaves the nearest whole number at the bottom of the sum, in two's complement. */
#define WHOLE 0x1.8p23f

INLINE vint magnitude(vfloat x) { return (vint)x & 0x7fffffff; }
INLINE vint larger(vint a, vint b) { return (vint)pick(a > b, (vfloat)a, (vfloat)b); }
INLINE vfloat vminimum(vfloat a, vfloat b) { return pick(a < b, a, b); }
INLINE float largest_lane(vint magnitudes) {
    int32_t lanes[WIDTH];
#if defined(ISA_AVX512)
    lanes[0] = _mm512_reduce_max_epi32((__m512i)magnitudes);
#else
    memcpy(lanes, &magnitudes, sizeof lanes);
    for (int width = WIDTH / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
#endif
    float x;
    memcpy(&x, lanes, sizeof x);
    return x;
}

/* The lowest byte of each lane. Written out for x86 as in widen_bytes. */
INLINE void lowest_bytes(vint x, int8_t *out) {
#if defined(ISA_AVX512)
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(ISA_AVX2)
    const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, /* of each half */
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i bytes = _mm256_shuffle_epi8((__m256i)x, first);
    _mm_storel_epi64((__m128i *)out, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#else
    for (int i = 0; i < WIDTH; i++) out[i] = (int8_t)(x[i] & 0xff);
#endif
}

/* The lowest halves of these bytes, two in a byte. */
INLINE void lowest_nibbles(vint x, int8_t *out) {
#if defined(ISA_AVX512)
    __m512i low = _mm512_and_si512((__m512i)x, _mm512_set1_epi64(15));
    __m512i high = _mm512_and_si512(_mm512_srli_epi64((__m512i)x, 28), _mm512_set1_epi64(0xf0));
    _mm_storel_epi64((__m128i *)out, _mm512_cvtepi64_epi8(_mm512_or_si512(low, high)));
#else
    int8_t bytes[WIDTH];
    lowest_bytes(x, bytes);
#if defined(ISA_AVX2)
    __m128i pairs = _mm_loadl_epi64((const __m128i *)bytes);
    __m128i low = _mm_and_si128(pairs, _mm_set1_epi16(15)), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi16(0xf0));
    int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(_mm_or_si128(low, high), low));
    memcpy(out, &packed, sizeof packed);
#else
    for (int i = 0; i < WIDTH / 2; i++) out[i] = (int8_t)((bytes[2 * i] & 15) | ((bytes[2 * i + 1] & 15) << 4));
#endif
#endif
}

/* Store the lowest bytes of `count` lanes as elements from `i` on, of int4 two in a byte. */
INLINE void store_steps(enum element far_type, int8_t *row, int64_t i, vint steps, int64_t count) {
    int8_t bytes[WIDTH];
    if (far_type == STORED_INT4) {
        lowest_nibbles(steps, count == WIDTH ? row + i / 2 : bytes);
        if (count < WIDTH) memcpy(row + i / 2, bytes, count / 2);
    } else {
        lowest_bytes(steps, count == WIDTH ? row + i : bytes);
        if (count < WIDTH) memcpy(row + i, bytes, count);
    }
}

/* Rows x [tokens, size] -> their scales, and the same as float32 in `units`: of each row the largest magnitude over `levels`. */
INLINE void scale_rows(enum element type, const void *x, int64_t from, int64_t stride, int64_t size, int64_t tokens, float levels,
                       uint16_t *scales, float *units) {
    for (int64_t token = 0; token < tokens; token++) {
        vint largest = {0};
        for (int64_t i = 0; i < size; i += WIDTH)
            largest = larger(magnitude(load_some(type, x, from + token * stride + i, size - i < WIDTH ? size - i : WIDTH)), largest);
        units[token] = largest_lane(largest);
    }
    for (int64_t token = 0; token < tokens; token += WIDTH) {
        int64_t count = tokens - token < WIDTH ? tokens - token : WIDTH;
        store_some(FLOAT16, scales, token, load_some(FLOAT32, units, token, count) / splat(levels), count);
        store_some(FLOAT32, units, token, load_some(FLOAT16, scales, token, count), count);
    }
}

/* x in whole units, -levels .. levels, as the lowest byte of each lane says them; 0 where the unit is 0 or not finite. */
INLINE vfloat count_units(vfloat x, vfloat unit, float levels) {
    vfloat count = pick((unit > splat(0.0f)) & (unit < splat(INFINITY)), x / unit, splat(0.0f));
    return vmaximum(vminimum(count, splat(levels)), splat(-levels)) + splat(WHOLE);
}

/* Store rows of keys or values. With `extremes` these become the highest and the lowest of each part of the tokens as they will be read
 * back [1 + parts, 2, columns], the block being the first part; gives the largest magnitude of all then. */
INLINE float store_rows(enum element type, enum element far_type, const struct demoting *d, const struct demoted *s, int64_t from,
                        int64_t to, float *units, float *extremes, int64_t columns) {
    const int64_t size = s->size, tokens = d->block_tokens, parts = extremes ? d->bounds.count : 1, stride = s->strides[2];
    const int64_t bytes = far_type == STORED_INT8 ? size : far_type == STORED_INT4 ? size / 2 : size * (type == FLOAT32 ? 4 : 2);
    const int copied = far_type == type;
    const float levels = far_type == STORED_INT4 ? 7.0f : 127.0f;
    char *far = (char *)s->far + to * tokens * bytes;
    if (copied)
        for (int64_t t = 0; t < tokens; t++) memcpy(far + t * bytes, (const char *)s->near + (from + t * stride) * (bytes / size), bytes);
    else
        scale_rows(type, s->near, from, stride, size, tokens, levels, s->scales + to * tokens, units);
    if (copied && !extremes) return 0.0f;
    vint largest = {0};
    for (int64_t i = 0; i < size; i += WIDTH) {
        int64_t count = size - i < WIDTH ? size - i : WIDTH;
        vfloat highest = splat(-INFINITY), lowest = splat(INFINITY);
        for (int64_t part = 0, t = 0; part < parts; part++) {
            vfloat high = splat(-INFINITY), low = splat(INFINITY);
            for (int64_t end = t + tokens / parts; t < end; t++) {
                vfloat key = load_some(type, s->near, from + t * stride + i, count);
                if (!copied) {
                    vfloat unit = splat(units[t]), steps = count_units(key, unit, levels);
                    store_steps(far_type, (int8_t *)far + t * bytes, i, (vint)steps, count);
                    key = (steps - splat(WHOLE)) * unit;
                }
                if (!extremes) continue;
                largest = larger(magnitude(key), largest);
                high = vmaximum(key, high), low = vminimum(key, low);
            }
            if (!extremes) continue;
            store_float(extremes + 2 * (1 + part) * columns + i, high);
            store_float(extremes + (2 * (1 + part) + 1) * columns + i, low);
            highest = vmaximum(high, highest), lowest = vminimum(low, lowest);
        }
        if (!extremes) continue;
        store_float(extremes + i, highest);
        store_float(extremes + columns + i, lowest);
    }
    return largest_lane(largest);
}

/* The scale of bounds of keys up to `largest`, rounded up to float16. */
INLINE uint16_t bound_scale(float largest) {
    uint16_t scale;
    store_some(FLOAT16, &scale, 0, splat(largest / 127.0f), 1);
    return (uint16_t)(scale + (widen_half(scale) * 127.0f < largest));
}

/* The least whole number of units that is not below x, also where the quotient was rounded down. */
INLINE vfloat upward(vfloat x, vfloat unit) {
    vfloat ratio = x / unit, count = (ratio + splat(WHOLE)) - splat(WHOLE), one = splat(1.0f), none = splat(0.0f);
    count += pick(count < ratio, one, none);
    return count + pick(count * unit < x, one, none);
}

/* extremes [parts, 2, columns] -> bounds [parts, 2, size] in units of `scale`; zeros where that is 0 or not finite. */
INLINE void store_bounds(const float *extremes, int64_t columns, int64_t size, int64_t parts, uint16_t scale, int8_t *bounds) {
    float unit = widen_half(scale);
    if (!(unit > 0.0f && unit < INFINITY)) {
        memset(bounds, 0, parts * 2 * size);
        return;
    }
    for (int64_t row = 0; row < 2 * parts; row++)
        for (int64_t i = 0; i < size; i += WIDTH) {
            vfloat x = load_float(extremes + row * columns + i);
            vfloat count = row % 2 ? -upward(-x, splat(unit)) : upward(x, splat(unit));
            store_steps(STORED_INT8, bounds + row * size, i, (vint)(count + splat(WHOLE)), size - i < WIDTH ? size - i : WIDTH);
        }
}

INLINE void demote_rows(enum element type, enum element far_type, const struct demoting *d, int64_t block, int64_t head, float *units) {
    const struct far_bounds *b = &d->bounds;
    const int64_t near = d->near_ids[block], far = d->far_ids[block], to = far * d->kv_heads + head, size = d->keys.size;
    const int64_t *keys = d->keys.strides, *values = d->values.strides;
    const int64_t columns = (size + 15) / 16 * 16;
    float *extremes = units + (d->block_tokens + 15) / 16 * 16;
    float largest = store_rows(type, far_type, d, &d->keys, near * keys[0] + head * keys[1], to, units, extremes, columns);
    const uint16_t scale = bound_scale(largest);
    b->scales[far * b->scale_strides[0] + head * b->scale_strides[1]] = scale;
    store_bounds(extremes, columns, size, 1, scale, b->blocks + far * b->block_strides[0] + head * b->block_strides[1]);
    store_bounds(extremes + 2 * columns, columns, size, b->count, scale, b->parts + to * b->count * 2 * size);
    store_rows(type, far_type, d, &d->values, near * values[0] + head * values[1], to, units, NULL, 0);
}

INLINE void demote_from(enum element type, const struct demoting *d, int64_t block, int64_t head, float *memory) {
    if (d->far_type == STORED_INT8)
        demote_rows(type, STORED_INT8, d, block, head, memory);
    else if (d->far_type == STORED_INT4)
        demote_rows(type, STORED_INT4, d, block, head, memory);
    else
        demote_rows(type, type, d, block, head, memory);
}

/* A near block in 8 bits, the scale of each row behind it, as float32 [tokens, size]. */
static void widen_near(const struct demoting *d, const struct demoted *s, int64_t block, int64_t head, float *out) {
    const char *row = (const char *)s->near + d->near_ids[block] * s->strides[0] + head * s->strides[1];
    for (int64_t token = 0; token < d->block_tokens; token++, row += s->strides[2], out += s->size) {
        float unit;
        memcpy(&unit, row + s->size, sizeof unit);
        int64_t i = 0;
        for (; i + WIDTH <= s->size; i += WIDTH) store_float(out + i, widen_bytes((const int8_t *)row + i) * splat(unit));
        for (; i < s->size; i++) out[i] = (float)(int8_t)row[i] * unit;
    }
}

static void demote_wide(const struct demoting *d, int64_t block, int64_t head, float *memory) {
    struct demoting wide = *d;
    float *rows = memory + demoting_floats(d->block_tokens, d->bounds.count, d->keys.size, 0);
    struct demoted *both[] = {&wide.keys, &wide.values};
    for (int i = 0; i < 2; i++) {
        widen_near(d, both[i], block, head, rows);
        both[i]->near = rows, both[i]->strides[0] = both[i]->strides[1] = 0, both[i]->strides[2] = both[i]->size;
        rows += d->block_tokens * both[i]->size;
    }
    demote_from(FLOAT32, &wide, block, head, memory);
}

static void demote(const struct demoting *d, int64_t block, int64_t head, float *memory) {
    if (d->near_type == STORED_INT8) demote_wide(d, block, head, memory);
    if (d->near_type == FLOAT32) demote_from(FLOAT32, d, block, head, memory);
    if (d->near_type == BFLOAT16) demote_from(BFLOAT16, d, block, head, memory);
    if (d->near_type == FLOAT16) demote_from(FLOAT16, d, block, head, memory);
}
