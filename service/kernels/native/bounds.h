/* Scores of far blocks by the bounds of their keys: the largest product of any query head with any key that the bounds allow.
 *
 * Positive queries meet the largest keys, negative ones the smallest. Queries are whole numbers of 15 bits in a unit that the heads of a K/V head
 * share, so that products with bounds are summed exactly: in 31 bits up to a head of 512, since of the two halves of a dimension one is zero.
 * Invariant: scores are the same with every instruction set.
 */
#include "attention_call.h"
#include "vector.h"

/* The most query heads that share what is read of the bounds. */
#define BOUND_HEADS 8
#define LARGEST_STEP 32767

/* Queries x [heads, size] -> rows [heads, signed_columns]: their positive parts in units, then their negative ones; gives the unit, 0 where it has none. */
INLINE float sign_queries(const float *x, int64_t heads, int64_t size, int16_t *out) {
    const int64_t columns = signed_columns(size);
    float largest = 0.0f;
    for (int64_t i = 0; i < heads * size; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    const float unit = largest / LARGEST_STEP;
    memset(out, 0, heads * columns * sizeof *out);
    if (!(unit > 0.0f && unit < INFINITY)) return 0.0f;
    for (int64_t g = 0; g < heads; g++)
        for (int64_t i = 0; i < size; i++) {
            float steps = rintf(x[g * size + i] / unit);
            steps = steps < LARGEST_STEP ? steps : LARGEST_STEP;
            steps = steps > -LARGEST_STEP ? steps : -LARGEST_STEP;
            out[g * columns + (steps < 0.0f ? size : 0) + i] = (int16_t)steps;
        }
    return unit;
}

/* The largest product of x [heads, signed_columns] with y [count] int8, heads being BOUND_HEADS at most and known when compiled. */
INLINE int32_t largest_product(const int16_t *x, int64_t columns, const int8_t *y, int64_t count, int heads) {
    int32_t best = INT32_MIN;
    int8_t rest[BOUND_STEPS] = {0};
    const int64_t whole = count / BOUND_STEPS * BOUND_STEPS;
    if (whole < count) memcpy(rest, y + whole, count - whole);
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    __m256i sums[BOUND_HEADS];
#if defined(ISA_AVX512)
    __m512i wide[BOUND_HEADS];
    for (int g = 0; g < heads; g++) wide[g] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 32) {
        __m512i bounds = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(i < whole ? y + i : rest)));
        for (int g = 0; g < heads; g++) wide[g] = _mm512_dpwssd_epi32(wide[g], bounds, _mm512_loadu_si512(x + g * columns + i));
    }
    for (int g = 0; g < heads; g++) sums[g] = _mm256_add_epi32(_mm512_castsi512_si256(wide[g]), _mm512_extracti64x4_epi64(wide[g], 1));
#else
    for (int g = 0; g < heads; g++) sums[g] = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 16) {
        __m256i bounds = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(i < whole ? y + i : rest + (i - whole))));
        for (int g = 0; g < heads; g++)
            sums[g] = _mm256_add_epi32(sums[g], _mm256_madd_epi16(bounds, _mm256_loadu_si256((const __m256i *)(x + g * columns + i))));
    }
#endif
    for (int g = 0; g < heads; g += 4) {
        /* Four at a time; where they do not come out even the last is summed again. */
        const int last = heads - 1;
        __m256i low = _mm256_hadd_epi32(sums[g], sums[g + 1 < last ? g + 1 : last]);
        __m256i high = _mm256_hadd_epi32(sums[g + 2 < last ? g + 2 : last], sums[g + 3 < last ? g + 3 : last]);
        __m256i pairs = _mm256_hadd_epi32(low, high);
        __m128i found = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        found = _mm_max_epi32(found, _mm_shuffle_epi32(found, 0x4e));
        found = _mm_max_epi32(found, _mm_shuffle_epi32(found, 0xb1));
        best = _mm_cvtsi128_si32(found) > best ? _mm_cvtsi128_si32(found) : best;
    }
#else
    for (int g = 0; g < heads; g++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < whole; i++) sum += x[g * columns + i] * y[i];
        if (whole < count)
            for (int64_t i = 0; i < BOUND_STEPS; i++) sum += x[g * columns + whole + i] * rest[i];
        best = sum > best ? sum : best;
    }
#endif
    return best;
}

/* Some bounds of each candidate [count]: `parts` rows [2 * size] from `at` + stride * block on, the block of a candidate being table[indices[i]]. */
struct bounded {
    const int8_t *at;
    int64_t stride, parts;
    const int32_t *table, *indices;
    int64_t count;
};

/* How many rows of bounds ahead of their scores they are fetched: only the table tells where they lie. */
#define AHEAD 16

INLINE void fetch_bytes(const void *from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char *)from + line, 0, 2);
}

INLINE void score_bounds_of(const struct bounded *b, const int16_t *x, int64_t size, int heads, int32_t *out) {
    const int64_t ahead = AHEAD / b->parts > 0 ? AHEAD / b->parts : 1, columns = signed_columns(size), row = 2 * size;
    for (int64_t i = 0; i < b->count; i++) {
        fetch_bytes(b->at + b->table[b->indices[i + ahead < b->count ? i + ahead : b->count - 1]] * b->stride, b->parts * row);
        const int8_t *bounds = b->at + b->table[b->indices[i]] * b->stride;
        for (int64_t part = 0; part < b->parts; part++) {
            int32_t product = largest_product(x, columns, bounds + part * row, row, heads);
            out[i] = product > out[i] ? product : out[i];
        }
    }
}

/* The largest product of each candidate's bounds with any of the queries [heads, signed_columns] -> out [count]. */
static void score_bounds(const struct bounded *b, const int16_t *x, int64_t size, int64_t heads, int32_t *out) {
    for (int64_t i = 0; i < b->count; i++) out[i] = INT32_MIN;
    for (; heads > 0; heads -= BOUND_HEADS, x += BOUND_HEADS * signed_columns(size)) switch (heads) {
        case 1: score_bounds_of(b, x, size, 1, out); break;
        case 2: score_bounds_of(b, x, size, 2, out); break;
        case 3: score_bounds_of(b, x, size, 3, out); break;
        case 4: score_bounds_of(b, x, size, 4, out); break;
        case 5: score_bounds_of(b, x, size, 5, out); break;
        case 6: score_bounds_of(b, x, size, 6, out); break;
        case 7: score_bounds_of(b, x, size, 7, out); break;
        default: score_bounds_of(b, x, size, BOUND_HEADS, out);
        }
}
