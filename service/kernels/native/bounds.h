/* Scores of far blocks by the bounds of their keys: the largest product of any query head with any key that the bounds allow.
 *
 * Positive queries meet the largest keys, negative ones the smallest. Queries are whole numbers of 15 bits in a unit that the heads of a K/V head
 * share, so that products with bytes are summed exactly: in 31 bits up to a head of 512, since of the two halves of a dimension one is zero.
 * Several anchors of a sequence multiply a panel of bounds at once where AVX-512 has dot products of bytes, each number as two of them.
 * Invariant: scores are the same with every instruction set, alone and together.
 */
#include "attention_call.h"
#include "panels_int8.h"

/* The most query heads that share what is read of the bounds. */
#define BOUND_HEADS 8
/* 127 * 256 + 127: the largest number whose high and low half are bytes with signs. */
#define LARGEST_STEP 32639

/* Queries x [heads, size] -> rows [heads, signed_columns]: their positive parts in units, then their negative ones; gives the unit, 0 where it has none.
 * Loops of one kind each, which compilers make vectors of. */
INLINE float sign_queries(const float *x, int64_t heads, int64_t size, int16_t *out) {
    const int64_t columns = signed_columns(size), count = heads * size;
    vfloat most = splat(0.0f);
    for (int64_t i = 0; i < count; i += WIDTH) {
        vfloat y = load_some(FLOAT32, x, i, count - i < WIDTH ? count - i : WIDTH);
        most = vmaximum(pick(y < splat(0.0f), -y, y), most);
    }
    const float unit = maximum_of_lanes(most) / LARGEST_STEP;
    memset(out, 0, heads * columns * sizeof *out);
    if (!(unit > 0.0f && unit < INFINITY)) return 0.0f;
    for (int64_t g = 0; g < heads; g++) {
        const float *from = x + g * size;
        int16_t *to = out + g * columns;
        for (int64_t i = 0; i < size; i++) {
            float steps = rintf(from[i] / unit);
            steps = steps < LARGEST_STEP ? steps : LARGEST_STEP;
            to[i] = (int16_t)(steps > -LARGEST_STEP ? steps : -LARGEST_STEP);
        }
        for (int64_t i = 0; i < size; i++) to[size + i] = to[i] < 0 ? to[i] : 0;
        for (int64_t i = 0; i < size; i++) to[i] = to[i] > 0 ? to[i] : 0;
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

/* Bounds of candidates: `parts` rows [2 * size] from `at` + stride * block on, the block of a candidate being table[candidate]; of these `count`, which
 * are in `candidates`. */
struct bounded {
    const int8_t *at;
    int64_t stride, parts;
    const int32_t *table, *candidates;
    int64_t count;
};

/* How many rows of bounds ahead of their scores they are fetched: only the table tells where they lie. */
#define AHEAD 16

INLINE void fetch_bytes(const void *from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char *)from + line, 0, 2);
}

INLINE const int8_t *bounds_of(const struct bounded *b, int64_t i) { return b->at + b->table[b->candidates[i]] * b->stride; }

INLINE void score_bounds_of(const struct bounded *b, const int16_t *x, int64_t size, int heads, int32_t *out) {
    const int64_t ahead = AHEAD / b->parts > 0 ? AHEAD / b->parts : 1, columns = signed_columns(size), row = 2 * size;
    for (int64_t i = 0; i < b->count; i++) {
        fetch_bytes(bounds_of(b, i + ahead < b->count ? i + ahead : b->count - 1), b->parts * row);
        const int8_t *bounds = bounds_of(b, i);
        int32_t best = out[b->candidates[i]];
        for (int64_t part = 0; part < b->parts; part++) {
            int32_t product = largest_product(x, columns, bounds + part * row, row, heads);
            best = product > best ? product : best;
        }
        out[b->candidates[i]] = best;
    }
}

/* The largest product of each candidate's bounds with any of the queries [heads, signed_columns] -> out, where the candidate has its place. */
static void score_bounds(const struct bounded *b, const int16_t *x, int64_t size, int64_t heads, int32_t *out) {
    for (int64_t i = 0; i < b->count; i++) out[b->candidates[i]] = INT32_MIN;
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

/* Whole numbers of 15 bits as two rows of bytes for each of them, high and low [heads, 2, 4 * words], and of each head what the 128 that panels add to
 * every byte comes to. */
struct halves {
    int8_t *bytes;
    int32_t *beyond;
    int64_t words;
};

/* Columns of a panel of bounds. */
#define PANEL_COLUMNS 64
/* Anchors from which on packing panels costs less than it saves. */
#define PANEL_ANCHORS 3

#if HAS_STEPS
/* x [heads, columns], of which `count` are given -> h. */
INLINE void halve_steps(const int16_t *x, int64_t heads, int64_t columns, int64_t count, const struct halves *h) {
    const int64_t bytes = 4 * h->words;
    for (int64_t g = 0; g < heads; g++, x += columns) {
        int8_t *high = h->bytes + 2 * g * bytes, *low = high + bytes;
        int32_t sum = 0;
        for (int64_t i = 0; i < count; i++) low[i] = (int8_t)x[i];
        for (int64_t i = 0; i < count; i++) high[i] = (int8_t)((x[i] - low[i]) >> 8);
        for (int64_t i = 0; i < count; i++) sum += x[i];
        for (int64_t i = count; i < bytes; i++) high[i] = low[i] = 0;
        h->beyond[g] = 128 * sum;
    }
}

/* A tile of R rows, the high and low halves of R / 2 heads, by C vectors of columns of a panel: best [C] = the largest product of a head, if larger. */
#define TAKE_HALF(r, c)                                                                                                             \
    if (r % 2 == 0)                                                                                                                 \
        high[c] = _mm512_slli_epi32(a##r##_##c, 8);                                                                                 \
    else                                                                                                                            \
        best[c] = _mm512_max_epi32(best[c], _mm512_sub_epi32(_mm512_add_epi32(high[c], a##r##_##c), _mm512_set1_epi32(beyond[r / 2])));
#define TAKE_HALVES(r, S) S(TAKE_HALF, r)
#define BEST_TILE(R, C)                                                                                                                            \
    static void best_tile_##R##x##C(int64_t words, const int8_t *query, const int32_t *beyond, const uint32_t *panel, int64_t columns, __m512i *best) { \
        ROWS_##R(ZERO_ROW_8, STRIPS_##C)                                                                                                           \
        int64_t i = 0;                                                                                                                             \
        do {                                                                                                                                       \
            STRIPS_##C(LOAD_PANEL, 0) ROWS_##R(SCORE_ROW, STRIPS_##C)                                                                              \
        } while (++i < words);                                                                                                                     \
        __m512i high[C];                                                                                                                           \
        ROWS_##R(TAKE_HALVES, STRIPS_##C)                                                                                                          \
    }
BEST_TILE(2, 1) BEST_TILE(2, 4) BEST_TILE(4, 1) BEST_TILE(4, 4) BEST_TILE(6, 1) BEST_TILE(6, 4)
typedef void best_tile(int64_t, const int8_t *, const int32_t *, const uint32_t *, int64_t, __m512i *);
static best_tile *const best_tiles[3][2] = {{best_tile_2x1, best_tile_2x4}, {best_tile_4x1, best_tile_4x4}, {best_tile_6x1, best_tile_6x4}};

/* The largest products of the rows [heads] with 64 or 16 columns of a panel [words, columns] -> best [4], of 16 columns the first. */
INLINE void best_of_columns(int64_t heads, const struct halves *h, const uint32_t *panel, int64_t columns, int wide, __m512i best[4]) {
    for (int v = 0; v < 4; v++) best[v] = _mm512_set1_epi32(INT32_MIN);
    for (int64_t head = 0; head < heads; head += 3)
        best_tiles[(heads - head < 3 ? heads - head : 3) - 1][wide](h->words, h->bytes + head * 8 * h->words, h->beyond + head, panel, columns, best);
}

/* The largest products with each column, columns whole vectors -> out [columns]. */
static void best_products(int64_t heads, const struct halves *h, const uint32_t *panel, int64_t columns, int32_t *out) {
    for (int64_t column = 0, taken; column < columns; column += taken) {
        __m512i best[4];
        const int wide = columns - column >= 64;
        taken = wide ? 64 : 16;
        best_of_columns(heads, h, panel + column, columns, wide, best);
        for (int64_t v = 0; v < taken / 16; v++) _mm512_storeu_si512(out + column + 16 * v, best[v]);
    }
}

/* The largest product of all, each times the scale of its column. */
static float best_scaled_product(int64_t heads, const struct halves *h, const uint32_t *panel, int64_t columns, const float *scales) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t column = 0, taken; column < columns; column += taken) {
        __m512i best[4];
        const int wide = columns - column >= 64;
        taken = wide ? 64 : 16;
        best_of_columns(heads, h, panel + column, columns, wide, best);
        for (int64_t v = 0; v < taken / 16; v++)
            highest = _mm512_max_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(best[v]), _mm512_loadu_ps(scales + column + 16 * v)), highest);
    }
    return _mm512_reduce_max_ps(highest);
}

/* A panel of the bounds of candidates from the i-th on: of 64 where they have one part, else of 16, four parts from `part` on; what is missing repeats
 * the last. */
static void pack_bounds(const struct bounded *b, int64_t i, int64_t part, int64_t size, uint32_t *panel) {
    struct upcoming none = {NULL, 0};
    for (int64_t v = 0; v < PANEL_COLUMNS / WIDTH; v++) {
        const char *rows[WIDTH];
        const int64_t in = part + v < b->parts ? part + v : b->parts - 1;
        for (int64_t j = 0; j < WIDTH; j++) {
            const int64_t at = i + j + (b->parts == 1 ? v * WIDTH : 0);
            rows[j] = (const char *)bounds_of(b, at < b->count ? at : b->count - 1) + (b->parts == 1 ? 0 : in * 2 * size);
        }
        pack_step_rows(rows, 2 * size, panel + v * WIDTH, PANEL_COLUMNS, &none);
    }
}

/* The scores of score_bounds for several queries at once -> outs [queries]; query q asks for a candidate where bit q of masks[candidate] is set. */
static void score_bounds_together(const struct bounded *b, const struct halves *h, int queries, int64_t size, int64_t heads, const uint32_t *masks,
                                  uint32_t *panel, int32_t *const *outs) {
    const int64_t step = b->parts == 1 ? PANEL_COLUMNS : WIDTH;
    for (int64_t i = 0; i < b->count; i += step) {
        const int64_t count = b->count - i < step ? b->count - i : step;
        uint32_t asked = 0;
        for (int64_t j = 0; j < count; j++) asked |= masks[b->candidates[i + j]];
        for (int64_t part = 0; part < b->parts; part += PANEL_COLUMNS / WIDTH) {
            pack_bounds(b, i, part, size, panel);
            for (int64_t j = i + step; j < i + 2 * step && j < b->count; j++) fetch_bytes(bounds_of(b, j), b->parts * 2 * size);
            for (int q = 0; q < queries; q++) {
                if (!(asked >> q & 1)) continue;
                int32_t found[PANEL_COLUMNS];
                best_products(heads, h + q, panel, PANEL_COLUMNS, found);
                for (int64_t j = 0; j < count; j++) {
                    int32_t best = found[j], *out = outs[q] + b->candidates[i + j];
                    for (int64_t v = 1; b->parts > 1 && v < PANEL_COLUMNS / WIDTH; v++) best = found[v * WIDTH + j] > best ? found[v * WIDTH + j] : best;
                    *out = part && *out > best ? *out : best;
                }
            }
        }
    }
}
#else
/* Nothing of these is called. */
INLINE void halve_steps(const int16_t *x, int64_t heads, int64_t columns, int64_t count, const struct halves *h) {
    (void)x, (void)heads, (void)columns, (void)count, (void)h;
}
INLINE float best_scaled_product(int64_t heads, const struct halves *h, const uint32_t *panel, int64_t columns, const float *scales) {
    (void)heads, (void)h, (void)panel, (void)columns, (void)scales;
    return 0.0f;
}
INLINE void score_bounds_together(const struct bounded *b, const struct halves *h, int queries, int64_t size, int64_t heads, const uint32_t *masks,
                                  uint32_t *panel, int32_t *const *outs) {
    (void)b, (void)h, (void)queries, (void)size, (void)heads, (void)masks, (void)panel, (void)outs;
}
#endif
